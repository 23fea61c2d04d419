"""Which pairs a head's loss counts as positive or not at all: pair lists, never a dense matrix.

`Targets.from_plan` cuts one step's plan down to what one head scores on one rank. Counts stay
global, so that every rank divides by the same numbers without asking the others. Pure numpy on
the host, a few milliseconds; the trainer calls it once a head and step, `losses` reads it.

Shape legend: B queries of the global batch, P pool labels of this rank, M positive pairs of this
rank, G ignored pairs of this rank.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unidec_ds.data.pairs import Ids


@dataclass(frozen=True)
class Targets:
    """The pairs that one head scores as positive or not at all, on one rank.

    Counts are global: they come from the plan and are the same on every rank. Pairs are this
    rank's own, sorted by label, without repetition; a label is a row of this rank's `labels_PD`.

    Args:
        num_queries: queries with a positive that this head scores: the divisor of q2l.
        num_anchors: labels of the whole pool with such a positive: the divisor of l2q.
        num_labels: labels of the whole pool that this head scores.
        positives_per_query: float32 [B], over the whole pool.
        positives_per_label: float32 [P].
        positive_query: int64 [M].
        positive_label: int64 [M].
        ignored_query: int64 [G].
        ignored_label: int64 [G].
    """

    num_queries: int
    num_anchors: int
    num_labels: int
    positives_per_query: Tensor
    positives_per_label: Tensor
    positive_query: Tensor
    positive_label: Tensor
    ignored_query: Tensor
    ignored_label: Tensor

    @classmethod
    def from_plan(
        cls,
        *,
        batch_size: int,
        positive_query: Ids,
        positive_pool: Ids,
        ignored_query: Ids,
        ignored_pool: Ids,
        columns: Ids,
        eligible: NDArray[np.bool_],
        device: torch.device | str = "cpu",
    ) -> Targets:
        """Returns one head's targets on the rank that owns `columns`.

        Args:
            batch_size: number of queries B of the global batch.
            positive_query: query indices of the plan's positive pairs.
            positive_pool: their pool indices.
            ignored_query: query indices of the plan's ignored pairs.
            ignored_pool: their pool indices.
            columns: the pool indices that this rank scores with this head, ascending, all
                eligible; the k-th is row k of its `labels_PD`. May be empty.
            eligible: bool, one entry for each label of the pool: whether this head can score it
                (a label without a text has no dual encoder vector).
            device: where the tensors go.
        """
        assert eligible[columns].all()
        scored = eligible[positive_pool]
        per_query = np.bincount(positive_query[scored], minlength=batch_size)
        per_pool = np.bincount(positive_pool[scored], minlength=len(eligible))
        row_of_pool = np.full(len(eligible), -1)
        row_of_pool[columns] = np.arange(len(columns))

        def own(query: Ids, pool: Ids) -> tuple[Tensor, Tensor]:
            row = row_of_pool[pool]
            order = np.argsort(row, kind="stable")
            order = order[np.searchsorted(row[order], 0) :]
            return tensor(query[order]), tensor(row[order])

        def tensor(values: NDArray[Any]) -> Tensor:
            return torch.from_numpy(values).to(device)

        positives = own(positive_query, positive_pool)
        ignored = own(ignored_query, ignored_pool)
        return cls(
            num_queries=int(np.count_nonzero(per_query)),
            num_anchors=int(np.count_nonzero(per_pool)),
            num_labels=int(np.count_nonzero(eligible)),
            positives_per_query=tensor(per_query.astype(np.float32)),
            positives_per_label=tensor(per_pool[columns].astype(np.float32)),
            positive_query=positives[0],
            positive_label=positives[1],
            ignored_query=ignored[0],
            ignored_label=ignored[1],
        )

    def split(self, size: int) -> list[Targets]:
        """Returns the targets of each run of `size` labels of this rank, at least one.

        A head's losses over the parts add up to its loss: counts stay global. Waits for the device.
        """
        num_labels = len(self.positives_per_label)
        starts = list(range(0, num_labels, size)) or [0]
        edges = torch.tensor([*starts, num_labels], device=self.positive_label.device)
        positive = torch.searchsorted(self.positive_label, edges).tolist()
        ignored = torch.searchsorted(self.ignored_label, edges).tolist()
        parts = []
        for k, start in enumerate(starts):
            own, struck = slice(*positive[k : k + 2]), slice(*ignored[k : k + 2])
            parts.append(
                replace(
                    self,
                    positives_per_label=self.positives_per_label[start : start + size],
                    positive_query=self.positive_query[own],
                    positive_label=self.positive_label[own] - start,
                    ignored_query=self.ignored_query[struck],
                    ignored_label=self.ignored_label[struck] - start,
                )
            )
        return parts

    def to(self, device: torch.device) -> Targets:
        """Returns the targets with their tensors on `device`."""
        moved: dict[str, Any] = {
            field.name: value.to(device, non_blocking=True)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return replace(self, **moved)
