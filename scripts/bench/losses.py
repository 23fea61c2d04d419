"""Times the loss of one head, forward and backward, against the matrix products it cannot avoid.

    python scripts/bench/losses.py [--quick] [--json FILE] [--results DIR]

The floor is the products alone, on the same blocks of the same shapes, timed in alternation with
the loss; the table has the fastest of 15 runs of each (of 1, for the largest batch). There are 3
products where the pool's logits fit one block and for bce, and 4 where the backward pass has to
compute the logits anew. What is above the floor is exp, sums and the pairs. `small` logits are
those of unit vectors, `large` ones those of long vectors, whose exp needs a maximum first. The
peak is that of the whole process so far, or of the accelerator.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import results
import torch
from torch import Tensor
from torch.nn.functional import normalize

from unidec_ds.losses import Targets, head_loss

WIDTH, TEMPERATURE = 768, 18.0
MIB = 1 << 20
# (queries, labels, block bytes, kind, l2q, length of the vectors)
QUICK = [
    (1024, 4096, 64 * MIB, "softmax", True, 1.0),
    (1024, 4096, 64 * MIB, "softmax", False, 1.0),
    (1024, 4096, 64 * MIB, "softmax", True, 4.0),
    (1024, 4096, 64 * MIB, "decoupled", True, 1.0),
    (1024, 4096, 64 * MIB, "balanced", True, 1.0),
    (1024, 4096, 64 * MIB, "bce", True, 1.0),
    (1024, 4096, 4 * MIB, "softmax", True, 1.0),
    (1024, 9216, 16 * MIB, "softmax", True, 1.0),
    (1024, 9216, 16 * MIB, "bce", True, 1.0),
]
FULL = [*QUICK, (16384, 134587, 256 * MIB, "softmax", True, 1.0)]


def main() -> None:
    """Times the cases and writes what was asked for."""
    args = results.parser(__doc__, quick="skip the 16,384-query batch").parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    figures, rows = [], []
    for case in QUICK if args.quick else FULL:
        row = measure(*case, device=device)
        figures.append(row)
        rows.append(
            [
                row["kind"],
                "on" if row["l2q"] else "off",
                row["logits"],
                *(str(row[key]) for key in ("queries", "labels")),
                str(row["block_bytes"] // MIB),
                *(f"{row[key] * 1e3:.1f}" for key in ("plan_s", "floor_s", "loss_s")),
                f"{row['ratio']:.2f}",
                str(row["peak_bytes"] // MIB),
            ]
        )
        print(*rows[-1], file=sys.stderr, flush=True)
    columns = ["loss", "l2q", "logits", "B", "P", "block MiB", "plan ms", "floor ms", "loss ms",
               "ratio", "peak MiB"]  # fmt: skip
    results.publish(
        "losses",
        args,
        figures,
        title="The loss of one head",
        body=f"{device}, D = {WIDTH}, fp32.\n\n{results.table(columns, rows, texts=3)}",
    )


def measure(
    num_queries: int,
    num_labels: int,
    block_bytes: int,
    kind: str,
    l2q: bool,
    length: float,
    device: torch.device,
) -> dict[str, Any]:
    """Returns one row: least seconds of the floor and of the loss, timed in alternation."""
    torch.manual_seed(0)
    queries, labels = (
        (length * normalize(torch.randn(n, WIDTH, device=device), dim=1)).requires_grad_()
        for n in (num_queries, num_labels)
    )
    started = time.perf_counter()
    targets = plan(num_queries, num_labels, device)
    plan_s = time.perf_counter() - started

    def loss() -> None:
        queries.grad = labels.grad = None
        head_loss(
            kind,  # type: ignore[arg-type]
            queries,
            labels,
            targets,
            temperature=TEMPERATURE,
            l2q=l2q,
            block_bytes=block_bytes,
            combine_logsumexp=lambda local: local,
        ).total.backward()

    def floor() -> None:
        products(queries.detach(), labels.detach(), block_bytes, recompute=kind != "bce")

    repeats = 1 if num_queries * num_labels > 1e9 else 15
    runs = [(seconds(floor, device), seconds(loss, device)) for _ in range(repeats)]
    floor_s, loss_s = map(min, zip(*runs, strict=True))
    return {
        "queries": num_queries,
        "labels": num_labels,
        "width": WIDTH,
        "block_bytes": block_bytes,
        "kind": kind,
        "l2q": l2q,
        "logits": "small" if length == 1 else "large",
        "plan_s": plan_s,
        "floor_s": floor_s,
        "loss_s": loss_s,
        "ratio": loss_s / floor_s,
        "peak_bytes": peak_bytes(device),
        "torch": torch.__version__,
        "device": str(device),
        "threads": torch.get_num_threads(),
    }


def plan(num_queries: int, num_labels: int, device: torch.device) -> Targets:
    """Returns targets of about eight positives and one ignored pair a query."""
    rng = np.random.default_rng(0)
    keys = np.unique(rng.integers(num_queries * num_labels, size=9 * num_queries))
    ignored = rng.random(len(keys)) < 1 / 9
    query, pool = keys // num_labels, keys % num_labels
    return Targets.from_plan(
        batch_size=num_queries,
        positive_query=query[~ignored],
        positive_pool=pool[~ignored],
        ignored_query=query[ignored],
        ignored_pool=pool[ignored],
        columns=np.arange(num_labels),
        eligible=np.ones(num_labels, bool),
        device=device,
    )


def products(queries: Tensor, labels: Tensor, block_bytes: int, recompute: bool) -> None:
    """Computes the matrix products of one loss and its gradients, and nothing else."""
    size = min(max(block_bytes // (4 * len(queries)), 1), len(labels))
    buffer = queries.new_empty(size, len(queries))
    of_queries, of_labels = torch.zeros_like(queries), torch.empty_like(labels)
    repeats = 2 if recompute and size < len(labels) else 1
    for start in range(0, len(labels), size):
        part, gradient = labels[start : start + size], of_labels[start : start + size]
        block = buffer[: len(part)]
        for _ in range(repeats):
            torch.mm(part, queries.T, out=block)
        of_queries.addmm_(block.T, part)
        torch.mm(block, queries, out=gradient)


def peak_bytes(device: torch.device) -> int:
    """Returns the most memory in use so far: the accelerator's, or the process's (Linux)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def seconds(work: Callable[[], None], device: torch.device) -> float:
    """Returns how long `work` takes, the device's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
