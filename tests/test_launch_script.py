"""What launch.sh starts: the printed commands, and two "nodes" of one machine that really train."""

import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from ranks import free_port
from tiny import make_inputs, write_recipe_file
from training import read_losses

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
SLURM_JOB = {
    "SLURM_JOB_ID": "4711",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_JOB_NODELIST": "n[1-2]",
    "SLURM_GPUS_ON_NODE": "8",
}
SLURM_STEP = {
    **SLURM_JOB,
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_NODEID": "1",
}
TRAIN = (
    "train.py --recipe quickstart --ds_config ds_configs/{}.json --resume auto "
    "--recipe lf-wordnet-84k"
)
ONE, MULTI = "single_gpu_offload_bf16", "multi_gpu_zero2_bf16"


def environment(**settings):
    """An environment without launchers and schedulers, in which this Python is the active one."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not re.match("SLURM|CUDA|RANK$|WORLD_SIZE$|LOCAL_|OMP_|DS_ACC", name)
    }
    # scontrol is what says the names of a job's nodes.
    return {**kept, "VIRTUAL_ENV": sys.prefix, **settings}


def launch(*options, **settings):
    return subprocess.run(
        ["bash", "launch.sh", *options],
        cwd=ROOT, env=environment(**settings), capture_output=True, text=True, timeout=60,
    )  # fmt: skip


def printed(*options, **settings):
    """Returns the printed commands without the free port and the settings of `env`."""
    done = launch("--dry-run", "--recipe", "lf-wordnet-84k", *options, **settings)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if not line.startswith("#")]
    return [re.sub(r"^env (-u \w+ |\w+=\S* )+", "", line) for line in lines]


@pytest.fixture
def hostfile(tmp_path):
    path = tmp_path / "hosts"
    path.write_text("# two nodes\nn1 slots=8\n\nn2 slots=8 # the other\n")
    return str(path)


@pytest.fixture
def slurm_commands(tmp_path):
    """A PATH with SLURM's command that spells out a list of nodes."""
    script = tmp_path / "scontrol"
    script.write_text("#!/bin/sh\ntest \"$*\" = 'show hostnames n[1-2]' && printf 'n1\\nn2\\n'\n")
    script.chmod(0o755)
    return f"{tmp_path}:{os.environ['PATH']}"


ACCELERATE = (
    "accelerate launch --use_deepspeed --deepspeed_config_file ds_configs/{}.json "
    "--zero3_init_flag false --mixed_precision no --dynamo_backend no "
)
ON_ONE_NODE = {
    "deepspeed": "deepspeed --quiet --master_port 5 --num_accelerators {n} ",
    "torchrun": "torchrun --nproc_per_node {n} --nnodes 1 --master_addr 127.0.0.1 --master_port 5 ",
    "accelerate": ACCELERATE + "--num_machines 1 --num_processes {n} --main_process_port 5 ",
}


@pytest.mark.parametrize("launcher", ON_ONE_NODE)
@pytest.mark.parametrize(("num_gpus", "ds_config"), [(1, ONE), (8, MULTI)])
def test_commands_for_one_node(launcher, num_gpus, ds_config):
    options = ["--launcher", launcher, "--device=gpu", "--master_port=5"]
    if num_gpus > 1:
        options += ["--num_gpus", str(num_gpus)]
    expected = ON_ONE_NODE[launcher].format(ds_config, n=num_gpus) + TRAIN.format(ds_config)
    assert printed(*options) == [expected]


ON_TWO_NODES = {
    "deepspeed": "deepspeed --quiet --hostfile {file} --num_accelerators 8 --master_addr n1 "
    "--master_port {port} --no_ssh --node_rank 1 ",
    "torchrun": "torchrun --nproc_per_node 8 --nnodes 2 --rdzv_backend c10d "
    "--rdzv_endpoint n1:{port} --rdzv_conf is_host=false --rdzv_id {id} ",
    "accelerate": ACCELERATE.format(MULTI) + "--num_machines 2 --num_processes 16 "
    "--machine_rank 1 --main_process_ip n1 --deepspeed_multinode_launcher standard "
    "--main_process_port {port} ",
}


@pytest.mark.parametrize("launcher", ON_TWO_NODES)
def test_commands_for_two_nodes_of_a_hostfile(hostfile, launcher):
    options = ["--launcher", launcher, "--device=gpu", "--hostfile", hostfile, "--node_rank", "1"]
    expected = ON_TWO_NODES[launcher].format(file=hostfile, port=29500, id="unidec_ds")
    assert printed(*options) == [expected + TRAIN.format(MULTI)]


def test_deepspeed_starts_the_nodes_of_a_hostfile_itself(hostfile):
    assert printed("--device=gpu", "--hostfile", hostfile) == [
        f"deepspeed --quiet --hostfile {hostfile} --num_accelerators 8 --master_addr n1 "
        f"--master_port 29500 {TRAIN.format(MULTI)}"
    ]


@pytest.mark.parametrize("launcher", ON_TWO_NODES)
def test_commands_in_a_slurm_job(slurm_commands, tmp_path, launcher):
    settings = {"PATH": slurm_commands, "TMPDIR": str(tmp_path)}
    options = ["--launcher", launcher, "--device", "gpu"]
    file = f"{tmp_path}/unidec_ds-hosts-4711"
    on_node_1 = ON_TWO_NODES[launcher].format(file=file, port=24711, id=4711) + TRAIN.format(MULTI)
    within = printed(*options, **SLURM_STEP, **settings)
    assert within[-1] == on_node_1
    outside = printed(*options, **SLURM_JOB, SLURM_CPUS_PER_TASK="64", **settings)
    assert outside[0] == (
        "srun --nodes 2 --ntasks 2 --ntasks-per-node 1 --cpus-per-task 64 --kill-on-bad-exit=1 "
        f"bash {ROOT}/launch.sh --recipe lf-wordnet-84k {shlex.join(options)}"
    )
    assert outside[-1] == on_node_1
    if launcher == "deepspeed":
        assert within[0] == rf"printf '%s slots=8\n' n1 n2 >{file}"
    assert not Path(file).exists()


def test_one_node_of_slurm_uses_all_its_gpus():
    slurm = {"SLURM_JOB_ID": "3", "SLURM_JOB_NUM_NODES": "1", "SLURM_GPUS_PER_NODE": "a100:4"}
    (command,) = printed("--device=gpu", "--launcher=torchrun", **slurm)
    assert "--nproc_per_node 4 " in command


def test_chosen_gpus_reach_the_deepspeed_launcher():
    options = ("--device=gpu", "--num_gpus=2")
    (command,) = printed(*options, CUDA_VISIBLE_DEVICES="3,1,0")
    assert "--include localhost:3,1 " in command
    done = launch("--dry-run", *options, CUDA_VISIBLE_DEVICES="GPU-1,GPU-2")
    assert done.returncode == 2
    assert "use --launcher torchrun" in done.stderr


def test_without_a_gpu_ranks_share_the_cores():
    done = launch("--dry-run", "--launcher=torchrun", "--num_gpus=64", "--device=cpu")
    assert done.stdout.startswith("env DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 torchrun ")
    assert re.search(r"--ds_config ds_configs/cpu(_bf16)?\.json", done.stdout)


def test_a_ds_config_of_ones_own_reaches_launcher_and_training():
    (command,) = printed("--device=gpu", "--launcher=accelerate", "--ds_config=my.json")
    assert "--deepspeed_config_file my.json" in command
    assert "train.py --recipe quickstart --ds_config my.json" in command


@pytest.mark.parametrize(
    ("options", "needed"),
    [
        (["--num_gpus", "0"], "--num_gpus: found '0'; needs a number from 1"),
        (["--num_gpus"], "--num_gpus needs a value"),
        (["--launcher", "mpi"], "needs deepspeed, accelerate or torchrun"),
        (["--device", "tpu"], "needs gpu or cpu"),
        (["--hostfile", "/nowhere"], "there is no file /nowhere"),
        (["--node_rank", "1"], "--node_rank needs --hostfile"),
    ],
)
def test_wrong_options(options, needed):
    done = launch("--dry-run", *options)
    assert done.returncode == 2
    assert needed in done.stderr


@pytest.mark.parametrize(
    ("content", "needed"),
    [
        ("n1 slots=8\nn2\n", ":2: found 'n2'; needs 'HOST slots=NUMBER_OF_GPUS'"),
        ("n1 slots=8\nn2 slots=4\n", "give the number to use on every node with --num_gpus"),
        ("# none\n", "names no host"),
        ("n1 slots=8\nn2 slots=8\n", "is not in"),
    ],
)
def test_wrong_hostfiles(tmp_path, content, needed):
    (tmp_path / "hosts").write_text(content)
    done = launch("--dry-run", "--launcher=torchrun", "--hostfile", str(tmp_path / "hosts"))
    assert done.returncode == 2
    assert needed in done.stderr


@pytest.fixture
def batch_job(tmp_path):
    """Starts scripts/slurm.sbatch where SLURM's commands note how they are called."""
    note = f'#!/bin/sh\necho "$(basename $0) $*" >>{tmp_path}/calls\n'
    wait = f"while [ ! -e {tmp_path}/end ]; do sleep 0.05; done\n"
    ends = {"srun": wait + "exit 3", "scancel": f"touch {tmp_path}/end", "scontrol": ""}
    for name, end in ends.items():
        (tmp_path / name).write_text(note + end)
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_CPUS_PER_TASK": "4"}
    with subprocess.Popen(
        ["bash", str(ROOT / "scripts" / "slurm.sbatch"), "--set", "train.epochs=1"],
        env=environment(PATH=f"{tmp_path}:{os.environ['PATH']}", **slurm),
    ) as process:
        while not (tmp_path / "calls").exists():
            assert process.poll() is None
        yield process, tmp_path
        process.kill()


def test_a_batch_job_passes_the_warning_on_and_queues_itself_again(batch_job):
    process, folder = batch_job
    process.send_signal(signal.SIGUSR1)
    assert process.wait(timeout=60) == 0
    srun, *calls = (folder / "calls").read_text().splitlines()
    assert calls == ["scancel --signal=USR1 7", "scontrol requeue 7"]
    assert srun == (
        "srun --kill-on-bad-exit=1 --cpus-per-task=4 bash launch.sh --launcher torchrun "
        f"--recipe lf-amazontitles-131k --corpus {ROOT}/corpora/LF-AmazonTitles-131K "
        f"--output {ROOT}/runs/lf-amazontitles-131k --set checkpoint.every_steps=500 "
        "--set train.epochs=1"
    )


def test_a_batch_job_that_fails_is_not_queued_again(batch_job):
    process, folder = batch_job
    (folder / "end").touch()
    assert process.wait(timeout=60) == 3
    assert len((folder / "calls").read_text().splitlines()) == 1


def tiny_job(inputs, run):
    """Returns options of a short training over `make_inputs(inputs)`."""
    recipe = write_recipe_file(inputs, train={"epochs": 1})
    options = ["--recipe", str(recipe), "--ds_config", str(inputs / "ds_config.json")]
    return [*options, "--output", str(run)]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """Returns the inputs and the losses of one process."""
    inputs = make_inputs(tmp_path_factory.mktemp("inputs"))
    subprocess.run(
        [sys.executable, "train.py", *tiny_job(inputs, inputs / "one")],
        cwd=ROOT, env=environment(DS_ACCELERATOR="cpu"), check=True, capture_output=True,
    )  # fmt: skip
    return inputs, read_losses(inputs / "one")


@pytest.mark.slow
@pytest.mark.kernel
@pytest.mark.parametrize("launcher", ON_TWO_NODES)
def test_two_nodes_follow_the_losses_of_one_process(one_process, tmp_path, launcher):
    """The printed commands of both nodes, run; this machine is both under two of its names."""
    inputs, losses = one_process
    hosts = tmp_path / "hosts"
    hosts.write_text("localhost slots=1\n127.0.0.1 slots=1\n")
    options = ["--launcher", launcher, "--device=cpu", "--hostfile", str(hosts)]
    options += ["--master_port", str(free_port()), *tiny_job(inputs, tmp_path / "two")]
    nodes = [launch("--dry-run", "--node_rank", str(rank), *options) for rank in range(2)]
    assert [node.returncode for node in nodes] == [0, 0], nodes
    running = [
        subprocess.Popen(
            node.stdout, shell=True, cwd=ROOT,
            env=environment(PATH=f"{BIN}:{os.environ['PATH']}"),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for node in nodes
    ]  # fmt: skip
    said = [process.communicate(timeout=300)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0], "\n".join(said)
    assert len(losses) == 7
    two = read_losses(tmp_path / "two")
    assert list(two.values()) == pytest.approx(list(losses.values()), rel=1e-4)
