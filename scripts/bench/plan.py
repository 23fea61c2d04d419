"""Times the making of a step's plan on a synthetic corpus, with one thread.

    python scripts/bench/plan.py [--quick] [--json FILE]

Label frequencies follow a power law and positives per query a log-normal (mean 22, up to 1,500);
every query has a filter pair and a shortlist of 100. Per batch size it prints the
pool and the milliseconds per plan: with the positives alone, and with 6 hard negatives a query.
"""

from __future__ import annotations

import argparse
import json
import platform
from importlib.metadata import version
from pathlib import Path
from statistics import median
from time import perf_counter

import numpy as np
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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer queries, labels and plans")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here too")
    args = parser.parse_args()

    num_queries, num_labels = (50_000, 131_000) if args.quick else (500_000, 1_300_000)
    positives, filter_pairs, shortlists = make_corpus(num_queries, num_labels)
    print(
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
            print(
                f"B {batch_size:6,}  hard negatives {num_hard_negatives}  "
                f"P {row['pool_size']:9,.0f}  pairs {row['positive_pairs']:9,.0f}  "
                f"median {row['median_ms']:6.1f} ms  slowest {row['slowest_ms']:6.1f} ms  "
                f"first of an epoch {row['first_of_epoch_ms']:6.1f} ms"
            )
    if args.json:
        result = {
            "benchmark": "plan",
            "machine": platform.processor() or platform.machine(),
            "numpy": version("numpy"),
            "num_queries": num_queries,
            "num_labels": num_labels,
            "figures": figures,
        }
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
