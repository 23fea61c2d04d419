"""Where DeepSpeed's kernels are compiled, whether they can be, and what loading one asks for.

PyTorch keeps compiled extensions in one folder per user and Python version; two virtual
environments would then rebuild each other's kernels at every start. Each environment gets its own.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import shutil
import sys
from functools import cache
from pathlib import Path
from typing import Any


def use_own_build_folder() -> Path:
    """Returns the folder for compiled kernels; TORCH_EXTENSIONS_DIR, if set, stays in force.

    Also puts this environment's ninja first on the PATH, activated or not: another version of it
    would take what is built for stale and build it again.
    """
    scripts, path = str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)
    if path.split(os.pathsep)[0] != scripts:
        os.environ["PATH"] = os.pathsep.join([scripts, path])
    environment = hashlib.sha256(sys.prefix.encode()).hexdigest()[:8]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "unidec_ds" / f"kernels-{environment}"
    return Path(os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(folder)))


def remember_cpu_flags() -> None:
    """Lets a process find out its CPU's flags once, before any kernel is loaded.

    DeepSpeed asks py-cpuinfo up to twice for each kernel, built already or not, and each answer
    comes from an interpreter of its own that takes a second.
    """
    try:
        cpuinfo: Any = importlib.import_module("cpuinfo")
    except ImportError:  # DeepSpeed has another way then
        return
    if not hasattr(cpuinfo.get_cpu_info, "cache_info"):
        cpuinfo.get_cpu_info = cache(cpuinfo.get_cpu_info)


def compiler() -> str | None:
    """Returns the C++ compiler's path, None where there is none."""
    return shutil.which(os.environ.get("CXX", "c++"))
