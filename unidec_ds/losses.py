"""The pick-some-labels losses of both heads.

`head_loss` turns a head's query and label vectors into this rank's share of its loss. A rank
holds all queries of the global batch and the pool labels it owns, so that sums over queries are
complete here, and sums over labels are completed by one injected collective. The shares of all
ranks add up to the loss; nothing else here knows that there are ranks.

The losses differ only in how a positive's score meets the negatives' sum, and that is small: M
scores, one number a query and one a label, in plain autograd below. The B·P logits behind them
never exist as a whole: `loss_blocks` has them, and the cost of it all.

Source: Kharbanda et al., UniDEC, arXiv 2405.03714 (pick-some-labels, both directions);
"decoupled" as in DEXML (Gupta et al., arXiv 2310.10636).

Shape legend: B queries of the global batch, P pool labels of this rank, D width, M positive pairs
of this rank, A anchors (B or P).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn.functional import logsigmoid

from unidec_ds.loss_blocks import cross_entropy, negative_logsumexp
from unidec_ds.settings import Settings
from unidec_ds.targets import Targets

__all__ = ["HeadLoss", "LossKind", "ObjectiveConfig", "Targets", "head_loss"]

LossKind = Literal["softmax", "decoupled", "balanced", "bce"]


class ObjectiveConfig(Settings):
    """What is minimised: `weight_de` · L_DE + (1 - `weight_de`) · L_C."""

    de: Literal["softmax", "decoupled", "balanced", "bce", "none"] = "softmax"
    """Loss of the dual encoder. `softmax`: every positive against all labels of the pool
    (SupCon). `decoupled`: a positive does not compete with the query's other positives.
    `balanced`: the positives count in the denominator as one, by their mean. `bce`: every pair
    is a binary decision. `none`: the dual encoder is not trained."""

    classifier: Literal["softmax", "decoupled", "balanced", "bce", "none"] = "softmax"
    """Loss of the classifier; the choices of `de`."""

    pool: Literal["psl", "all"] = "psl"
    """Labels scored in a step. `psl`: the pool picked in batch (section `pool`). `all`: every
    label, whose cost grows with their number."""

    l2q: bool = True
    """Also take the loss on the transposed logits, from the pool's labels to the batch's
    queries; a head's loss is then the mean of both directions."""

    weight_de: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Weight λ of the dual encoder's loss; the classifier's is 1 - λ. Without effect when one
    of the two is `none`: the other then has weight 1."""

    temperature: Annotated[float, Field(gt=0)] = 18.0
    """The constant T of the logits T · <query, label>, the inverse of a softmax temperature."""

    classifier_logits: Literal["dot", "cosine"] = "dot"
    """Classifier logits from the vectors as they are, or with both sides L2-normalised."""

    bce_reduction: Literal["sum", "mean"] = "sum"
    """How `bce` adds up one anchor's pairs. `sum`: their sum, so that a row's gradient does not
    shrink with the pool. `mean`: their sum divided by the number of labels scored (l2q: of the
    batch's queries), which puts it below Adam's eps when the pool is a million labels."""

    @model_validator(mode="after")
    def _some_head_is_trained(self) -> ObjectiveConfig:
        if self.de == self.classifier == "none":
            raise ValueError(
                "de and classifier are both none, which leaves nothing to train: "
                "set at least one of them to softmax, decoupled, balanced or bce"
            )
        return self

    @property
    def head_weights(self) -> dict[Literal["de", "classifier"], float]:
        """The weight in the total loss of each head that is trained."""
        if self.classifier == "none":
            return {"de": 1.0}
        if self.de == "none":
            return {"classifier": 1.0}
        return {"de": self.weight_de, "classifier": 1 - self.weight_de}


@dataclass(frozen=True)
class HeadLoss:
    """This rank's share of one head's loss; over the ranks the shares add up to the loss.

    Args:
        total: scalar to minimise: q2l, or (q2l + l2q) / 2 with both directions.
        q2l: scalar for the log, detached.
        l2q: scalar for the log, detached; 0 when the direction is off.
    """

    total: Tensor
    q2l: Tensor
    l2q: Tensor


def head_loss(
    kind: LossKind,
    queries_BD: Tensor,
    labels_PD: Tensor,
    targets: Targets,
    *,
    temperature: float,
    l2q: bool,
    bce_reduction: Literal["sum", "mean"] = "sum",
    block_bytes: int,
    combine_logsumexp: Callable[[Tensor], Tensor],
) -> HeadLoss:
    """Returns this rank's share of one head's loss.

    With s = `temperature` · <query, label>, P_i the positives of query i in the pool and N_i its
    other labels, ignored pairs left out, q2l is the mean over the queries that have a positive of

    - softmax: mean over p in P_i of log(Σ_{N_i} e^s + Σ_{P_i} e^s) - s_ip
    - decoupled: mean over p in P_i of log(Σ_{N_i} e^s + e^s_ip) - s_ip
    - balanced: mean over p in P_i of log(Σ_{N_i} e^s + mean_{P_i} e^s) - s_ip
    - bce: Σ_{N_i} log(1 + e^s) + Σ_{P_i} log(1 + e^-s); with reduction "mean" divided by the
      number of labels scored, ignored ones counted, so that the divisor is the same for all.

    l2q is the same on the transposed logits, anchored on the labels that have a positive. A query
    (label) without one is no anchor, yet it is a negative of the other side's anchors.

    Args:
        kind: which loss.
        queries_BD: [B, D], all queries of the global batch, the same on every rank.
        labels_PD: [P, D], the pool labels that this rank scores, in the order of `targets`.
        targets: this head's pairs and counts.
        temperature: factor T of the logits.
        l2q: whether to add the direction from labels to queries.
        bce_reduction: see above; for the other kinds without effect.
        block_bytes: most bytes of one block of logits (at least one label's); up to three such
            blocks are alive at once. A pool that fits is kept for the backward pass.
        combine_logsumexp: completes a [B] log-sum-exp over the ranks; its backward sums the
            incoming gradient over the ranks. The identity at one rank.

    Collectives: `combine_logsumexp` once, except for bce.
    """
    dtype = torch.promote_types(queries_BD.dtype, torch.float32)
    queries_BD, labels_PD = queries_BD.to(dtype), labels_PD.to(dtype)
    with torch.autocast(queries_BD.device.type, enabled=False):
        if kind == "bce":
            return _binary_cross_entropy(
                queries_BD, labels_PD, targets, temperature, l2q, bce_reduction, block_bytes
            )
        scores_M, rows_B, columns_P = negative_logsumexp(
            queries_BD,
            labels_PD,
            targets,
            temperature=temperature,
            l2q=l2q,
            block_bytes=block_bytes,
        )
        q2l = _anchored_share(
            kind,
            rows_B,
            scores_M,
            targets.positive_query,
            targets.positives_per_query,
            targets.num_queries,
            combine_logsumexp,
        )
        if columns_P is None:
            return HeadLoss(q2l, q2l.detach(), torch.zeros_like(q2l))
        back = _anchored_share(
            kind,
            columns_P,
            scores_M,
            targets.positive_label,
            targets.positives_per_label,
            targets.num_anchors,
            lambda complete_P: complete_P,
        )
        return HeadLoss((q2l + back) / 2, q2l.detach(), back.detach())


def _binary_cross_entropy(
    queries_BD: Tensor,
    labels_PD: Tensor,
    targets: Targets,
    temperature: float,
    l2q: bool,
    reduction: Literal["sum", "mean"],
    block_bytes: int,
) -> HeadLoss:
    """Returns `head_loss` of kind bce: each anchor's pairs weighted by the anchors' number."""
    candidates = (targets.num_labels, len(queries_BD)) if reduction == "mean" else (1, 1)
    share = 0.5 if l2q else 1.0

    def weight(positives_A: Tensor, num_anchors: int, num_candidates: int) -> Tensor:
        is_anchor_A = (positives_A > 0).to(queries_BD.dtype)
        return is_anchor_A * (share / max(num_anchors * num_candidates, 1))

    weight_P = weight(targets.positives_per_label, targets.num_anchors, candidates[1])
    total, by_query, by_label = cross_entropy(
        queries_BD,
        labels_PD,
        targets,
        temperature=temperature,
        weight_B=weight(targets.positives_per_query, targets.num_queries, candidates[0]),
        weight_P=weight_P if l2q else None,
        block_bytes=block_bytes,
    )
    return HeadLoss(total, by_query / share, by_label / share)


def _anchored_share(
    kind: LossKind,
    negatives_A: Tensor,
    scores_M: Tensor,
    anchor_M: Tensor,
    positives_A: Tensor,
    num_anchors: int,
    combine: Callable[[Tensor], Tensor],
) -> Tensor:
    """Returns the sum over own positives of their terms, one direction of a softmax loss.

    Args:
        kind: softmax, decoupled or balanced.
        negatives_A: log-sum-exp of each anchor's own negatives, -inf where there is none.
        scores_M: logit of each own positive.
        anchor_M: its anchor.
        positives_A: number of positives of each anchor, over all ranks.
        num_anchors: number of anchors with a positive, over all ranks.
        combine: completes a log-sum-exp over the ranks.
    """
    # index_select, not x[i]: the backward of the latter is not deterministic.
    count_M = positives_A.index_select(0, anchor_M).to(scores_M.dtype)
    if kind == "decoupled":
        denominator_M = combine(negatives_A).index_select(0, anchor_M)
        terms_M = -logsigmoid(scores_M - denominator_M)
    else:
        weighted_M = scores_M - count_M.log() if kind == "balanced" else scores_M
        local_A = _logsumexp_onto(negatives_A, weighted_M, anchor_M)
        terms_M = combine(local_A).index_select(0, anchor_M) - scores_M
    return (terms_M / (count_M * max(num_anchors, 1))).sum()


def _logsumexp_onto(base_A: Tensor, scores_M: Tensor, anchor_M: Tensor) -> Tensor:
    """Returns log(e^base + the sum of each anchor's e^score); -inf, gradient 0, where empty."""
    largest_A = base_A.detach().scatter_reduce(0, anchor_M, scores_M.detach(), "amax")
    largest_A = torch.where(largest_A.isneginf(), 0, largest_A)
    exp_M = (scores_M - largest_A.index_select(0, anchor_M)).exp()
    sum_A = (base_A - largest_A).exp().index_add(0, anchor_M, exp_M)
    empty_A = sum_A == 0
    log_A: Tensor = torch.where(empty_A, 1, sum_A).log() + largest_A
    return torch.where(empty_A, -math.inf, log_A)
