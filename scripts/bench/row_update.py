"""Time of one classifier update against the number of labels, ours and what it replaces.

    python scripts/bench/row_update.py [--quick] [--json FILE]

Every system holds an L x D classifier in host memory and updates it for a step that touches R
random rows. Per system and L, medians over steps with a new pool each:

- row_sparse: `ClassifierTable.apply`: gather, CPUAdam on packed rows, scatter (every format asked
  for). What `fetch` takes to pack the rows for the forward pass is in a column of its own.
- deepspeed_dense: DeepSpeed's CPUAdam over all rows, as ZeRO-Offload steps them, with the zeroing
  of the dense gradient and the placing of the R gradient rows in it.
- torch_fused: torch's fused AdamW over all rows, the same gradient.
- sparse_adam: `nn.Embedding(sparse=True)`'s gradient and `torch.optim.SparseAdam`.

`floor_s` is the time that 28·R·D bytes take at the bandwidth of a copy of 256 MiB, measured between
the steps of the same run (the caches then hold none of the table); a system's `update_s / floor_s`
is its distance from pure memory traffic. Sizes that would not fit into the free memory are left out
and named.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unidec_ds.classifier.capacity import host_free_bytes
from unidec_ds.classifier.row_formats import bytes_per_label
from unidec_ds.classifier.table import ClassifierConfig, ClassifierTable, Placement

LR, BETAS, EPS, WEIGHT_DECAY = 1e-3, (0.9, 0.999), 1e-8, 0.05
RIVALS = ("deepspeed_dense", "torch_fused", "sparse_adam")
MEMORY_SHARE = 0.7

COPY_ELEMENTS = 2**26

Step = Callable[[np.ndarray, Tensor], float]
"""Updates the rows and returns the seconds of the update alone."""


def row_sparse(labels: int, width: int, row_format: str) -> Step:
    """Returns our step; the table's moments are touched once, so no step pays for fresh pages."""
    table = ClassifierTable(
        num_labels=labels,
        width=width,
        rank=0,
        world_size=1,
        config=ClassifierConfig.model_validate({"format": row_format}),
        placement=Placement("cpu"),
        device=torch.device("cpu"),
        seed=0,
        betas=BETAS,
        eps=EPS,
        weight_decay=WEIGHT_DECAY,
    )
    for name, column in table.state().items():
        if name.startswith("exp_avg"):
            column.zero_()

    def step(label_ids: np.ndarray, grads_RD: Tensor) -> float:
        rows_RD = table.fetch(label_ids)
        rows_RD.grad = grads_RD
        start = time.perf_counter()
        table.apply(rows_RD, lr=LR)
        return time.perf_counter() - start

    return step


def dense(labels: int, width: int, system: str) -> Step:
    """Returns a rival's step over one [L, D] parameter."""
    weight = torch.nn.Parameter(torch.full((labels, width), 0.01))
    if system == "sparse_adam":
        sparse = torch.optim.SparseAdam([weight], lr=LR, betas=BETAS, eps=EPS)

        def sparse_step(label_ids: np.ndarray, grads_RD: Tensor) -> float:
            start = time.perf_counter()
            index = torch.from_numpy(label_ids)[None]
            weight.grad = torch.sparse_coo_tensor(
                index, grads_RD, weight.shape, is_coalesced=True, check_invariants=False
            )
            sparse.step()
            return time.perf_counter() - start

        return sparse_step
    options: dict[str, Any] = dict(lr=LR, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY)
    if system == "deepspeed_dense":
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        optimizer = DeepSpeedCPUAdam([weight], **options)
    else:
        optimizer = torch.optim.AdamW([weight], fused=True, **options)
    weight.grad = torch.zeros_like(weight)

    def dense_step(label_ids: np.ndarray, grads_RD: Tensor) -> float:
        start = time.perf_counter()
        assert weight.grad is not None
        weight.grad.zero_()
        weight.grad[torch.from_numpy(label_ids)] = grads_RD
        optimizer.step()
        return time.perf_counter() - start

    return dense_step


def measure(step: Step, labels: int, width: int, rows: int, repeats: int) -> dict[str, float]:
    """Returns median seconds of an update, of what goes before it, and of its floor."""
    rng = np.random.default_rng(0)
    grads_RD = torch.randn(rows, width) * 0.01
    source, target = torch.ones(COPY_ELEMENTS), torch.zeros(COPY_ELEMENTS)
    update_s, fetch_s, copy_s = [], [], []
    for turn in range(repeats + 2):
        drawn = np.unique(rng.integers(labels, size=rows * 2))
        label_ids = np.sort(rng.choice(drawn, rows, replace=False))
        start = time.perf_counter()
        target.copy_(source)
        middle = time.perf_counter()
        seconds = step(label_ids, grads_RD)
        end = time.perf_counter()
        if turn >= 2:
            copy_s.append(middle - start)
            update_s.append(seconds)
            fetch_s.append(end - middle - seconds)
    copied_bytes = 2 * source.nbytes
    floor_s = 28 * rows * width / copied_bytes * median(copy_s)
    return {"update_s": median(update_s), "fetch_s": median(fetch_s), "floor_s": floor_s}


def main() -> None:
    """Measures, prints the table and writes the JSON file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="100,000 and 200,000 labels")
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--labels", type=int, nargs="+", help="numbers of labels")
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--rows", type=int, default=4096, help="touched rows a step")
    parser.add_argument("--formats", nargs="+", default=["fp32"], help="row formats of ours")
    parser.add_argument("--systems", nargs="*", default=list(RIVALS), choices=RIVALS)
    options = parser.parse_args()
    sizes = options.labels or (
        [100_000, 200_000] if options.quick else [100_000, 300_000, 1_000_000, 3_000_000]
    )
    results, left_out = [], []
    for labels in sizes:
        plans: list[tuple[str, str, int]] = [
            ("row_sparse", name, bytes_per_label(name, "global", options.width))
            for name in options.formats
        ]
        for system in options.systems:
            arrays = 3 if system == "sparse_adam" else 4
            plans.append((system, "fp32", 4 * arrays * options.width))
        for system, row_format, label_bytes in plans:
            if labels * label_bytes > MEMORY_SHARE * host_free_bytes():
                left_out.append(f"{system} {row_format} at {labels:,}")
                continue
            if system == "row_sparse":
                step, repeats = row_sparse(labels, options.width, row_format), 40
            else:
                step, repeats = dense(labels, options.width, system), 5
            if options.quick:
                repeats = max(3, repeats // 3)
            seconds = measure(step, labels, options.width, options.rows, repeats)
            results.append(
                {
                    "system": system,
                    "format": row_format,
                    "labels": labels,
                    "width": options.width,
                    "rows": options.rows,
                    **seconds,
                }
            )
            del step
            gc.collect()
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, "
          f"torch {torch.__version__}; D = {options.width}, R = {options.rows}\n"
          f"`{' '.join(sys.argv)}`\n")  # fmt: skip
    print("| system | format | labels | fetch ms | update ms | floor ms | update / floor |")
    print("|---|---|---:|---:|---:|---:|---:|")
    for row in results:
        fetch_ms, update_ms, floor_ms = (
            1e3 * row[name] for name in ("fetch_s", "update_s", "floor_s")
        )
        print(
            f"| {row['system']} | {row['format']} | {row['labels']:,} "
            f"| {fetch_ms:.1f} | {update_ms:.1f} | {floor_ms:.1f} | {update_ms / floor_ms:.2f} |"
        )
    if left_out:
        print(f"\nLeft out, too large for the free memory: {'; '.join(left_out)}.")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
