"""AdamW on packed classifier rows: DeepSpeed's CPUAdam kernel, or the same arithmetic in torch.

The table packs the rows of a step into contiguous fp32 buffers; this module updates them in place.
Cost: 28 bytes of memory traffic per element (read rows, gradients and two moments; write rows and
moments), no communication.

Bias correction is folded into the learning rate and epsilon here, so the kernel's own step counter
plays no part: the counter multiplies up powers of beta in fp32 while the steps are consecutive but
recomputes them after a jump, which would make a resumed run differ in the last bit.

Decay is decoupled and falls on the rows of the step only: over a run a label's row decays in
proportion to how often the label is in a pool.

Source: Loshchilov and Hutter, "Decoupled weight decay regularization", ICLR 2019; ZeRO-Offload's
CPUAdam (Ren et al., USENIX ATC 2021).

Shape legend: R rows, D width.
"""

from __future__ import annotations

import contextlib
import glob
import math
import os
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from filelock import FileLock
from torch import Tensor

from unidec_ds.errors import UserError
from unidec_ds.extensions import compiler, remember_cpu_flags, use_own_build_folder

KernelName = Literal["cpu_adam", "torch"]
PackedStep = Callable[[Tensor, Tensor, Tensor, Tensor, float, float, float], None]

_KERNEL_ID = 0x0DEC  # DeepSpeed numbers its own optimizers 0, 1, 2, ... in the same map
_ABANDONED_AFTER_S = 300.0


class RowAdam:
    """AdamW (Adam with decoupled weight decay) on packed rows.

    Args:
        betas: decay rates of the first and second moment.
        eps: added to the root of the bias-corrected second moment.
        weight_decay: each call multiplies the rows by 1 - lr * weight_decay.
        kernel: "cpu_adam" for DeepSpeed's kernel (host memory), "torch" for torch on any device.
    """

    def __init__(
        self, *, betas: tuple[float, float], eps: float, weight_decay: float, kernel: KernelName
    ) -> None:
        self.betas, self.eps, self.weight_decay = betas, eps, weight_decay
        self.kernel = kernel
        self._update: PackedStep = self._torch_update
        if kernel == "cpu_adam":
            module = load_cpu_adam()
            if module is None:
                self.kernel = "torch"
            else:
                self._module = module
                self._update = self._cpu_adam_update

    def step(
        self,
        rows_RD: Tensor,
        grads_RD: Tensor,
        exp_avg_RD: Tensor,
        exp_avg_sq_RD: Tensor,
        *,
        lr: float,
        step: int | Tensor,
    ) -> None:
        """Updates rows and both moments in place. All fp32, contiguous, on one device.

        Args:
            rows_RD: the rows.
            grads_RD: their gradient, unchanged.
            exp_avg_RD: first moment, zeros before the first update.
            exp_avg_sq_RD: second moment, zeros before the first update.
            lr: learning rate.
            step: 1 for the first update. An integer corrects the bias of every row alike and
                equals `torch.optim.AdamW` on the touched rows. An integer tensor [R] or [R, 1]
                corrects each row by the number of its own updates; epsilon is then added to the
                root of the *uncorrected* second moment, as `torch.optim.SparseAdam` does.
        """
        for tensor in (rows_RD, grads_RD, exp_avg_RD, exp_avg_sq_RD):
            # The kernel works on a private copy of anything else, without a word.
            assert tensor.dtype == torch.float32
            assert tensor.is_contiguous()
            assert tensor.shape == rows_RD.shape
        if not rows_RD.numel():
            return
        if isinstance(step, int):
            correction1 = 1.0 - self.betas[0] ** step
            correction2 = math.sqrt(1.0 - self.betas[1] ** step)
            step_size, eps = lr * correction2 / correction1, self.eps * correction2
            keep = 1.0 - lr * self.weight_decay
            self._update(rows_RD, grads_RD, exp_avg_RD, exp_avg_sq_RD, step_size, eps, keep)
            return
        old_RD = rows_RD.clone()
        self._update(rows_RD, grads_RD, exp_avg_RD, exp_avg_sq_RD, lr, self.eps, 1.0)
        steps_R1 = step.reshape(-1, 1).double()
        scale_R1 = (1.0 - self.betas[1] ** steps_R1).sqrt() / (1.0 - self.betas[0] ** steps_R1)
        rows_RD.sub_(old_RD).mul_(scale_R1.float())
        rows_RD.add_(old_RD, alpha=1.0 - lr * self.weight_decay)

    def _torch_update(
        self, rows: Tensor, grads: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor,
        step_size: float, eps: float, keep: float,
    ) -> None:  # fmt: skip
        """Moments, then rows <- keep * rows - step_size * exp_avg / (sqrt(exp_avg_sq) + eps)."""
        beta1, beta2 = self.betas
        exp_avg.mul_(beta1).add_(grads, alpha=1.0 - beta1)
        exp_avg_sq.mul_(beta2).addcmul_(grads, grads, value=1.0 - beta2)
        rows.mul_(keep).addcdiv_(exp_avg, exp_avg_sq.sqrt().add_(eps), value=-step_size)

    def _cpu_adam_update(
        self, rows: Tensor, grads: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor,
        step_size: float, eps: float, keep: float,
    ) -> None:  # fmt: skip
        """The same by the kernel, whose decay is `step_size * weight_decay`. Holds the GIL."""
        assert rows.device.type == "cpu"
        weight_decay = (1.0 - keep) / step_size if step_size else 0.0
        self._module.adam_update(
            _KERNEL_ID, 1, step_size, *self.betas, eps, weight_decay, False,
            rows, grads, exp_avg, exp_avg_sq,
        )  # fmt: skip


_loaded: list[Any] = []  # at most one element: the kernel's module, or None without a compiler


def load_cpu_adam() -> Any | None:
    """Returns DeepSpeed's CPUAdam extension, building it if this machine never has.

    The first build takes about 90 s and says so on stderr. Ranks that need it at once wait for one
    another on a lock that dies with its holder, and a build folder that a killed process left
    locked is taken over.

    Returns:
        The extension module, or None (after one warning) where there is no C++ compiler or ninja.

    Raises:
        UserError: the build fails.
    """
    if not _loaded:
        _loaded.append(_build_cpu_adam())
    return _loaded[0]


def _build_cpu_adam() -> Any | None:
    from torch.utils.cpp_extension import _get_build_directory, is_ninja_available

    use_own_build_folder()
    remember_cpu_flags()
    if compiler() is None or not is_ninja_available():
        warnings.warn(
            f"NO C++ COMPILER ({os.environ.get('CXX', 'c++')}) OR NO ninja ON THIS MACHINE: "
            "DeepSpeed's CPUAdam kernel cannot be built, so classifier rows are updated by torch, "
            "at about half the speed. "
            "Install g++ and ninja, or set classifier.kernel: torch to choose this.",
            stacklevel=2,
        )
        return None
    from deepspeed.ops.op_builder import CPUAdamBuilder

    folder = Path(_get_build_directory("cpu_adam", verbose=False))
    with FileLock(folder.parent / "unidec_ds_cpu_adam.lock"):
        if not _is_built(folder):
            print("building DeepSpeed's CPUAdam kernel (once, about 90 s)", file=sys.stderr)
        _wait_for_other_build(folder / "lock")
        try:
            module = CPUAdamBuilder().load(verbose=False)
        except Exception as error:
            raise UserError(
                f"DeepSpeed's CPUAdam kernel could not be built in {folder}: {error}\n"
                "A working C++ compiler that fits this torch is needed. Repair it, delete that "
                "folder and try again, or set classifier.kernel: torch."
            ) from error
    module.create_adam(_KERNEL_ID, 1e-3, 0.9, 0.999, 1e-8, 0.0, True, False)
    return module


def _is_built(folder: Path) -> bool:
    """Returns whether the folder holds the kernel for this torch; environments share the folder."""
    recipe = folder / "build.ninja"
    this_torch = str(Path(torch.__file__).parent / "include")
    return (folder / "cpu_adam.so").exists() and this_torch in recipe.read_text()


def _wait_for_other_build(lock: Path) -> None:
    """Waits while another program builds in the folder; removes the lock of one that was killed.

    torch's lock is a file that exists as long as somebody builds, and torch waits for ever on one
    whose maker was killed.
    """
    announced = False
    while lock.exists():
        try:
            age_s = time.time() - lock.stat().st_mtime
        except FileNotFoundError:
            return
        if age_s > _ABANDONED_AFTER_S and not _is_open_somewhere(lock):
            print(f"taking over the abandoned build lock {lock}", file=sys.stderr)
            lock.unlink(missing_ok=True)
            return
        if not announced:
            print(f"waiting for the build that holds {lock}", file=sys.stderr)
            announced = True
        time.sleep(0.2)


def _is_open_somewhere(path: Path) -> bool:
    """Returns whether a process of this machine and user has the file open."""
    for descriptor in glob.iglob("/proc/[0-9]*/fd/*"):
        with contextlib.suppress(OSError):  # the process ended, or is another user's
            if os.readlink(descriptor) == str(path.resolve()):
                return True
    return False
