"""The classifier's loss and update in one pass over blocks of labels: what `pool: all` needs.

The plain path holds the rows of the whole pool and their gradient, 8·P·D bytes beside the table;
with every label in the pool that is the classifier over again, twice. Here a block of labels is
fetched, scored and updated before the next is fetched:

1. the block's rows come from the table;
2. its share of the loss, and the gradients of the queries and of its rows;
3. the queries' gradient is added up, [B, D]; it is of the rows as they were, before their update;
4. the rows are updated with their gradient, which is forgotten.

What is returned has the loss as its value and the sum of 3 as its gradient, so the trainer's
backward pass goes on through gather and encoder as it always does. The result is that of the plain
path to rounding; row gradients need no scaling, as no engine has scaled this loss.

Only for losses whose blocks do not meet: binary cross-entropy. A softmax would need its denominator
over all blocks first, a second pass over the table.

Non-finite numbers. The plain path updates no row of a step that is not finite. Here earlier blocks
are updated before later ones are computed, so what holds is:

- queries that are not finite (an encoder that diverged) stop every rank before any update: all
  ranks see the same queries;
- a block whose loss or row gradient is not finite is not updated, nor is any later block of this
  rank; this rank's share is then NaN, the summed loss is NaN on every rank, and all stop before the
  encoder's backward pass. Earlier blocks, and other ranks' blocks, have moved by then;
- a gradient norm of the encoder that is not finite is found after every row has been updated.

In each case nothing is saved, and a resume starts from the last checkpoint, which is untouched.

Source: Jain et al., "Renee: end-to-end training of extreme classification models", MLSys 2023.
Cost: 3 matrix products of 2·B·P·D FLOPs; memory for one block: its rows, two gradients, and two
blocks of logits. No communication beyond the plain path's.

Shape legend: B queries of the global batch, D width, P labels of this rank, p labels of one block.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from unidec_ds.classifier.table import ClassifierTable
from unidec_ds.data.pairs import Ids
from unidec_ds.losses import HeadLoss
from unidec_ds.targets import Targets

BlockLoss = Callable[[Tensor, Tensor, Targets], HeadLoss]


def block_size(num_queries: int, width: int, block_bytes: int) -> int:
    """Returns how many labels make a block: neither its logits nor its rows exceed the bytes."""
    return max(1, block_bytes // (4 * max(num_queries, width)))


def train_by_block(
    table: ClassifierTable,
    label_ids: Ids,
    queries_BD: Tensor,
    targets: Targets,
    block_loss: BlockLoss,
    *,
    size: int,
    weight: float,
    lr: float,
) -> HeadLoss:
    """Returns the classifier's share of the loss, having updated its rows.

    Args:
        table: takes one step.
        label_ids: int64 [P], ascending, this rank's labels of the pool.
        queries_BD: all queries of the global batch, the same on every rank; the result's gradient
            goes to them.
        targets: the pairs of the P labels.
        block_loss: the loss of queries [B, D] and rows [p, D]; over the blocks it adds up.
        size: p.
        weight: of this loss in the total; the row gradients are multiplied by it, the result is
            not.
        lr: of the rows.
    """
    leaf_BD = queries_BD.detach().requires_grad_()
    sums_3 = torch.zeros(3, device=queries_BD.device)
    parts = targets.split(size)
    blocks = [label_ids[start : start + size] for start in range(0, len(parts) * size, size)]
    finite = bool(leaf_BD.isfinite().all())
    for k, (ids, part) in enumerate(zip(blocks, parts, strict=True)):
        if not finite:
            break
        rows_pD = table.fetch(ids)
        if k + 1 < len(blocks):
            table.fetch_ahead(blocks[k + 1])
        with torch.enable_grad():
            loss = block_loss(leaf_BD, rows_pD, part)
        loss.total.backward()
        sums_3 += torch.stack([loss.total.detach(), loss.q2l, loss.l2q])
        finite = _is_finite(loss.total, rows_pD.grad)  # waits for the device
        if finite:
            if rows_pD.grad is not None and weight != 1:
                rows_pD.grad.mul_(weight)
            table.apply(rows_pD, lr=lr, begins_step=k == 0)
    if not finite:
        sums_3.fill_(math.nan)
    gradient_BD = torch.zeros_like(leaf_BD) if leaf_BD.grad is None else leaf_BD.grad
    total, q2l, l2q = sums_3.unbind()
    with_gradient = _WithGradient.apply(  # type: ignore[no-untyped-call]
        queries_BD, total, gradient_BD
    )
    return HeadLoss(with_gradient, q2l, l2q)


def _is_finite(loss: Tensor, gradient: Tensor | None) -> bool:
    checks = [loss.detach()]
    if gradient is not None:
        checks.append(torch.linalg.vector_norm(gradient))
    return bool(torch.stack(checks).isfinite().all())


class _WithGradient(torch.autograd.Function):
    """A value whose gradient by the queries is known already."""

    @staticmethod
    def forward(ctx: Any, queries_BD: Tensor, value: Tensor, gradient_BD: Tensor) -> Tensor:
        ctx.save_for_backward(gradient_BD)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (gradient_BD,) = ctx.saved_tensors
        return grads[0] * gradient_BD, None, None
