"""Random loss problems, and the losses as a double loop over pairs straight from the formulas."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from torch import Tensor

from unidec_ds.losses import Targets

KINDS = ("softmax", "decoupled", "balanced", "bce")
# (kind, l2q, bce_reduction): every objective that differs.
OBJECTIVES = [(kind, l2q, "sum") for kind, l2q in product(KINDS, (True, False))] + [
    ("bce", True, "mean"),
    ("bce", False, "mean"),
]


@dataclass(frozen=True)
class Problem:
    """One step's plan for one head, with float64 vectors of every query and pool label."""

    queries: Tensor
    labels: Tensor
    positives: set[tuple[int, int]]
    ignored: set[tuple[int, int]]
    eligible: np.ndarray

    def targets(self, columns: np.ndarray | None = None) -> Targets:
        positives, ignored = (
            np.array(sorted(pairs), np.int64).reshape(-1, 2)
            for pairs in (self.positives, self.ignored)
        )
        return Targets.from_plan(
            batch_size=len(self.queries),
            positive_query=positives[:, 0],
            positive_pool=positives[:, 1],
            ignored_query=ignored[:, 0],
            ignored_pool=ignored[:, 1],
            columns=np.flatnonzero(self.eligible) if columns is None else columns,
            eligible=self.eligible,
        )


def random_problem(seed: int, *, scale: float = 0.3, size: tuple[int, int, int] = (6, 9, 4)):
    """A pool with several, one or no positives a query, ignored pairs, and labels not scored."""
    rng = np.random.default_rng(seed)
    num_queries, num_labels, width = size
    positive_share, ignored_share = rng.choice([0.1, 0.3, 0.6]), rng.choice([0.0, 0.2])
    draw = rng.random((num_queries, num_labels))
    draw[rng.integers(num_queries), :] = rng.choice([0.0, 0.99])  # all positives, or none
    positives = draw < positive_share
    ignored = ~positives & (draw < positive_share + ignored_share)
    return Problem(
        torch.from_numpy(rng.normal(size=(num_queries, width)) * scale),
        torch.from_numpy(rng.normal(size=(num_labels, width)) * scale),
        set(zip(*map(np.ndarray.tolist, np.nonzero(positives)), strict=True)),
        set(zip(*map(np.ndarray.tolist, np.nonzero(ignored)), strict=True)),
        rng.random(num_labels) < rng.choice([0.7, 1.0]),
    )


def oracle(
    problem: Problem, kind: str, l2q: bool, reduction: str, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (total, gradient of queries, gradient of labels) in float64."""
    queries = problem.queries.clone().requires_grad_()
    labels = problem.labels.clone().requires_grad_()
    logits = temperature * queries @ labels.T
    scored = np.flatnonzero(problem.eligible).tolist()
    everyone = list(range(len(queries)))
    total = one_direction(
        logits, everyone, scored, problem.positives, problem.ignored, kind, reduction
    )
    if l2q:
        turned = [
            {(label, i) for i, label in pairs} for pairs in (problem.positives, problem.ignored)
        ]
        back = one_direction(logits.T, scored, everyone, *turned, kind, reduction)
        total = (total + back) / 2
    total = total + 0 * (queries.sum() + labels.sum())
    total.backward()
    return total.detach(), queries.grad, labels.grad


def one_direction(logits, anchors, candidates, positives, ignored, kind, reduction) -> Tensor:
    terms = []
    for i in anchors:
        own = [logits[i, j] for j in candidates if (i, j) in positives]
        negative = [
            logits[i, j] for j in candidates if (i, j) not in positives and (i, j) not in ignored
        ]
        if not own:
            continue
        if kind == "bce":
            term = sum(log_of_sum([-s, 0 * s]) for s in own)
            term = term + sum(log_of_sum([s, 0 * s]) for s in negative)
            terms.append(term / len(candidates) if reduction == "mean" else term)
            continue
        term = 0
        for s in own:
            if kind == "softmax":
                denominator = log_of_sum(negative + own)
            elif kind == "decoupled":
                denominator = log_of_sum([*negative, s])
            else:
                denominator = log_of_sum(negative + [p - np.log(len(own)) for p in own])
            term = term + (denominator - s) / len(own)
        terms.append(term)
    return sum(terms) / len(terms) if terms else torch.zeros((), dtype=logits.dtype)


def log_of_sum(logits: list[Tensor]) -> Tensor:
    return torch.stack(logits).logsumexp(0)
