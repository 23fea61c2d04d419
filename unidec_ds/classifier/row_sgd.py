"""SGD with momentum on packed classifier rows, as Renee trains its classifier.

One state per row, the momentum. Cost: 20 bytes of memory traffic per element (read rows, gradients
and momentum; write rows and momentum), no communication. Only a step's rows move: the momentum of
the others waits, so with a pool that is not `all` it is no longer torch's SGD of the whole matrix.

Source: `torch.optim.SGD`, which it equals; Jain et al., "Renee", MLSys 2023.

Shape legend: R rows, D width.
"""

from __future__ import annotations

from torch import Tensor


class RowSGD:
    """SGD with momentum on packed rows.

    Args:
        momentum: decay rate of the momentum, 0 for plain gradient descent.
        weight_decay: added to the gradient as `weight_decay` times the row (coupled, unlike
            AdamW's), before the momentum.
    """

    def __init__(self, *, momentum: float, weight_decay: float) -> None:
        self.momentum, self.weight_decay = momentum, weight_decay

    def step(self, rows_RD: Tensor, grads_RD: Tensor, momentum_RD: Tensor, *, lr: float) -> None:
        """Updates rows and momentum in place; the gradient is left unchanged.

        Args:
            rows_RD: the rows, fp32.
            grads_RD: their gradient.
            momentum_RD: zeros before the first update.
            lr: learning rate.
        """
        momentum_RD.mul_(self.momentum).add_(grads_RD)
        if self.weight_decay:
            momentum_RD.add_(rows_RD, alpha=self.weight_decay)
        rows_RD.add_(momentum_RD, alpha=-lr)
