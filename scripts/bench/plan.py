"""Times the making of a step's plan on a synthetic corpus, with one thread.

    python scripts/bench/plan.py [--quick] [--json FILE] [--results DIR]

Label frequencies follow a power law and positives per query a log-normal (mean 22, up to 1,500);
every query has a filter pair and a shortlist of 100. Per batch size: the pool and
the milliseconds per plan, with the positives alone, and with 6 hard negatives a query.
"""

from __future__ import annotations

from statistics import median
from time import perf_counter

import numpy as np
import results
from numpy.typing import NDArray

from unidec_ds.data.pairs import Ids, Pairs
from unidec_ds.data.pool import Planner, PoolConfig

SHORTLIST_SIZE = 100


def make_corpus(num_queries: int, num_labels: int) -> tuple[Pairs, Pairs, NDArray[np.int32]]:
    """Returns the positives, the filter pairs and the shortlists."""
    generator = np.random.default_rng(0)

    def draw_labels(count: int) -> Ids:
        rank = num_labels * generator.random(count) ** 3
        return rank.astype(np.int64) * 7_919 % num_labels  # popular ids lie anywhere

    counts = np.maximum(generator.lognormal(2.6, 1.0, num_queries), 1).astype(np.int64)
    query_ids = np.arange(num_queries)
    pairs = [
        Pairs.from_pairs(rows, draw_labels(len(rows)), num_queries, num_labels)
        for rows in (np.repeat(query_ids, counts), query_ids)
    ]
    size = (num_queries, SHORTLIST_SIZE)
    return pairs[0], pairs[1], generator.integers(num_labels, size=size, dtype=np.int32)


def time_plans(planner: Planner, num_plans: int) -> dict[str, float]:
    """Returns what `num_plans` successive plans hold and take; the epoch's shuffle is apart."""
    start_s = perf_counter()
    planner.plan(0)
    first_s = perf_counter() - start_s
    times_s, plans = [], []
    for step in range(1, num_plans + 1):
        start_s = perf_counter()
        plans.append(planner.plan(step))
        times_s.append(perf_counter() - start_s)
    return {
        "pool_size": median(len(plan.label_ids) for plan in plans),
        "positive_pairs": median(len(plan.positive_pool) for plan in plans),
        "median_ms": 1e3 * median(times_s),
        "slowest_ms": 1e3 * max(times_s),
        "first_of_epoch_ms": 1e3 * first_s,
    }


def main() -> None:
    """Runs the benchmark."""
    args = results.parser(__doc__, quick="fewer queries, labels and plans").parse_args()

    num_queries, num_labels = (50_000, 131_000) if args.quick else (500_000, 1_300_000)
    positives, filter_pairs, shortlists = make_corpus(num_queries, num_labels)
    sizes = (
        f"{num_queries:,} queries, {num_labels:,} labels, {positives.num_pairs:,} positives, "
        f"at most {positives.row_counts().max():,} a query"
    )
    figures = []
    for batch_size, pool_size in ((1_024, 9_000), (16_384, 135_000)):
        for num_hard_negatives in (0, 6):
            planner = Planner(
                query_ids=np.arange(num_queries),
                positives=positives,
                filter_pairs=filter_pairs,
                pool=PoolConfig(size=pool_size, num_hard_negatives=num_hard_negatives),
                batch_size=batch_size,
                seed=0,
                shortlists=shortlists,
            )
            num_plans = max(2, (3_000 if args.quick else 20_000) // (batch_size // 64 + 50))
            row: dict[str, float] = {
                "batch_size": batch_size,
                "num_hard_negatives": num_hard_negatives,
            }
            row |= time_plans(planner, num_plans)
            figures.append(row)
    columns = [
        "B",
        "hard negatives a query",
        "P",
        "pairs",
        "median",
        "slowest",
        "first of an epoch",
    ]
    rows = [
        [
            f"{row['batch_size']:,}",
            f"{row['num_hard_negatives']}",
            f"{row['pool_size']:,.0f}",
            f"{row['positive_pairs']:,.0f}",
            *(f"{row[key]:.1f}" for key in ("median_ms", "slowest_ms", "first_of_epoch_ms")),
        ]
        for row in figures
    ]
    results.publish(
        "plan",
        args,
        {"num_queries": num_queries, "num_labels": num_labels, "figures": figures},
        title="Making a step's plan",
        body=f"{sizes}; milliseconds.\n\n{results.table(columns, rows, texts=0)}",
    )


if __name__ == "__main__":
    main()
