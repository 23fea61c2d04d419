"""Times exact search at the LF-AmazonTitles-131K shape against the machine's own GEMM and top-k.

    python scripts/bench/search.py [--quick] [--json FILE] [--results DIR]

Random unit vectors, fp32. Four ways over the same blocks of queries and labels, taken in turn for
every slice of the queries so that a noisy machine slows all alike (--quick: the faster of two):

- gemm: the matrix products alone, results thrown away: the floor of any exact search.
- gemm_topk: the products and a `torch.topk` of every block, unmerged, boundary ties undecided.
- search: the products and `TopK.update`, `TopK.result` at the end: the whole exact search.
- masked: the same with five pairs per query excluded.

`search / gemm_topk` is the rate against that pair of library calls (more is better), `search /
gemm` the share of the time that is matrix product. `extra_mib` is the most host memory that the
search of a slice held beside the vectors, its block of scores (32 MiB) included. The last line
times the metrics of predictions of that shape.
"""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path

import numpy as np
import results
import torch
from torch import Tensor
from torch.nn.functional import normalize

from unidec_ds.data.pairs import Pairs
from unidec_ds.metrics import frequency_breakdown, inverse_propensity, score_predictions
from unidec_ds.search import LABEL_BLOCK, TopK, fixed_blocks, query_block

NUM_QUERIES, NUM_LABELS = 134_835, 131_073
SLICE = 2048  # queries per turn
WAYS = ("gemm", "gemm_topk", "search", "masked")


def one_turn(way: str, queries_QD: Tensor, labels_LD: Tensor, k: int, exclude: Pairs) -> float:
    """Returns the seconds that one way takes for one slice of the queries."""
    device = labels_LD.device
    buffer = torch.empty(query_block(device) * LABEL_BLOCK, device=device)
    top = TopK(len(queries_QD), k, device)
    start_s = clock(device)
    for label, end_label in fixed_blocks(len(labels_LD), LABEL_BLOCK):
        for query, end_query in fixed_blocks(len(queries_QD), query_block(device)):
            shape = (end_query - query, end_label - label)
            scores_BL = buffer[: shape[0] * shape[1]].view(shape)
            torch.mm(queries_QD[query:end_query], labels_LD[label:end_label].T, out=scores_BL)
            if way == "gemm_topk":
                scores_BL.topk(min(k, shape[1]), dim=1)
            elif way != "gemm":
                pairs = exclude if way == "masked" else None
                top.update(scores_BL, first_query=query, first_label=label, exclude=pairs)
    if way in ("search", "masked"):
        top.result()
    return clock(device) - start_s


def clock(device: torch.device) -> float:
    """Returns the seconds on the clock once the device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def memory_mib(name: str) -> float:
    """Returns this process's VmRSS (now) or VmHWM (peak)."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


def time_search(
    num_queries: int, width: int, k: int, rounds: int, device: torch.device
) -> dict[str, float]:
    """Returns seconds per way, their ratios and the memory taken."""
    generator = torch.Generator().manual_seed(0)
    queries_ND = normalize(torch.randn(num_queries, width, generator=generator)).to(device)
    labels_LD = normalize(torch.randn(NUM_LABELS, width, generator=generator)).to(device)
    rows = np.repeat(np.arange(SLICE), 5)
    columns = np.random.default_rng(0).integers(NUM_LABELS, size=len(rows))
    exclude = Pairs.from_pairs(rows, columns, SLICE, NUM_LABELS)
    seconds = dict.fromkeys(WAYS, 0.0)
    one_turn("gemm", queries_ND[:SLICE], labels_LD, k, exclude)  # pages and threads in place
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak to what is held now
    before_mib = memory_mib("VmRSS")
    one_turn("search", queries_ND[:SLICE], labels_LD, k, exclude)
    extra_mib = memory_mib("VmHWM") - before_mib
    for start, stop in fixed_blocks(num_queries, SLICE):
        turns = [
            {way: one_turn(way, queries_ND[start:stop], labels_LD, k, exclude) for way in WAYS}
            for _ in range(rounds)
        ]
        for way in WAYS:
            seconds[way] += min(turn[way] for turn in turns)
    return {
        "queries": num_queries,
        "labels": NUM_LABELS,
        "width": width,
        "k": k,
        **{f"{way}_s": value for way, value in seconds.items()},
        "gemm_gflops": 2e-9 * num_queries * NUM_LABELS * width / seconds["gemm"],
        "search / gemm_topk": seconds["gemm_topk"] / seconds["search"],
        "search / gemm": seconds["gemm"] / seconds["search"],
        "extra_mib": extra_mib,
    }


def time_metrics(depth: int = 100) -> dict[str, float]:
    """Returns the seconds that all metrics of N x `depth` given predictions take."""
    generator = np.random.default_rng(0)
    rows = np.repeat(np.arange(NUM_QUERIES), 5)
    columns = (NUM_LABELS * generator.random(len(rows)) ** 3).astype(np.int64)
    truth = Pairs.from_pairs(rows, columns, NUM_QUERIES, NUM_LABELS)
    predicted = generator.integers(NUM_LABELS, size=(NUM_QUERIES, depth))
    predicted[:, :3] = columns.reshape(-1, 5)[:, :3]
    start_s = time.perf_counter()
    weights = inverse_propensity(truth, 0.6, 2.6)
    score_predictions(truth, predicted, inverse_propensity=weights)
    scored_s = time.perf_counter()
    frequency_breakdown(truth, predicted, train_counts=truth.column_counts())
    return {
        "metrics_s": scored_s - start_s,
        "frequency_breakdown_s": time.perf_counter() - scored_s,
    }


def main() -> None:
    """Runs the searches and writes what was asked for."""
    args = results.parser(__doc__, quick="the first 2,048 queries only").parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shapes = [(384, 100), (768, 100)] + ([] if args.quick else [(384, 10)])
    num_queries, rounds = (SLICE, 2) if args.quick else (NUM_QUERIES, 1)
    searches = []
    for width, k in shapes:
        print(f"D = {width}, k = {k}", file=sys.stderr, flush=True)
        searches.append(time_search(num_queries, width, k, rounds, device))
    metrics = time_metrics()
    rows = [[f"{value:.5g}" for value in search.values()] for search in searches]
    said = ", ".join(f"{key} {value:.2f}" for key, value in metrics.items())
    results.publish(
        "search",
        args,
        {"searches": searches, "metrics": metrics},
        title="Exact search",
        body=f"{results.table(list(searches[0]), rows, texts=0)}\n\n{said}",
    )


if __name__ == "__main__":
    main()
