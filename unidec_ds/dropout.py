"""The dropout of one step: masks keyed by (seed, step, site), so that no rank layout shows in them.

Each mask is drawn over the global batch or pool on every rank and cut to the rank's own rows; see
`model.dropout_mask`. Dropout inside the encoder is the encoder's own.

Shape legend: B queries of the global batch, P pool labels of this rank, D width.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from unidec_ds.batch import Batch
from unidec_ds.data.keyed import seed_of
from unidec_ds.data.pairs import Ids
from unidec_ds.model import Masks, ModelConfig, dropout_mask


class StepDropout:
    """Makes the masks of any step.

    Args:
        config: its rates.
        width: D.
        seed: the run's.
        rank: whose rows.
        device: where; each kind of device has its own stream of numbers.
    """

    def __init__(
        self, config: ModelConfig, width: int, seed: int, rank: int, device: torch.device
    ) -> None:
        self._config, self._width, self._seed = config, width, seed
        self._rank, self._device = rank, device

    def head_masks(self, batch: Batch, step: int) -> Masks | None:
        """Returns the masks of both heads' outputs, None without dropout."""
        rate = self._config.head_dropout
        if not rate:
            return None
        start = sum(batch.query_sizes[: self._rank])
        queries = np.arange(start, start + batch.query_sizes[self._rank])
        num_queries, num_labels = len(batch.plan.query_ids), len(batch.plan.label_ids)
        return Masks(
            self._mask(step, "query de", rate, num_queries, queries),
            self._mask(step, "query classifier", rate, num_queries, queries),
            self._mask(step, "label de", rate, num_labels, batch.own_pool_with_text),
        )

    def drop_rows(self, rows_PD: Tensor, batch: Batch, step: int) -> Tensor:
        """Returns the pool's classifier rows with their mask applied."""
        rate = self._config.row_dropout
        if not rate:
            return rows_PD
        return rows_PD * self._mask(step, "rows", rate, len(batch.plan.label_ids), batch.own_pool)

    def _mask(self, step: int, site: str, rate: float, num_rows: int, own: Ids) -> Tensor:
        seed = seed_of(self._seed, f"dropout {site}", step)
        return dropout_mask(seed, rate, num_rows, own, self._width, self._device)
