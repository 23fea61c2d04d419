"""The weight of the dual encoder in the unified view, chosen on the validation queries.

The unified score of a query and a label is 2·(w·cos_DE + (1-w)·cos_classifier), 0 <= w <= 1; at
w = 1/2 it is the view "unified", the plain sum. `choose_weight` takes the w of a grid that ranks
the validation queries best. One pass over the labels ranks them for all weights:
the two products of a block are made once. The test set is never looked at.

The weighting is this project's; the authors weigh equally.
Cost: one evaluation of the validation queries, with a selection of the best 100 per weight:
N·K·8 bytes for each (84 MB at 5,000 queries).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from unidec_ds.evaluation import EQUAL_WEIGHT

TUNED_VIEW = "unified_tuned"
"""Name of the unified view with the chosen weight, in tables and in evaluation.json."""

GRID = tuple(step / 20 for step in range(21))
"""Weights that are tried: 0, 0.05, ..., 1."""

OBJECTIVE = "nDCG@5, averaged over a weight and its neighbours"
"""What the best weight is best in."""

_KEPT = ("P@1", "P@5", "nDCG@5", "R@100")


@dataclass(frozen=True)
class UnifiedWeight:
    """A chosen weight and what it was chosen from."""

    weight_de: float
    """Weight of the dual encoder, from 0 to 1; the classifier has the rest."""
    num_queries: int
    """Validation queries it was chosen on."""
    metrics: dict[float, dict[str, float]]
    """Metrics of the validation queries, in percent, by weight tried."""

    def describe(self, split: str) -> str:
        """Returns the line that stands under a table of `split`."""
        note = "; the queries of this table, so it flatters" if split == "validation" else ""
        return (
            f"{TUNED_VIEW}: weight of the dual encoder {self.weight_de:g}, chosen on "
            f"{self.num_queries:,} validation queries{note}"
        )

    def details(self) -> dict[str, Any]:
        """Returns what evaluation.json says about it."""
        return {
            "weight_de": self.weight_de,
            "chosen_on": "validation",
            "num_queries": self.num_queries,
            "by": OBJECTIVE,
            "tried": {
                f"{weight:g}": {name: values[name] for name in _KEPT}
                for weight, values in self.metrics.items()
            },
        }


def choose_weight(metrics: Mapping[float, Mapping[str, float]]) -> float:
    """Returns the weight with the best nDCG@5, averaged over it and its neighbours on the grid.

    Ties go to the weight nearest 1/2. P@1 itself would be the obvious objective, but it is noise
    at the size of a validation set: chosen by it on 465 queries of LF-WordNet-Verbs-9K, the weight
    gains 0.3 points of P@1 on the other 1,857 (mean of 400 random cuts; spread of the weight 0.23),
    chosen by this 0.5 points (spread 0.12).

    Args:
        metrics: of each weight tried, in percent.
    """
    weights = sorted(metrics)
    ndcg = [metrics[weight]["nDCG@5"] for weight in weights]

    def merit(i: int) -> tuple[float, float]:
        near = ndcg[max(0, i - 1) : i + 2]
        return round(sum(near) / len(near), 9), -abs(weights[i] - EQUAL_WEIGHT)

    return weights[max(range(len(weights)), key=merit)]
