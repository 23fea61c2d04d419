"""What launch.sh starts: the printed commands, and two "nodes" of one machine that really train."""

import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from clusters_page import commands, runnable
from launching import (
    ROOT,
    STOP_WITHIN_S,
    environment,
    launch,
    make_installed_environment,
    printed,
    tiny_job,
    wait_until_it_trains,
)
from ranks import free_port
from tiny import make_inputs
from training import read_losses

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


ONE_NODE = {"SLURM_JOB_ID": "3", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "n7"}


@pytest.mark.parametrize(
    ("slurm", "number"),
    [
        ({"SLURM_GPUS_PER_NODE": "a100:4"}, 4),
        ({"SLURM_GPUS_PER_NODE": "a100:4,v100:2"}, 6),
        ({"SLURM_GPUS_PER_NODE": "a100:4", "SLURM_GPUS_ON_NODE": "3"}, 3),
        ({"SLURM_GPUS_ON_NODE": "0"}, 1),
        ({}, 1),
    ],
)
def test_one_node_of_slurm_uses_all_its_gpus(slurm, number):
    options = ("--device=gpu", "--launcher=torchrun")
    (command,) = printed(*options, SLURMD_NODENAME="n7", **ONE_NODE, **slurm)
    assert f"--nproc_per_node {number} " in command
    (command,) = printed(*options, "--num_gpus=2", SLURMD_NODENAME="n7", **ONE_NODE, **slurm)
    assert "--nproc_per_node 2 " in command


def test_gpus_of_slurm_that_cannot_be_read_are_asked_for():
    slurm = {**ONE_NODE, "SLURM_GPUS_PER_NODE": "a100"}
    done = launch("--dry-run", "--device=gpu", SLURMD_NODENAME="n7", **slurm)
    assert done.returncode == 2
    assert "SLURM says that a node has 'a100' GPUs; say how many to use with --num_gpus" in (
        done.stderr
    )


def test_one_node_of_slurm_is_started_from_another_machine():
    """`salloc` leaves the shell on the machine where it was typed, unless told otherwise."""
    options = ("--device=gpu", "--launcher=torchrun")
    outside = printed(*options, **ONE_NODE, SLURM_GPUS_PER_NODE="4")
    assert outside[0] == (
        "srun --nodes 1 --ntasks 1 --ntasks-per-node 1 --kill-on-bad-exit=1 "
        f"bash {ROOT}/launch.sh --recipe lf-wordnet-84k {shlex.join(options)}"
    )
    assert outside[1].startswith("torchrun --nproc_per_node 4 --nnodes 1 ")
    here = {**ONE_NODE, "SLURM_JOB_NODELIST": socket.gethostname()}
    step = {"SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "n7", "SLURM_STEP_NUM_NODES": "1"}
    for slurm in (here, {**ONE_NODE, **step}):
        (command,) = printed(*options, **slurm)
        assert command.startswith("torchrun --nproc_per_node 1 --nnodes 1 ")


def test_a_step_of_several_tasks_a_node_is_refused():
    done = launch("--dry-run", **{**SLURM_STEP, "SLURM_STEP_NUM_TASKS": "16"})
    assert done.returncode == 2
    assert "srun started 16 tasks on 2 nodes; needs one a node" in done.stderr


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
        ("n1 slots=8\nn2 slots=8\nn1 slots=8\n", ":3: n1 is there twice"),
        ("n1 slots=8\n", "is not n1, the only host of"),
        (f"{socket.gethostname()} slots=8\n127.0.0.1 slots=8\n", "are this machine; say which"),
    ],
)
def test_wrong_hostfiles(tmp_path, content, needed):
    (tmp_path / "hosts").write_text(content)
    done = launch("--dry-run", "--launcher=torchrun", "--hostfile", str(tmp_path / "hosts"))
    assert done.returncode == 2
    assert needed in done.stderr


def test_deepspeed_does_not_train_here_for_the_only_host_of_a_hostfile(tmp_path):
    (tmp_path / "hosts").write_text("n1 slots=8\n")
    options = ["--device=gpu", "--hostfile", str(tmp_path / "hosts")]
    done = launch("--dry-run", *options)
    assert done.returncode == 2
    assert "is not n1, the only host of" in done.stderr
    for here in (["--node_rank", "0"], []):  # said, or known
        if not here:
            (tmp_path / "hosts").write_text("localhost slots=8\n")
        (command,) = printed(*options, *here)
        assert command.startswith("deepspeed --quiet --master_port ")
        assert "--num_accelerators 8 train.py" in command
    done = launch("--dry-run", *options, "--node_rank", "1")
    assert "--node_rank: found 1, but there are 1 nodes" in done.stderr


@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_a_node_finds_its_line_by_its_name(tmp_path, launcher):
    (tmp_path / "hosts").write_text(f"n1 slots=8\n{socket.gethostname()} slots=8\n")
    options = ["--device=gpu", "--launcher", launcher, "--hostfile", str(tmp_path / "hosts")]
    assert printed(*options) == printed(*options, "--node_rank", "1")
    assert printed(*options) != printed(*options, "--node_rank", "0")


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """An environment in which launch.sh installs nothing."""
    return str(make_installed_environment(tmp_path_factory.mktemp("installed")))


@pytest.mark.skipif(shutil.which("pdsh") is not None, reason="pdsh is installed")
def test_without_pdsh_deepspeed_does_not_start_other_nodes(installed, hostfile):
    options = ["--device=cpu", "--ds_config=ds_configs/cpu_no_compiler.json"]
    done = launch(*options, "--hostfile", hostfile, VIRTUAL_ENV=installed)
    assert done.returncode == 2
    assert "pdsh, which is not installed" in done.stderr


@pytest.fixture
def batch_job(tmp_path):
    """Starts scripts/slurm.sbatch where SLURM's commands note how they are called."""
    note = f'#!/bin/sh\necho "$(basename $0) $*" >>{tmp_path}/calls\n'
    wait = f"while [ ! -e {tmp_path}/end ]; do sleep 0.05; done\n"
    ends = {
        "srun": wait + f"exit $(cat {tmp_path}/end)",
        "scancel": f"echo 75 >{tmp_path}/end",
        "scontrol": "",
    }
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
    (folder / "end").write_text("3")
    assert process.wait(timeout=60) == 3
    assert len((folder / "calls").read_text().splitlines()) == 1


def test_a_batch_job_that_is_done_after_the_warning_is_not_queued_again(batch_job):
    process, folder = batch_job
    (folder / "scancel").write_text(f"#!/bin/sh\necho 0 >{folder}/end\n")
    process.send_signal(signal.SIGUSR1)
    assert process.wait(timeout=60) == 0
    assert len((folder / "calls").read_text().splitlines()) == 1


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def losses_of_one(inputs):
    """Returns the losses of one process, under the page's torchrun command for one GPU."""
    on_page = commands("One GPU")["torchrun"]
    subprocess.run(
        runnable(on_page, inputs, tiny_job(inputs, inputs / "one"), free_port()),
        cwd=ROOT, env=environment(), check=True, capture_output=True,
    )  # fmt: skip
    return read_losses(inputs / "one")


@pytest.mark.slow
@pytest.mark.kernel
@pytest.mark.parametrize("launcher", ON_TWO_NODES)
def test_two_nodes_follow_the_losses_of_one_process(inputs, losses_of_one, tmp_path, launcher):
    """One node runs what launch.sh prints, the other what docs/clusters.md says.

    This machine is both, under two of its names.
    """
    hosts = tmp_path / "hosts"
    hosts.write_text("localhost slots=1\n127.0.0.1 slots=1\n")
    job, port = tiny_job(inputs, tmp_path / "two"), free_port()
    options = ["--launcher", launcher, "--device=cpu", "--hostfile", str(hosts)]
    by_launch = launch("--dry-run", "--node_rank=0", "--master_port", str(port), *options, *job)
    assert by_launch.returncode == 0, by_launch.stderr
    on_page = commands("Two nodes of eight GPUs")[launcher]
    by_page = shlex.join(runnable(on_page, inputs, job, port, node_rank=1, hostfile=hosts))
    running = [
        subprocess.Popen(
            node, shell=True, cwd=ROOT, env=environment(),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for node in (by_launch.stdout, by_page)
    ]  # fmt: skip
    said = [process.communicate(timeout=300)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0], "\n".join(said)
    assert len(losses_of_one) == 7
    two = read_losses(tmp_path / "two")
    assert list(two.values()) == pytest.approx(list(losses_of_one.values()), rel=1e-4)


# What srun does, after its source: it waits for signals that it has blocked; most it has sent to
# its tasks, the processes that it started and none below them; at SIGTERM it kills them.
SRUN = f"""#!{sys.executable}
import os, signal, subprocess, sys

HEARD = {{signal.SIGUSR1, signal.SIGTERM}}
signal.pthread_sigmask(signal.SIG_BLOCK, HEARD)
signal.signal(signal.SIGUSR1, signal.SIG_DFL)
num_tasks = int(sys.argv[sys.argv.index("--ntasks") + 1])
step = {{
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": os.environ["SLURM_JOB_NODELIST"],
    "SLURM_STEP_NUM_NODES": str(num_tasks),
    "SLURM_STEP_NUM_TASKS": str(num_tasks),
}}
tasks = [
    subprocess.Popen(
        sys.argv[sys.argv.index("bash") :],
        env={{**os.environ, **step, "SLURM_NODEID": str(node)}},
        start_new_session=True,
        preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, HEARD),
    )
    for node in range(num_tasks)
]
while None in [task.poll() for task in tasks]:
    if heard := signal.sigtimedwait(HEARD, 0.1):
        for task in tasks:
            task.send_signal(
                signal.SIGKILL if heard.si_signo == signal.SIGTERM else heard.si_signo
            )
sys.exit(max(task.returncode for task in tasks))
"""


def start_launch(*options, **settings):
    return subprocess.Popen(
        ["bash", "launch.sh", *options],
        cwd=ROOT, env=environment(**settings),
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def check_stopped_and_saved(process, run):
    """Checks that a run said why it stopped and saved at that step; returns its exit code."""
    said = process.communicate(timeout=STOP_WITHIN_S)[1]
    (step,) = re.findall(r"stopped by SIGUSR1 after step (\d+) of", said)
    assert (run / "checkpoints" / f"step_{int(step):08}" / "manifest.json").exists()
    assert max(read_losses(run)) <= int(step)
    assert "] Traceback" not in said  # of a rank; torchrun has one of its own
    return process.returncode


@pytest.mark.slow
@pytest.mark.kernel
@pytest.mark.parametrize(("launcher", "code"), [("deepspeed", 75), ("torchrun", 1)])
def test_slurms_warning_to_launch_stops_and_saves(installed, inputs, tmp_path, launcher, code):
    run = tmp_path / "run"
    with start_launch(
        "--launcher", launcher, "--device=cpu", "--num_gpus=2",
        *tiny_job(inputs, run, epochs=1000), VIRTUAL_ENV=installed,
    ) as process:  # fmt: skip
        try:
            wait_until_it_trains(process, run)
            process.send_signal(signal.SIGUSR1)
            assert check_stopped_and_saved(process, run) == code
        finally:
            process.terminate()


@pytest.mark.slow
@pytest.mark.kernel
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_signals_go_through_srun_to_the_ranks_of_every_node(installed, inputs, tmp_path, number):
    """In a job's shell launch.sh calls srun, which calls launch.sh on two nodes of one rank."""
    run = tmp_path / "run"
    for name, content in (("srun", SRUN), ("scontrol", "#!/bin/sh\nprintf 'localhost\\n::1\\n'\n")):
        (tmp_path / name).write_text(content)
        (tmp_path / name).chmod(0o755)
    slurm = {**SLURM_JOB, "SLURM_GPUS_ON_NODE": "1", "VIRTUAL_ENV": installed}
    with start_launch(
        "--launcher=torchrun", "--device=cpu", "--master_port", str(free_port()),
        *tiny_job(inputs, run, epochs=1000),
        **slurm, PATH=f"{tmp_path}:{environment()['PATH']}",
    ) as process:  # fmt: skip
        try:
            wait_until_it_trains(process, run)
            process.send_signal(number)
            assert check_stopped_and_saved(process, run) == 1
        finally:
            process.terminate()
