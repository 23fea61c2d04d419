"""Stops all ranks when a loss or gradient is not finite, and says whose it was.

Finding out costs a look at the step's vectors and a gather of ids; nothing unless something is
wrong. What a number that is not finite touches first is the vector of its own text or row: weights
of the encoder that are not finite spoil every text of every rank, a classifier row only itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from unidec_ds import comm
from unidec_ds.batch import Batch
from unidec_ds.data.pairs import Ids
from unidec_ds.errors import NonFiniteError
from unidec_ds.model import Embeddings

_SHOWN_IDS = 8


@dataclass(frozen=True)
class Fault:
    """What is not finite."""

    what: str
    """Its name."""
    value: float
    """What it is."""
    step: int
    """The step under way."""
    last_good: Path | None
    """The newest checkpoint."""
    rows_moved: bool = False
    """Whether classifier rows may have been updated already, see `classifier.stream`."""


def stop_non_finite(
    fault: Fault, batch: Batch, embeddings: Embeddings, rows_PD: Tensor | None, share: Tensor
) -> NoReturn:
    """Raises NonFiniteError on every rank, with the ranks, queries and labels involved.

    Args:
        fault: what is not finite.
        batch: the step's batch.
        embeddings: of this rank's texts.
        rows_PD: this rank's classifier rows, with their gradient if there is one; None if they
            were streamed.
        share: this rank's share of the loss.

    Collectives: one gather of small objects; every rank must call.
    """
    start = sum(batch.query_sizes[: comm.rank()])
    query_ids = batch.plan.query_ids[start : start + batch.query_sizes[comm.rank()]]
    text_ids = batch.plan.label_ids[batch.own_pool_with_text]
    query_vectors = torch.cat([embeddings.query_de_BD, embeddings.query_classifier_BD], dim=1)
    found = {
        "queries": _bad_ids(query_ids, query_vectors),
        "label texts": _bad_ids(text_ids, embeddings.label_de_PD),
    }
    if rows_PD is not None:
        found["classifier rows"] = _bad_ids(batch.own_label_ids, rows_PD)
    if rows_PD is not None and rows_PD.grad is not None:
        found["gradients of classifier rows"] = _bad_ids(batch.own_label_ids, rows_PD.grad)
    reports = comm.gather_objects((bool(share.isfinite()), found))
    lines = [
        f"  rank {rank}: {_describe(is_loss_finite, bad)}"
        for rank, (is_loss_finite, bad) in enumerate(reports)
        if not is_loss_finite or any(bad.values())
    ]
    plan = batch.plan
    moved = "some classifier rows were" if fault.rows_moved else "no classifier row was"
    raise NonFiniteError(
        f"the {fault.what} of step {fault.step} is {fault.value}; {moved} updated and nothing was "
        "saved. Not finite are\n"
        + "\n".join(lines or ["  no loss, vector or row: it is the encoder's own gradients"])
        + f"\nThe step has queries {_list(plan.query_ids.tolist())} and labels "
        f"{_list(plan.label_ids.tolist())}. Last good checkpoint: {fault.last_good or 'none'}. "
        "Try lower learning rates, a longer warm-up, or gradient_clipping in the ds_config."
    )


def _bad_ids(ids: Ids, vectors_nD: Tensor) -> list[int]:
    """Returns the ids whose vectors are not finite."""
    bad = (~vectors_nD.detach().isfinite().all(dim=1)).cpu().numpy()
    return [int(i) for i in ids[bad]]


def _describe(is_loss_finite: bool, bad: Mapping[str, list[int]]) -> str:
    parts = [f"{name} {_list(ids)}" for name, ids in bad.items() if ids]
    return "; ".join([*([] if is_loss_finite else ["its share of the loss"]), *parts])


def _list(ids: list[int]) -> str:
    """Returns the first few ids, and how many there are."""
    shown = ", ".join(map(str, ids[:_SHOWN_IDS]))
    return f"{shown}, ... ({len(ids):,})" if len(ids) > _SHOWN_IDS else f"{shown} ({len(ids):,})"
