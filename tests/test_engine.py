"""What the engine does to the process it runs in."""

import platform
import subprocess
import sys

import cpuinfo
import pytest
from deepspeed.ops.op_builder import CPUAdamBuilder

from unidec_ds.extensions import remember_cpu_flags

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
