"""The table's own C code, `rows.c`: built with the system's compiler in about a second, and loaded.

It serves host memory where DeepSpeed's kernel, which needs a compiler too, is the chosen one.
`row_copy` and `row_adam` call it; both can do without.
"""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import tempfile
import warnings
from functools import lru_cache
from hashlib import sha256
from pathlib import Path

from torch import Tensor

_SOURCE = Path(__file__).with_name("rows.c")
# Without contraction: a fused multiply-add, where there is one, would round otherwise.
_FLAGS = ("-O3", "-std=gnu11", "-ffp-contract=off", "-fopenmp", "-shared", "-fPIC")
_LONG, _FLOAT, _POINTER = ctypes.c_long, ctypes.c_float, ctypes.c_void_p


class Move(ctypes.Structure):
    """One column of a call that moves rows; `struct move` of the C code."""

    _fields_ = (
        ("column", _POINTER),
        ("packed", _POINTER),
        ("width", _LONG),
        ("rounding", _LONG),
    )


@lru_cache(maxsize=1)
def native_library() -> ctypes.CDLL | None:
    """Returns the compiled `rows.c`, built if this machine never has, or None where it cannot be.

    A failed build warns once: torch then does the same, more slowly.
    """
    from torch.utils.cpp_extension import _get_build_directory

    made_from = "\0".join([platform.machine(), *_FLAGS, _SOURCE.read_text(encoding="utf-8")])
    name = f"rows_{sha256(made_from.encode()).hexdigest()[:16]}.so"
    try:
        folder = Path(_get_build_directory("unidec_ds_rows", verbose=False))
        if not (folder / name).exists():
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                built = Path(scratch) / name
                command = [os.environ.get("CC", "cc"), *_FLAGS, "-o", str(built), str(_SOURCE)]
                subprocess.run([*command, "-lm"], text=True, capture_output=True, check=True)
                built.replace(folder / name)  # atomic: ranks may build it at once
        library = ctypes.CDLL(str(folder / name))
    except (OSError, subprocess.CalledProcessError) as error:
        details = getattr(error, "stderr", "") or ""
        warnings.warn(
            f"the classifier's own C code could not be compiled, so torch does its work, more "
            f"slowly: {error} {details}",
            stacklevel=2,
        )
        return None
    library.gather.argtypes = (ctypes.POINTER(Move), _LONG, _POINTER, _LONG)
    library.scatter.argtypes = (*library.gather.argtypes, _POINTER, _POINTER)
    library.step_rowwise.argtypes = (*[_POINTER] * 4, *[_LONG] * 3, *[_FLOAT] * 4)
    library.gather.restype = library.scatter.restype = library.step_rowwise.restype = None
    return library


def address(tensor: Tensor) -> ctypes.c_void_p:
    """Returns where a tensor's elements lie; it must be in host memory and contiguous."""
    assert tensor.device.type == "cpu"
    assert tensor.is_contiguous()
    return ctypes.c_void_p(tensor.data_ptr())
