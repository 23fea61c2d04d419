"""Time of a classifier update and of a whole training step against the number of labels.

    python scripts/bench/label_scaling.py [--quick] [--json FILE] [--results DIR]

Every system holds an L x D classifier in host memory and trains it: a small encoder embeds 256
queries, `unidec_ds.losses` scores them against R random labels, backward, update.

- row_sparse: `ClassifierTable`: fetch packs the R rows, apply gathers, runs CPUAdam (in the format
  rowwise its own kernel) on the packed rows and scatters.
- deepspeed_dense: DeepSpeed's CPUAdam over all rows, as ZeRO-Offload steps them. Its update holds
  the zeroing of the dense gradient and the placing of the R gradient rows in it; the gradient's
  memory is kept from step to step, which autograd would not do.
- torch_fused: torch's fused AdamW over all rows, with the same gradient.
- sparse_adam: `nn.Embedding(sparse=True)`'s gradient and `torch.optim.SparseAdam`.

The sizes and systems of one width take turns in one process, in a new order every round, each turn
with a new pool: other work on the machine slows all alike. At one size all systems work on the same
rows and moments (in huge pages), so that the rivals need only the gradient on top. Figures are
medians over the rounds after the first; `*_min_s` are the fastest. `step_s` holds `update_s`.

`floor_s` is the time that 28·R·D bytes take at the bandwidth of a copy of 256 MiB, measured before
each of the system's steps (which leaves none of the table in the caches); it is the same amount of
memory for every system: what the R rows need. What does not fit the free memory is left out and
named. Placement nvme: the table in mapped files under --scratch.
"""

from __future__ import annotations

import gc
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import results
import torch
from classifiers import DENSE, OURS, SYSTEMS, Encoder, System, new_table, rival, row_sparse
from torch import Tensor

from unidec_ds.classifier.capacity import host_free_bytes
from unidec_ds.classifier.row_formats import bytes_per_label
from unidec_ds.classifier.storage import Placement

NAMES = {
    "row_sparse": "unidec_ds",
    "deepspeed_dense": "DeepSpeed CPUAdam, all rows",
    "torch_fused": "torch fused AdamW, all rows",
    "sparse_adam": "torch SparseAdam",
}
MEMORY_SHARE = 0.9
COPY_ELEMENTS = 2**26
TURNS_OF_CHEAP = 3  # a round gives those that touch R rows only that many turns


@dataclass(frozen=True)
class Group:
    """Sizes of one width that take turns."""

    width: int
    labels: tuple[int, ...]
    seconds: float
    """How long the rounds go on."""
    placement: str = "cpu"
    formats: tuple[str, ...] = ("fp32",)
    """Row formats of ours; the rivals are fp32."""


FULL = (
    Group(256, (100_000, 300_000, 1_000_000, 3_000_000), 120, formats=("fp32", "rowwise")),
    Group(768, (100_000, 1_300_000), 100, formats=("fp32", "rowwise")),
    Group(64, (100_000, 10_000_000), 40, formats=("fp32", "rowwise")),
    Group(64, (10_000_000,), 15, placement="nvme"),
)
QUICK = (
    Group(256, (30_000, 100_000, 300_000), 12, formats=("fp32", "bf16")),
    Group(64, (300_000,), 2, placement="nvme"),
)


@dataclass
class Case:
    """A system at one size, and the seconds of its turns so far."""

    system: str
    row_format: str
    labels: int
    make: System
    seconds: dict[str, list[float]] = field(
        default_factory=lambda: {"fetch": [], "update": [], "step": [], "copy": []}
    )


def make_cases(group: Group, systems: list[str], scratch: Path) -> tuple[list[Case], list[str]]:
    """Returns a group's cases and, in words, what does not fit."""
    on_disk = group.placement == "nvme"
    budget_bytes = MEMORY_SHARE * host_free_bytes()
    table_bytes = gradient_bytes = 0
    cases, left_out = [], []
    dense: list[tuple[str, int, dict[str, Tensor]]] = []
    for labels in sorted(group.labels):
        for row_format in group.formats:
            size = f"{labels:,} x {group.width}"
            needed_bytes = 0 if on_disk else labels * label_bytes(row_format, group.width)
            if table_bytes + gradient_bytes + needed_bytes > budget_bytes:
                left_out.append(f"{size} in {row_format}")
                continue
            table_bytes += needed_bytes
            print(f"making {size}, {row_format}, {group.placement}", file=sys.stderr, flush=True)
            table = new_table(labels, group.width, row_format, place(group, scratch))
            if OURS in systems:
                cases.append(Case(OURS, row_format, labels, row_sparse(table)))
            if on_disk or row_format != "fp32":
                continue
            if "sparse_adam" in systems:
                made = rival("sparse_adam", table.state(), torch.empty(0))
                cases.append(Case("sparse_adam", row_format, labels, made))
            wanted = [system for system in systems if system in DENSE]
            size_bytes = 4 * labels * group.width
            if table_bytes + size_bytes > budget_bytes:
                left_out += [f"{system} at {size}" for system in wanted]
            elif wanted:
                gradient_bytes = size_bytes
                dense += [(system, labels, table.state()) for system in wanted]
    gradient = torch.zeros(gradient_bytes // 4)
    cases += [Case(name, "fp32", n, rival(name, state, gradient)) for name, n, state in dense]
    return cases, left_out


def label_bytes(row_format: str, width: int) -> int:
    """Returns what a label takes."""
    return bytes_per_label(row_format, "global", width)  # type: ignore[arg-type]


def place(group: Group, scratch: Path) -> Placement:
    """Returns where the next table of a group goes; mapped files get a folder of their own."""
    if group.placement == "cpu":
        return Placement("cpu")
    return Placement("nvme", Path(tempfile.mkdtemp(dir=scratch)))


def take_turns(group: Group, cases: list[Case], rows: int) -> None:
    """Runs rounds for `group.seconds`, at least three; the first does not count."""
    encoder, rng = Encoder(group.width, rows), np.random.default_rng(0)
    source, target = torch.ones(COPY_ELEMENTS), torch.zeros(COPY_ELEMENTS)
    turns = [
        number
        for number, case in enumerate(cases)
        for _ in range(1 if case.system in DENSE else TURNS_OF_CHEAP)
    ]
    rounds, begun = 0, time.perf_counter()
    while rounds < 3 or time.perf_counter() - begun < group.seconds:
        for turn in rng.permutation(turns):
            case = cases[turn]
            label_ids = np.sort(rng.choice(case.labels, rows, replace=False))
            start = time.perf_counter()
            target.copy_(source)
            copy_s = time.perf_counter() - start
            taken = (*encoder.step(case.make, label_ids), copy_s)
            if rounds:
                for name, seconds in zip(("fetch", "update", "step", "copy"), taken, strict=True):
                    case.seconds[name].append(seconds)
        rounds += 1


def figures_of(group: Group, case: Case, rows: int) -> dict[str, Any]:
    """Returns one line of the results."""
    copied_bytes = 2 * 4 * COPY_ELEMENTS
    return {
        "system": case.system,
        "format": case.row_format,
        "placement": group.placement,
        "labels": case.labels,
        "width": group.width,
        "rows": rows,
        "update_s": median(case.seconds["update"]),
        "update_min_s": min(case.seconds["update"]),
        "fetch_s": median(case.seconds["fetch"]),
        "step_s": median(case.seconds["step"]),
        "step_min_s": min(case.seconds["step"]),
        "floor_s": 28 * rows * group.width / copied_bytes * median(case.seconds["copy"]),
        "turns": len(case.seconds["update"]),
    }


def measure(
    group: Group, systems: list[str], rows: int, scratch: Path | None
) -> tuple[list[dict[str, Any]], list[str]]:
    """Returns a group's figures, by system and size, and what was left out."""
    with tempfile.TemporaryDirectory(dir=scratch, prefix="label_scaling_") as folder:
        cases, left_out = make_cases(group, systems, Path(folder))
        if cases:
            take_turns(group, cases, rows)
        cases.sort(key=lambda case: (SYSTEMS.index(case.system), case.row_format, case.labels))
        figures = [figures_of(group, case, rows) for case in cases]
        del cases
        gc.collect()  # before the folder goes: tables in mapped files remove theirs
    return figures, left_out


def page(figures: list[dict[str, Any]], left_out: list[str]) -> str:
    """Returns the tables and what follows from them."""
    columns = ["system", "format", "labels", "fetch", "update", "fastest", "floor",
               "update / floor", "step", "fastest", "turns"]  # fmt: skip
    lines = [
        "Milliseconds. What the systems and columns are: `scripts/bench/label_scaling.py`.",
        "",
    ]
    for width, placement in dict.fromkeys((f["width"], f["placement"]) for f in figures):
        part = [f for f in figures if (f["width"], f["placement"]) == (width, placement)]
        rows = [
            [
                *(f["system"], f["format"], f"{f['labels']:,}"),
                *(f"{1e3 * f[key]:.1f}" for key in ("fetch_s", "update_s", "update_min_s")),
                *(f"{1e3 * f['floor_s']:.1f}", f"{f['update_s'] / f['floor_s']:.2f}"),
                *(f"{1e3 * f[key]:.1f}" for key in ("step_s", "step_min_s")),
                str(f["turns"]),
            ]
            for f in part
        ]
        where = {"cpu": "host memory", "nvme": "mapped files"}[placement]
        lines += [f"## D = {width}, R = {part[0]['rows']:,}, {where}", ""]
        lines += [results.table(columns, rows, texts=2), "", *conclusions(part), ""]
    if left_out:
        lines.append(f"Left out, too large for the free memory: {'; '.join(left_out)}.")
    return "\n".join(lines).strip()


def conclusions(part: list[dict[str, Any]]) -> list[str]:
    """Returns how flat ours is over the sizes of one group, and how far ahead of the dense one."""
    said = []
    for row_format in dict.fromkeys(f["format"] for f in part):
        ours = {f["labels"]: f for f in part if (f["system"], f["format"]) == (OURS, row_format)}
        if len(ours) > 1:
            small, large = ours[min(ours)], ours[max(ours)]
            said.append(
                f"- {row_format}, {max(ours):,} labels over {min(ours):,}: update "
                f"{large['update_s'] / small['update_s']:.2f}, step "
                f"{large['step_s'] / small['step_s']:.2f}"
            )
        dense = {f["labels"]: f for f in part if f["system"] == "deepspeed_dense"}
        for labels in sorted(ours.keys() & dense.keys()):
            update, step = (dense[labels][k] / ours[labels][k] for k in ("update_s", "step_s"))
            said.append(
                f"- {row_format}, {labels:,} labels, against DeepSpeed's CPUAdam over all rows: "
                f"update {update:.1f} times faster, step {step:.1f} times"
            )
    return said


def plot(figures: list[dict[str, Any]]) -> results.LogLogPlot:
    """Returns the update over the number of labels, at the width with the most sizes."""
    on_host = [f for f in figures if f["placement"] == "cpu"]
    widths = [f["width"] for f in on_host]
    width = max(dict.fromkeys(widths), key=widths.count)
    part = [f for f in on_host if f["width"] == width]
    lines: dict[str, list[results.Point]] = {}
    for figure in part:
        name = NAMES[figure["system"]]
        if figure["system"] == OURS:
            name += f", {figure['format']}"
        lines.setdefault(name, []).append((figure["labels"], 1e3 * figure["update_s"]))
    floor = "copy of the bytes of fp32"
    lines[floor] = [
        (f["labels"], 1e3 * f["floor_s"])
        for f in part
        if (f["system"], f["format"]) == (OURS, "fp32")
    ]
    return results.LogLogPlot(
        title=f"Classifier update that touches {part[0]['rows']:,} rows of width {width}",
        x_label="labels",
        y_label="update, ms",
        lines=lines,
        floor=floor,
    )


def main() -> None:
    """Measures the groups and writes what was asked for."""
    parser = results.parser(__doc__, quick="up to 300,000 labels, half a minute")
    parser.add_argument("--labels", type=int, nargs="+", metavar="L", help="one group, these sizes")
    parser.add_argument("--width", type=int, default=768, help="of that group (default: 768)")
    parser.add_argument("--seconds", type=float, default=60, help="of that group (default: 60)")
    parser.add_argument("--placement", choices=("cpu", "nvme"), default="cpu", help="of that group")
    parser.add_argument("--formats", nargs="+", default=["fp32"], help="of that group's rows")
    parser.add_argument("--rows", type=int, default=4096, help="touched a step (default: 4,096)")
    parser.add_argument("--systems", nargs="+", default=list(SYSTEMS), choices=SYSTEMS)
    parser.add_argument("--scratch", type=Path, help="where mapped files go (default: /tmp)")
    args = parser.parse_args()
    groups = QUICK if args.quick else FULL
    if args.labels:
        sizes, formats = tuple(args.labels), tuple(args.formats)
        groups = (Group(args.width, sizes, args.seconds, args.placement, formats),)
    figures, left_out = [], []
    for group in groups:
        measured, missing = measure(group, args.systems, args.rows, args.scratch)
        figures += measured
        left_out += missing
    results.publish(
        "label_scaling",
        args,
        figures,
        title="A step against the number of labels",
        body=page(figures, left_out),
        plot=plot(figures),
    )


if __name__ == "__main__":
    main()
