"""AdamW with one second moment a row and no first moment, on packed classifier rows.

The second moment is of a row's mean squared gradient, so a row's step keeps its gradient's
direction, and a label costs 4 bytes beside its row. In `rows.c` it is one pass over rows and
gradients: 12 bytes of memory traffic per element; in torch, on any device, about five passes.

Source: row-wise second moment as in Shazeer and Stern's Adafactor (arXiv 1804.04235), decoupled
decay as in Loshchilov and Hutter (ICLR 2019); the combination is ours.

Shape legend: R rows, D width.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from unidec_ds.classifier.native import address


class RowwiseAdam:
    """Row-wise AdamW.

    Args:
        beta2: decay rate of the second moment.
        eps: added to the root of the bias-corrected second moment.
        weight_decay: each call multiplies the rows by 1 - lr * weight_decay.
        native: the compiled `rows.c`, for tensors in host memory; None for torch.
    """

    def __init__(
        self, *, beta2: float, eps: float, weight_decay: float, native: ctypes.CDLL | None
    ) -> None:
        self.beta2, self.eps, self.weight_decay = beta2, eps, weight_decay
        self._native = native

    def step(
        self,
        rows_RD: Tensor,
        grads_RD: Tensor,
        exp_avg_sq_R1: Tensor,
        *,
        lr: float,
        step: int | Tensor,
    ) -> None:
        """Updates rows and second moments in place. All fp32, contiguous, on one device.

        Args:
            rows_RD: the rows.
            grads_RD: their gradient, unchanged.
            exp_avg_sq_R1: second moment of each row, zero before its first update.
            lr: learning rate.
            step: 1 for the first update; corrects the bias of every row alike. An integer tensor
                [R] or [R, 1] corrects each row by the number of its own updates.
        """
        for tensor in (rows_RD, grads_RD, exp_avg_sq_R1):
            assert tensor.dtype == torch.float32
            assert tensor.is_contiguous()
        assert rows_RD.shape == grads_RD.shape
        assert exp_avg_sq_R1.shape == (len(rows_RD), 1)
        if not rows_RD.numel():
            return
        steps = torch.as_tensor(step, dtype=torch.float64, device=rows_RD.device).reshape(-1, 1)
        corrections = (1.0 - self.beta2**steps).float()
        keep = 1.0 - lr * self.weight_decay
        if self._native is not None:
            self._native.step_rowwise(
                *map(address, (rows_RD, grads_RD, exp_avg_sq_R1, corrections)),
                int(len(corrections) > 1),
                *rows_RD.shape,
                *(self.beta2, self.eps, lr, keep),
            )
            return
        mean_square_R1 = grads_RD.square().mean(1, keepdim=True)
        exp_avg_sq_R1.mul_(self.beta2).add_(mean_square_R1, alpha=1.0 - self.beta2)
        rate_R1 = lr / (exp_avg_sq_R1 / corrections).sqrt_().add_(self.eps)
        rows_RD.mul_(keep).addcmul_(grads_RD, rate_R1, value=-1.0)
