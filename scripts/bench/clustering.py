"""Times balanced clustering and says how alike the queries of a batch become.

    python scripts/bench/clustering.py [--quick] [--width D] [--threads T] [--json FILE]

Vectors are drawn around topics of very different sizes (a power law), one topic per 50 queries, and
normalised. Per number of queries it prints the seconds, the memory that clustering added
at its peak, and the mean cosine of two queries of one batch beside that of random batches.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
from importlib.metadata import version
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unidec_ds.mining.clustering import balanced_clusters

FULL = ((9_315, 256), (85_587, 1024), (2_248_619, 1024))
QUICK = FULL[:2]
QUERIES_PER_TOPIC = 50
BLOCK = 1 << 15


def make_vectors(num_queries: int, width: int) -> Tensor:
    """Returns unit vectors, fp32 [N, D], made block by block."""
    generator = np.random.default_rng(0)
    num_topics = -(-num_queries // QUERIES_PER_TOPIC)
    topics = torch.from_numpy(generator.standard_normal((num_topics, width), np.float32))
    vectors_ND = torch.empty(num_queries, width)
    for block_nD in vectors_ND.split(BLOCK):
        topic_n = (num_topics * generator.random(len(block_nD)) ** 2).astype(np.int64)
        noise_nD = torch.from_numpy(generator.standard_normal(block_nD.shape, np.float32))
        block_nD.copy_(torch.nn.functional.normalize(topics[topic_n] + noise_nD, dim=1))
    return vectors_ND


def mean_similarity(vectors_ND: Tensor, clusters_N: NDArray[np.int32]) -> float:
    """Returns the mean cosine over the pairs of different rows of a cluster, over clusters."""
    sizes_k = torch.from_numpy(np.bincount(clusters_N))
    sums_kD = torch.zeros(len(sizes_k), vectors_ND.shape[1])
    sums_kD.index_add_(0, torch.from_numpy(clusters_N.astype(np.int64)), vectors_ND)
    pairs_k = sizes_k * (sizes_k - 1)
    return float(((sums_kD.square().sum(1) - sizes_k) / pairs_k).mean())


def peak_bytes() -> int:
    """Returns the largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(num_queries: int, batch_size: int, width: int) -> dict[str, float]:
    """Returns what clustering `num_queries` vectors takes and gives."""
    vectors_ND = make_vectors(num_queries, width)
    num_clusters = -(-num_queries // batch_size)
    before_bytes, start_s = peak_bytes(), perf_counter()
    clusters_N = balanced_clusters(vectors_ND, num_clusters, 0)
    seconds = perf_counter() - start_s
    added_bytes = peak_bytes() - before_bytes
    shuffled_N = np.random.default_rng(1).permutation(clusters_N)
    return {
        "num_queries": num_queries,
        "width": width,
        "num_clusters": num_clusters,
        "cluster_s": seconds,
        "added_bytes": added_bytes,
        "similarity": mean_similarity(vectors_ND, clusters_N),
        "similarity_random": mean_similarity(vectors_ND, shuffled_N),
    }


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="leave out the 2.2M queries")
    parser.add_argument("--width", type=int, default=384, help="width of the vectors")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here too")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    figures = []
    for num_queries, batch_size in QUICK if args.quick else FULL:
        row = measure(num_queries, batch_size, args.width)
        figures.append(row)
        print(
            f"N {num_queries:9,} x {args.width}  k {row['num_clusters']:5,}  "
            f"{row['cluster_s']:6.1f} s  +{row['added_bytes'] / 2**20:5.0f} MiB  "
            f"cosine in a batch {row['similarity']:.3f} (random {row['similarity_random']:.3f})",
            flush=True,
        )
    if args.json:
        result = {
            "benchmark": "clustering",
            "machine": platform.processor() or platform.machine(),
            "torch": version("torch"),
            "threads": args.threads,
            "figures": figures,
        }
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
