"""Time, memory, FLOPs and communication of a step of UniDEC and of its rivals.

    python scripts/bench/rivals.py [--quick] [--json FILE] [--results DIR]

Made-up corpora of 10,000 to 1,000,000 labels and an untrained two-layer encoder of width 64
(--width); every system takes the steps of the real trainer, at one rank and at two real gloo ranks,
each run in processes of its own.

- psl: UniDEC, both heads, a pool of 1,024 labels (random hard negatives fill it).
- pol, pal: one positive of each query (dual encoder), and all of them (both heads).
- dexml: dual encoder alone, decoupled softmax over all labels, which are all encoded.
- renee: classifier alone, binary cross-entropy over all labels, streamed, SGD with momentum.
- zero_offload: psl with the classifier as a parameter of the DeepSpeed engine
  (`scripts/bench/dense_offload.py`).

`step_s` is the median over the steps after the first, on rank 0. `peak_bytes` is the most resident
memory of a rank, the imported libraries included. `flops` are the matrix products of a step, which
torch counts in one more step, of all ranks together; the formula is `rival_costs.step_flops`.
`comm_bytes` is what a rank hands to collectives in a step: `own_comm_bytes` by `unidec_ds.comm`,
`engine_comm_bytes` by DeepSpeed for all that is its parameter. Sizes whose run would take longer
than --limit seconds, or more memory than is free, are extrapolated in a straight line from the two
largest sizes measured, and marked.

The last table is the paper's claim: an epoch of the rivals against UniDEC's on three public sets,
FLOPs by formula with the recipes' encoder, batch and pool, and time at the rate of FLOPs that each
system reaches here with an encoder of --rate-width, on one rank.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import results
from rival_costs import epoch_rows
from rival_runs import Figures, make_corpus, measure, recipe_file

SYSTEMS = ("psl", "pol", "pal", "dexml", "renee", "zero_offload")
FULL, QUICK = (10_000, 30_000, 100_000, 300_000, 1_000_000), (1_000, 3_000)
QUICK_SYSTEMS = ("psl", "dexml", "renee")
MEMORY_SHARE = 0.8
NAMES = {"psl": "UniDEC", "dexml": "DEXML", "renee": "Renee"}
GROWS_WITH_LABELS = ("step_s", "peak_bytes", "flops", "formula_flops", "comm_bytes",
                     "own_comm_bytes", "engine_comm_bytes")  # fmt: skip
RATE_WIDTH, RATE_LABELS = 768, {"psl": 3_000, "dexml": 3_000, "renee": 100_000}


def measure_all(
    work: Path, sizes: Sequence[int], systems: Sequence[str], args: Any
) -> list[Figures]:
    """Returns one line for each system, world size and number of labels."""
    from unidec_ds.classifier.capacity import host_free_bytes

    made: list[Figures] = []
    for labels in sizes:
        make_corpus(work, labels, args.width)
        for system in systems:
            path = recipe_file(work, system, labels, args.batch_size, args.pool_size)
            for world_size in args.ranks:
                if args.quick and world_size > 1 and labels < sizes[-1]:
                    continue
                line = {"system": system, "labels": labels, "world_size": world_size}
                known = [
                    f for f in made
                    if (f["system"], f["world_size"]) == (system, world_size)
                ][-2:]  # fmt: skip
                guess = extrapolate(known, labels) if len(known) == 2 else None
                if guess and (
                    guess["extrapolated"]
                    or guess["step_s"] * (args.steps + 2) > args.limit
                    or guess["peak_bytes"] * world_size > MEMORY_SHARE * host_free_bytes()
                ):
                    made.append({**guess, **line, "extrapolated": True})
                    continue
                figures = measure(path, system, world_size, args.steps)
                made.append({**line, **figures, "extrapolated": False})
                print(
                    f"{system}, {labels:,} labels, {world_size} ranks: "
                    f"{figures['step_s']:.3f} s, {figures['peak_bytes'] / 2**20:,.0f} MiB",
                    file=sys.stderr,
                    flush=True,
                )
    return made


def extrapolate(known: list[Figures], labels: int) -> Figures:
    """Returns the figures of a size on the straight line through two others."""
    small, large = known
    reach = (labels - large["labels"]) / (large["labels"] - small["labels"])
    grown = {key: large[key] + reach * (large[key] - small[key]) for key in GROWS_WITH_LABELS}
    scores_all = large["pool"] == large["labels"]
    return {**large, **grown, "pool": labels if scores_all else large["pool"]}


def flop_rates(work: Path, figures: list[Figures], args: Any) -> dict[str, float]:
    """Returns the FLOPs a second of UniDEC, DEXML and Renee; empty if one was not measured."""
    if not args.rate_width:
        measured = {
            f["system"]: f for f in figures if f["world_size"] == 1 and not f["extrapolated"]
        }
    elif set(RATE_LABELS) <= {f["system"] for f in figures}:
        measured = {}
        for system, labels in RATE_LABELS.items():
            make_corpus(work, labels, args.rate_width)
            path = recipe_file(work, system, labels, args.batch_size, args.pool_size)
            measured[system] = measure(path, system, 1, args.steps)
    else:
        return {}
    if not set(RATE_LABELS) <= set(measured):
        return {}
    return {name: measured[name]["flops"] / measured[name]["step_s"] for name in RATE_LABELS}


def page(figures: list[Figures], epochs: list[Figures], args: Any) -> str:
    """Returns the tables."""
    rates_note = "the figures above"
    if args.rate_width:
        sizes = ", ".join(f"{NAMES[name]} {labels:,}" for name, labels in RATE_LABELS.items())
        rates_note = f"a two-layer encoder of width {args.rate_width} (labels: {sizes})"
    rows = [
        [
            *(f["system"], f"{f['labels']:,}{' *' if f['extrapolated'] else ''}"),
            *(str(f["world_size"]), f"{f['pool']:,}", f"{1e3 * f['step_s']:,.0f}"),
            *(f"{f['peak_bytes'] / 2**20:,.0f}", f"{f['flops'] / 1e9:,.2f}"),
            *(f"{f['formula_flops'] / f['flops']:.3f}", f"{f['own_comm_bytes']:,.0f}"),
            f"{f['engine_comm_bytes']:,.0f}",
        ]
        for f in figures
    ]
    columns = ["system", "labels", "ranks", "pool", "step ms", "peak MiB", "GFLOP", "formula",
               "bytes, ours", "bytes, engine"]  # fmt: skip
    claim = [
        [
            *(f["set"], NAMES[f["system"].removeprefix("epoch:")]),
            *(f"{f['labels']:,}", str(f["world_size"]), f"{f['epoch_flops'] / 1e15:,.2f}"),
            *(f"{f['times_unidec_flops']:.2f}", f"{f['epoch_s'] / 3600:,.1f}"),
            *(f"{f['times_unidec_s']:.2f}", f"{f['peak_bytes'] / 2**30:.2f}"),
            f"{f['comm_bytes'] / 2**20:.1f}",
        ]
        for f in epochs
    ]
    claimed = ["set", "system", "labels", "GPUs", "PFLOP a GPU and epoch", "x UniDEC",
               "hours", "x UniDEC", "labels GiB a GPU", "MiB sent a step"]  # fmt: skip
    return "\n".join(
        [
            f"Batch {args.batch_size}, pool of psl {args.pool_size}, two-layer encoder of width "
            f"{args.width}, medians of {args.steps} steps. What the systems and columns are: "
            "`scripts/bench/rivals.py`. `formula` is the FLOPs by formula over those counted; "
            "bytes are a step's, on one rank. * extrapolated.",
            "",
            results.table(columns, rows),
            "",
            "## An epoch on the public sets",
            "",
            "DistilBERT, the recipes' batch, pool and text length; FLOPs by formula, hours at the "
            f"rate of FLOPs that the system reached on one rank with {rates_note}, so of this "
            "machine's and without communication. `MiB sent` is handed to collectives, nearly all "
            "of it gradients and weights of the encoder, in bf16. `labels GiB` is what a GPU holds "
            "of the labels: UniDEC's pool (vectors, rows and their gradients), DEXML's vectors and "
            "gradients, Renee's rows and momentum (which an offloading ds_config puts on the "
            "host).",
            "",
            results.table(claimed, claim, texts=2),
            "",
            *conclusions(epochs),
        ]
    )


def conclusions(epochs: list[Figures]) -> list[str]:
    """Returns what the last table says of the paper's claim of 4 to 16 times less compute."""
    if not epochs:
        return []
    said = [
        "The paper claims 4 to 16 times less compute than training over the whole label space.",
        "",
    ]
    for system in ("dexml", "renee"):
        part = [f for f in epochs if f["system"] == f"epoch:{system}" and f["world_size"] == 1]
        ratios = ", ".join(f"{f['times_unidec_flops']:.2f} on {f['set']}" for f in part)
        said.append(f"- {NAMES[system]}'s epoch takes this many times UniDEC's FLOPs: {ratios}.")
    for system in ("dexml", "renee"):
        part = [f for f in epochs if f["system"] == f"epoch:{system}" and f["world_size"] == 16]
        ratios = ", ".join(f"{f['times_unidec_on_one_s']:.2f} on {f['set']}" for f in part)
        said.append(
            f"- {NAMES[system]}'s epoch on 16 GPUs takes this many times as long as UniDEC's on "
            f"one, and 16 times that in GPU hours: {ratios}."
        )
    said.append(
        "- Renee encodes no label's text, so it takes fewer FLOPs than UniDEC, and memory and its "
        "traffic for all rows instead. Its published figures start from an encoder that NGAME "
        "trained, and go over the label texts as queries too; neither is counted here."
    )
    return said


def plot(figures: list[Figures]) -> results.LogLogPlot:
    """Returns the step over the number of labels, on one rank; * where some are extrapolated."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for system in dict.fromkeys(f["system"] for f in figures):
        own = [f for f in figures if (f["system"], f["world_size"]) == (system, 1)]
        name = f"{system} *" if any(f["extrapolated"] for f in own) else system
        lines[name] = [(f["labels"], 1e3 * f["step_s"]) for f in own]
    return results.LogLogPlot(
        title="A training step, all labels against a pool (* extrapolated at the largest sizes)",
        x_label="labels",
        y_label="step, ms",
        lines=lines,
    )


def main() -> None:
    """Measures the systems and writes what was asked for."""
    parser = results.parser(
        __doc__, quick="three systems at 1,000 and 3,000 labels, two ranks once"
    )
    parser.add_argument("--labels", type=int, nargs="+", metavar="L", help="ascending sizes")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, help="default: all")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], metavar="W")
    parser.add_argument("--width", type=int, default=64, help="of the encoder (default: 64)")
    parser.add_argument(
        "--rate-width",
        type=int,
        help="of the encoder for rates of FLOPs (default: 768; 0: --width)",
    )
    parser.add_argument("--batch-size", type=int, default=None, help="default: 256")
    parser.add_argument("--pool-size", type=int, default=None, help="of psl (default: 1,024)")
    parser.add_argument("--steps", type=int, default=None, help="that count (default: 3)")
    parser.add_argument("--limit", type=float, default=300, help="seconds a run (default: 300)")
    parser.add_argument("--work", type=Path, help="keep the prepared corpora here")
    args = parser.parse_args()
    args.batch_size = args.batch_size or (64 if args.quick else 256)
    args.pool_size = args.pool_size or (256 if args.quick else 1024)
    args.steps = args.steps or (2 if args.quick else 3)
    if args.rate_width is None:
        args.rate_width = 0 if args.quick else RATE_WIDTH
    systems = args.systems or (QUICK_SYSTEMS if args.quick else SYSTEMS)
    sizes = sorted(args.labels or (QUICK if args.quick else FULL))
    with tempfile.TemporaryDirectory(prefix="rivals_") as temporary:
        work = args.work or Path(temporary)
        figures = measure_all(work, sizes, systems, args)
        rates = flop_rates(work / "wide", figures, args)
    epochs = epoch_rows(rates) if rates else []
    results.publish(
        "rivals",
        args,
        [*figures, *epochs],
        title="UniDEC and its rivals, step by step",
        body=page(figures, epochs, args),
        plot=plot(figures),
    )


if __name__ == "__main__":
    main()
