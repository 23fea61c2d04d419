"""Runs the whole chain at the LF-AmazonTitles-1.3M shape and says what each stage takes.

    python scripts/bench/scale.py [--quick] [--json FILE] [--results DIR] [--scratch DIR]

Stages, each in a process of its own, so that its peak memory is its own:

- make: `scripts/make_synthetic.py`, then an untrained two-layer encoder over its words.
- prepare: raw files to a prepared corpus.
- load: batches (plan, tokens, chunks) alone; what stays in memory after many of them.
- table: the classifier table alone at its full size, on the host: what it takes when new and
  after a few steps. Memory of moments never touched is not resident yet: `table_gib` is all of it.
- train: the real trainer (one rank, `ds_configs/cpu.json`) with the classifier table at its full
  size: start-up, steps, a checkpoint, an evaluation. Once per `--format`.
- nvme: the table in mapped files, larger than the memory that the process may have (a memory
  cgroup, where this process may make one), against the same updates in host memory.

`anon` is memory that only swap could take back (RssAnon); `peak` is the most resident memory,
mapped files included (VmHWM). CPU seconds are those of all threads: the ones to compare on a shared
machine. Scratch: some 40 GB at the full shape; removed at the end unless named with --scratch,
where stages that are complete are not made again.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import results
from scale_stages import ENCODER_WIDTH, load, make, nvme, prepare_corpus, table, train
from stages import Figures, apart

sys.path.insert(0, str(results.ROOT / "scripts"))

from make_synthetic import SHAPES, Sizes

FULL = SHAPES["1.3m"]
QUICK = Sizes(20_000, 2_000, 30_000, 22.2)


def page(about: dict[str, str], stages: dict[str, Figures]) -> str:
    """Returns the tables."""
    lines = [
        "Made-up corpus (`scripts/make_synthetic.py`), an untrained two-layer encoder of width "
        f"{ENCODER_WIDTH}: this measures everything but the encoder. What each stage is and what "
        "`anon` and `peak` mean: `scripts/bench/scale.py`.",
        "",
        *(f"- {name}: {value}" for name, value in about.items()),
    ]
    for stage, figures in stages.items():
        rows = [[name.replace("_", " "), in_words(value)] for name, value in figures.items()]
        lines += ["", f"## {stage}", "", results.table(["", ""], rows)]
    return "\n".join(lines)


def in_words(value: float) -> str:
    """Returns a figure with four digits, or all of a large one."""
    return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def main() -> None:
    """Runs the stages and writes what was asked for."""
    parser = results.parser(__doc__, quick="30,000 labels, a few steps")
    parser.add_argument("--scratch", type=Path, help="keep the files here, and use what is there")
    parser.add_argument("--test-queries", type=int, default=20_000, help="default: 20,000")
    parser.add_argument("--steps", type=int, default=200, help="default: 200")
    parser.add_argument(
        "--eval-queries", type=int, default=1_000, help="0 skips the evaluation (default: 1,000)"
    )
    parser.add_argument("--width", type=int, default=768, help="of the rows (default: 768)")
    parser.add_argument("--format", action="append", help="of the rows (default: fp32, rowwise)")
    parser.add_argument("--only", action="append", metavar="STAGE", help="such as make, prepare")
    args = parser.parse_args()
    sizes = QUICK if args.quick else FULL._replace(test_queries=args.test_queries)
    settings = {
        "batch_size": 256 if args.quick else 1024,
        "pool_size": 2_048 if args.quick else 8_192,
        "width": 128 if args.quick else args.width,
        "steps": 12 if args.quick else args.steps,
        "eval_queries": 100 if args.quick else args.eval_queries,
    }
    scratch = args.scratch or Path(tempfile.mkdtemp(prefix="scale_"))
    scratch.mkdir(parents=True, exist_ok=True)
    stages: dict[str, Figures] = {}

    def run(name: str, stage: Callable[..., Figures], *stage_args: Any) -> None:
        done = scratch / f"{name.replace(' ', '_')}.figures.json"
        if args.only and name.split()[0] not in args.only and not done.is_file():
            return
        if not done.is_file():
            done.write_text(json.dumps(apart(stage, *stage_args)))
        stages[name] = json.loads(done.read_text())
        print(name, {key: float(f"{value:.4g}") for key, value in stages[name].items()}, flush=True)

    try:
        run("make", make, scratch, sizes, 0)
        run("prepare", prepare_corpus, scratch)
        for batch_size, pool_size in ((1_024, 9_000), (16_384, 135_000)):
            num_batches = 40 if args.quick else max(20, 300 * 1_024 // batch_size)
            run(f"load B={batch_size}", load, scratch, batch_size, pool_size, num_batches)
        formats = args.format or ("fp32", "rowwise")
        for row_format in formats:
            run(f"table {row_format}", table, row_format, sizes.labels, settings["width"], 20)
        for row_format in formats:
            run(f"train {row_format}", train, scratch, row_format, settings)
        num_labels, limit_bytes = (20_000, 100 << 20) if args.quick else (131_073, 600 << 20)
        run("nvme", nvme, scratch, num_labels, 768, 10 if args.quick else 20, limit_bytes)
    finally:
        if args.scratch is None:
            shutil.rmtree(scratch)
    about = {
        "sizes": ", ".join(f"{name} {value:,}" for name, value in sizes._asdict().items()),
        "settings": ", ".join(f"{name} {value:,}" for name, value in settings.items()),
    }
    results.publish(
        "scale",
        args,
        {"about": about, "stages": stages},
        title="The whole chain at the shape of LF-AmazonTitles-1.3M",
        body=page(about, stages),
    )


if __name__ == "__main__":
    main()
