"""What the engine does to the process it runs in."""

import platform
import subprocess
import sys
from pathlib import Path

import cpuinfo
import pytest
from deepspeed.ops.op_builder import CPUAdamBuilder

from unidec_ds.ds_config import load_ds_config
from unidec_ds.engine import check_launch
from unidec_ds.errors import UserError
from unidec_ds.extensions import remember_cpu_flags

CPU = Path(__file__).parents[1] / "ds_configs" / "cpu.json"
COUNT_FAULTS = """
import resource
import torch
from unidec_ds.engine import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        torch.empty(64 << 20, dtype=torch.uint8).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
given_back = faults()
keep_freed_memory()
faults()
print(given_back, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="sets glibc's malloc")
def test_freed_memory_is_used_again_without_page_faults():
    done = subprocess.run(
        [sys.executable, "-c", COUNT_FAULTS], capture_output=True, text=True, check=True
    )
    given_back, kept = map(int, done.stdout.split())
    assert given_back > 4 * 32  # huge pages at the best: 32 a tensor
    assert kept < given_back / 10


def test_the_cpus_flags_are_asked_for_once_for_all_kernels(monkeypatch):
    ask, answers = cpuinfo.get_cpu_info, []
    monkeypatch.setattr(cpuinfo, "get_cpu_info", lambda: answers.append(ask()) or answers[-1])
    for _ in range(2):
        remember_cpu_flags()
        assert CPUAdamBuilder().cpu_arch().startswith(("-march", "-mcpu"))
        assert CPUAdamBuilder().simd_width().startswith("-D__")
    assert len(answers) == 1
    assert answers[0]["arch"]


@pytest.fixture
def no_launcher(monkeypatch):
    for name in ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.mark.parametrize("name", ["SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
def test_tasks_that_no_launcher_has_made_ranks_do_not_train_each_alone(no_launcher, name):
    ds_config = load_ds_config(CPU, batch_size=8, world_size=1)
    no_launcher.setenv(name, "1")
    check_launch(ds_config, batch_size=8)
    no_launcher.setenv(name, "8")
    with pytest.raises(UserError, match=rf"8 processes were started \({name}\).*launch\.sh"):
        check_launch(ds_config, batch_size=8)
    no_launcher.setenv("WORLD_SIZE", "2")  # by torchrun, in one of the tasks
    check_launch(ds_config, batch_size=8)
