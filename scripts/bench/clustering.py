"""Times balanced clustering and says how alike the queries of a batch become.

    python scripts/bench/clustering.py [--quick] [--width D] [--json FILE] [--results DIR]

Vectors are drawn around topics of very different sizes (a power law), one topic per 50 queries, and
normalised. Per number of queries: the seconds, the memory that clustering added
at its peak, and the mean cosine of two queries of one batch beside that of random batches.
"""

from __future__ import annotations

import resource
import sys
from time import perf_counter

import numpy as np
import results
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
    parser = results.parser(__doc__, quick="leave out the 2.2M queries")
    parser.add_argument("--width", type=int, default=384, help="width of the vectors")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    figures = []
    for num_queries, batch_size in QUICK if args.quick else FULL:
        print(f"{num_queries:,} queries", file=sys.stderr, flush=True)
        figures.append(measure(num_queries, batch_size, args.width))
    columns = ["N", "clusters", "s", "MiB added", "cosine in a batch", "in a random batch"]
    rows = [
        [
            f"{row['num_queries']:,}",
            f"{row['num_clusters']:,}",
            f"{row['cluster_s']:.1f}",
            f"{row['added_bytes'] / 2**20:.0f}",
            f"{row['similarity']:.3f}",
            f"{row['similarity_random']:.3f}",
        ]
        for row in figures
    ]
    results.publish(
        "clustering",
        args,
        {"threads": args.threads, "figures": figures},
        title="Balanced clustering of the queries",
        body=f"D = {args.width}.\n\n{results.table(columns, rows, texts=0)}",
    )


if __name__ == "__main__":
    main()
