"""The heavy part of every loss: label blocks of logits that are reduced and forgotten.

Two autograd functions, `NegativeLogsumexp` (softmax, decoupled, balanced) and `CrossEntropy`
(bce), walk over blocks of labels. A block is label-major, [p, B] and contiguous, so that it is
one GEMM into one buffer, a pair is a flat index, and a label's slice of the gradient is written
once. Positives are read out, then positives and ignored pairs are struck out; what the functions
return has the size of a side or of the pairs, and `losses` does the rest by plain autograd.

Cost: 3 GEMMs of 2·B·P·D FLOPs when the whole of the logits fits one block, and always for bce;
otherwise 4, as the backward pass of a log-sum-exp computes each block anew. Memory: up to three
blocks beside the inputs and their gradients, never B·P. Everything in the dtype of the inputs.

Shape legend: B queries of the global batch, P pool labels of this rank, p labels of one block,
D width, M positive pairs of this rank, G ignored pairs of this rank.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from unidec_ds.targets import Targets


def negative_logsumexp(
    queries_BD: Tensor,
    labels_PD: Tensor,
    targets: Targets,
    *,
    temperature: float,
    l2q: bool,
    block_bytes: int,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns the positives' logits and the log-sum-exp of the negatives' logits; differentiable.

    A pair is negative unless `targets` lists it. When no logit can be large (cosines, small
    rows), one exp without a maximum serves both directions, and the backward pass too; finding
    that out waits for the device once, and several blocks once more.

    Args:
        queries_BD: [B, D], on the device and in the dtype of the work.
        labels_PD: [P, D].
        targets: the positives and the ignored pairs.
        temperature: factor of the logits.
        l2q: whether to reduce over queries as well.
        block_bytes: most bytes of one block; a pool that fits is kept for the backward pass.

    Returns:
        The logit of each positive, [M]; each query's log-sum-exp over this rank's labels, [B];
        each label's over all queries, [P], or None without `l2q`. -inf where there is no
        negative: the gradient that comes in there must be 0.
    """
    return _NegativeLogsumexp.apply(  # type: ignore[no-any-return, no-untyped-call]
        queries_BD, labels_PD, targets, temperature, l2q, block_bytes
    )


def cross_entropy(
    queries_BD: Tensor,
    labels_PD: Tensor,
    targets: Targets,
    *,
    temperature: float,
    weight_B: Tensor,
    weight_P: Tensor | None,
    block_bytes: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns sums of the binary cross-entropy over this rank's pairs, weighted by side.

    Every pair's gradient is known without any other pair, so the inputs' gradients are made
    block by block in the forward pass and no block is computed twice.

    Args:
        queries_BD: [B, D], on the device and in the dtype of the work.
        labels_PD: [P, D].
        targets: the positives and the ignored pairs; the latter count nothing.
        temperature: factor of the logits.
        weight_B: weight of each query's pairs in the first direction.
        weight_P: weight of each label's pairs in the second, or None without it.
        block_bytes: most bytes of one block.

    Returns:
        Scalars: the sum of both directions, differentiable by queries and labels; the sum by
        query; the sum by label. The latter two are detached.
    """
    return _CrossEntropy.apply(  # type: ignore[no-any-return, no-untyped-call]
        queries_BD, labels_PD, targets, temperature, weight_B, weight_P, block_bytes
    )


class _NegativeLogsumexp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        queries_BD: Tensor,
        labels_PD: Tensor,
        targets: Targets,
        temperature: float,
        l2q: bool,
        block_bytes: int,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        blocks, buffer = _plan_blocks(queries_BD, labels_PD, targets, block_bytes)
        small = _logits_are_small(queries_BD, labels_PD, temperature)
        scores_M = queries_BD.new_empty(len(targets.positive_query))
        rows_B = queries_BD.new_full((len(queries_BD),), -math.inf)
        columns_P = queries_BD.new_empty(len(labels_PD)) if l2q else None
        for block in blocks:
            logits_pB = _logits(queries_BD, labels_PD[block.labels], temperature, buffer)
            scores_M[block.pairs] = logits_pB.view(-1)[block.positive]
            if small:
                values_pB = block.fill(logits_pB.exp_(), 0)
            else:
                values_pB = block.fill(logits_pB, -math.inf)
            rows_B = torch.logaddexp(rows_B, _logsumexp(values_pB, 0, small))
            if columns_P is not None:
                columns_P[block.labels] = _logsumexp(values_pB, 1, small)
        kept_PB = buffer if len(blocks) == 1 else None
        ctx.save_for_backward(queries_BD, labels_PD, rows_B, columns_P, kept_PB)
        ctx.blocks, ctx.temperature, ctx.small = blocks, temperature, small
        ctx.buffer_shape = buffer.shape
        return scores_M, rows_B, columns_P

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        queries_BD, labels_PD, rows_B, columns_P, kept_PB = ctx.saved_tensors
        grad_scores_M, grad_rows_B, grad_columns_P = grads
        gradients = _Gradients(ctx, queries_BD, labels_PD, ctx.temperature)
        buffer = queries_BD.new_empty(ctx.buffer_shape) if kept_PB is None else None
        for block in ctx.blocks:
            values_pB = kept_PB
            if buffer is not None:
                labels_pD = labels_PD[block.labels]
                values_pB = _logits(queries_BD, labels_pD, ctx.temperature, buffer)
                if ctx.small:
                    values_pB.exp_()
            sides = [(rows_B, grad_rows_B)]
            if columns_P is not None:
                sides.append((columns_P[block.labels, None], grad_columns_P[block.labels, None]))
            grad_pB = block.fill(_logsumexp_gradient(values_pB, sides, ctx.small), 0)
            grad_pB.view(-1)[block.positive] = grad_scores_M[block.pairs]
            gradients.add(block, grad_pB)
        return gradients.of_queries_BD, gradients.of_labels_PD, None, None, None, None


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        queries_BD: Tensor,
        labels_PD: Tensor,
        targets: Targets,
        temperature: float,
        weight_B: Tensor,
        weight_P: Tensor | None,
        block_bytes: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        by_query, by_label = queries_BD.new_zeros(()), queries_BD.new_zeros(())
        gradients = _Gradients(ctx, queries_BD, labels_PD, temperature)
        blocks, buffer = _plan_blocks(queries_BD, labels_PD, targets, block_bytes)
        for block in blocks:
            logits_pB = _logits(queries_BD, labels_PD[block.labels], temperature, buffer)
            scores_m = logits_pB.view(-1)[block.positive]
            loss_pB = block.fill(softplus(logits_pB), 0)
            loss_pB.view(-1)[block.positive] = softplus(-scores_m)
            by_query += loss_pB.sum(0) @ weight_B
            if weight_P is not None:
                by_label += loss_pB.sum(1) @ weight_P[block.labels]
            if not gradients.needed:
                continue
            grad_pB = block.fill(logits_pB.sigmoid_(), 0)
            grad_pB.view(-1)[block.positive] = -torch.sigmoid(-scores_m)
            if weight_P is None:
                grad_pB *= weight_B
            else:
                grad_pB *= torch.add(weight_B, weight_P[block.labels, None], out=loss_pB)
            gradients.add(block, grad_pB)
        ctx.save_for_backward(gradients.of_queries_BD, gradients.of_labels_PD)
        ctx.mark_non_differentiable(by_query, by_label)
        return by_query + by_label, by_query, by_label

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        scaled = [None if saved is None else grads[0] * saved for saved in ctx.saved_tensors]
        return *scaled, None, None, None, None, None


@dataclass(frozen=True)
class _Block:
    """Consecutive labels whose logits [p, B] are alive at once, with their pairs.

    Args:
        labels: rows of `labels_PD`.
        pairs: their positives in the targets' order.
        positive: flat index of each into the block's logits.
        ignored: flat indices of their ignored pairs.
    """

    labels: slice
    pairs: slice
    positive: Tensor
    ignored: Tensor

    def fill(self, block_pB: Tensor, value: float) -> Tensor:
        """Writes `value` over the positive and the ignored pairs; returns `block_pB`."""
        flat = block_pB.view(-1)
        flat.index_fill_(0, self.positive, value)
        flat.index_fill_(0, self.ignored, value)
        return block_pB


def _plan_blocks(
    queries_BD: Tensor, labels_PD: Tensor, targets: Targets, block_bytes: int
) -> tuple[list[_Block], Tensor]:
    """Returns the blocks of at most `block_bytes` (or one label) and a buffer for the largest."""
    num_queries, num_labels = len(queries_BD), len(labels_PD)
    label_bytes = max(num_queries * queries_BD.element_size(), 1)
    size = min(max(block_bytes // label_bytes, 1), max(num_labels, 1))
    starts = list(range(0, num_labels, size)) or [0]
    edges = torch.tensor([*starts, num_labels])

    def pair_slices(label_M: Tensor) -> list[slice]:
        if len(starts) == 1:
            return [slice(0, len(label_M))]
        ends = torch.searchsorted(label_M, edges.to(label_M.device)).tolist()
        return [slice(a, b) for a, b in itertools.pairwise(ends)]

    positive_M = targets.positive_label * num_queries + targets.positive_query
    ignored_G = targets.ignored_label * num_queries + targets.ignored_query
    positive_slices = pair_slices(targets.positive_label)
    ignored_slices = pair_slices(targets.ignored_label)
    blocks = [
        _Block(
            labels=slice(start, min(start + size, num_labels)),
            pairs=positive,
            positive=positive_M[positive] - start * num_queries,
            ignored=ignored_G[ignored] - start * num_queries,
        )
        for start, positive, ignored in zip(starts, positive_slices, ignored_slices, strict=True)
    ]
    return blocks, queries_BD.new_empty(min(size, num_labels), num_queries)


def _logits(queries_BD: Tensor, labels_pD: Tensor, temperature: float, buffer: Tensor) -> Tensor:
    """Returns the block of logits [p, B], written into the first rows of `buffer`."""
    out_pB = buffer[: len(labels_pD)]
    return torch.addmm(out_pB, labels_pD, queries_BD.T, beta=0, alpha=temperature, out=out_pB)


def _logits_are_small(queries_BD: Tensor, labels_PD: Tensor, temperature: float) -> bool:
    """Returns whether no logit's exp can over- or underflow, by norms; waits for the device."""
    if 0 in (len(queries_BD), len(labels_PD)):
        return True
    norms = [torch.linalg.vector_norm(x, dim=1).amax() for x in (queries_BD, labels_PD)]
    limit = 0.45 * math.log(torch.finfo(queries_BD.dtype).max)
    return temperature * float(norms[0] * norms[1]) <= limit


def _logsumexp(values_pB: Tensor, dim: int, small: bool) -> Tensor:
    """Returns the log-sum-exp of logits, which are given as their exp when `small`."""
    return values_pB.sum(dim).log_() if small else values_pB.logsumexp(dim)


def _logsumexp_gradient(
    values_pB: Tensor, sides: list[tuple[Tensor, Tensor]], small: bool
) -> Tensor:
    """Returns the gradient of a block's logits: over the sides, grad · exp(logit - logsumexp).

    Args:
        values_pB: logits, or their exp when `small`.
        sides: (log-sum-exp, its gradient) of rows [B] and, with l2q, of columns [p, 1].
        small: whether exp can be taken apart.

    Returns:
        [p, B]; not a number where a side has no negative, hence only at pairs struck out.
    """
    if small:
        weights = [grad * (-total).exp() for total, grad in sides]
        if len(weights) == 1:
            return values_pB * weights[0]
        return torch.add(*weights).mul_(values_pB)
    parts = [(values_pB - total).exp_().mul_(grad) for total, grad in sides]
    return parts[0] if len(parts) == 1 else parts[0].add_(parts[1])


class _Gradients:
    """The gradients of queries [B, D] and labels [P, D], where needed, summed over blocks."""

    def __init__(self, ctx: Any, queries_BD: Tensor, labels_PD: Tensor, temperature: float) -> None:
        self._queries_BD, self._labels_PD, self._temperature = queries_BD, labels_PD, temperature
        needs_queries, needs_labels = ctx.needs_input_grad[:2]
        self.needed: bool = needs_queries or needs_labels
        self.of_queries_BD = torch.zeros_like(queries_BD) if needs_queries else None
        self.of_labels_PD = torch.empty_like(labels_PD) if needs_labels else None

    def add(self, block: _Block, grad_pB: Tensor) -> None:
        """Adds what the gradient of one block's logits gives."""
        if self.of_queries_BD is not None:
            labels_pD = self._labels_PD[block.labels]
            self.of_queries_BD.addmm_(grad_pB.T, labels_pD, alpha=self._temperature)
        if self.of_labels_PD is not None:
            out_pD = self.of_labels_PD[block.labels]
            torch.addmm(
                out_pD, grad_pB, self._queries_BD, beta=0, alpha=self._temperature, out=out_pD
            )
