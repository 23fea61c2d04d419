"""docs/clusters.md: what it says is printed is printed, and what it says to run runs.

Its commands for eight GPUs run in test_launchers.py, those for two nodes in test_launch_script.py,
with torchrun's for one GPU as what they are compared with.
"""

import re
import subprocess
from pathlib import Path

import pytest
from clusters_page import LAUNCHERS, commands, options, runnable, section
from launching import ROOT, environment, printed, tiny_job
from ranks import free_port
from tiny import make_inputs
from training import read_losses

ONE, EIGHT, TWO_NODES = "One GPU", "Eight GPUs", "Two nodes of eight GPUs"
# What launch.sh spells out and the page leaves to the launcher, or to the place where it runs.
SPELLED_OUT = {
    "deepspeed": {"--quiet", "--master_port"},
    "torchrun": {"--nnodes", "--master_addr", "--master_port"},
    "accelerate": {"--mixed_precision", "--dynamo_backend", "--main_process_port"},
}


def compare(launcher, on_page, command):
    """Checks that a printed command has all of the page's options and spells out only defaults."""
    page, is_printed = options(on_page), options(command)
    is_printed.pop("--recipe")
    assert {name: is_printed.get(name) for name in page} == page
    assert is_printed.keys() - page.keys() <= SPELLED_OUT[launcher]


@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize(("title", "given"), [(ONE, []), (EIGHT, ["--num_gpus", "8"])])
def test_the_page_gives_what_launch_prints_for_one_node(launcher, title, given):
    assert f"`bash launch.sh {' '.join([*given, ''])}".rstrip() in section(title)
    (command,) = printed("--device=gpu", "--launcher", launcher, *given)
    compare(launcher, commands(title)[launcher], command)


@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize("node_rank", [0, 1])
def test_the_page_gives_what_launch_prints_for_two_nodes(
    tmp_path, monkeypatch, launcher, node_rank
):
    (hosts,) = re.findall(r"(?s)```\n(.*?)```", section(TWO_NODES))
    (tmp_path / "hosts").write_text(hosts)
    given = ["--hostfile", f"{tmp_path}/hosts", "--launcher", launcher]
    (command,) = printed("--device=gpu", *given, "--node_rank", str(node_rank))
    on_page = commands(TWO_NODES)[launcher].replace(" K ", f" {node_rank} ")
    on_page = on_page.replace("is_host=H", f"is_host={'false' if node_rank else 'true'}")
    compare(launcher, on_page.replace("--hostfile hosts", f"--hostfile {tmp_path}/hosts"), command)


def test_the_page_gives_what_launch_prints_with_pdsh(tmp_path):
    (left_out,) = re.findall(r"the same without `([^`]+)`", section(TWO_NODES))
    on_page = commands(TWO_NODES)["deepspeed"].replace(f" {left_out}", "")
    assert on_page != commands(TWO_NODES)["deepspeed"]
    (tmp_path / "hosts").write_text("node1 slots=8\nnode2 slots=8\n")
    (command,) = printed("--device=gpu", "--hostfile", f"{tmp_path}/hosts")
    compare("deepspeed", on_page.replace(" hosts ", f" {tmp_path}/hosts "), command)


def test_the_batch_script_without_launch_starts_torchrun_as_on_two_nodes():
    (block,) = (b for b in re.findall(r"(?s)```\n(.*?)```", section("SLURM")) if "torchrun" in b)
    srun, torchrun = block.replace("\\\n", "").split(" torchrun ")
    assert '--cpus-per-task="$SLURM_CPUS_PER_TASK"' in srun
    slurm = {"$head": "node1", "$SLURM_JOB_NUM_NODES": "2", "$SLURM_JOB_ID": "unidec_ds"}
    for name, value in slurm.items():
        torchrun = torchrun.replace(name, value)
    on_two_nodes = options(commands(TWO_NODES)["torchrun"])
    del on_two_nodes["--rdzv_conf"]  # torchrun finds it out itself by names that it can resolve
    assert options(f"torchrun {torchrun}") == on_two_nodes


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"))


def train(command, run):
    done = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(read_losses(run)) == 7


@pytest.mark.slow
@pytest.mark.kernel
@pytest.mark.parametrize("launcher", ["deepspeed", "accelerate"])
def test_the_commands_for_one_gpu_train(inputs, tmp_path, launcher):
    job = tiny_job(inputs, tmp_path / "run")
    train(runnable(commands(ONE)[launcher], inputs, job, free_port()), tmp_path / "run")


@pytest.mark.slow
@pytest.mark.kernel
def test_the_accelerate_config_without_a_gpu_trains_as_it_says(inputs, tmp_path):
    path = Path("ds_configs/accelerate_cpu.yaml")
    command, *_ = re.findall(r"(?m)^# (accelerate launch .*) \.\.\.$", (ROOT / path).read_text())
    words = command.split()
    job = tiny_job(inputs, tmp_path / "run")
    without_ds_config = [*job[: job.index("--ds_config")], *job[job.index("--ds_config") + 2 :]]
    words[2:2] = ["--main_process_port", str(free_port())]
    assert f"{words[-2]} {words[-1]}" == "--ds_config ds_configs/cpu.json"
    train([*words, *without_ds_config], tmp_path / "run")
