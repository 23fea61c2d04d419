"""What the benchmarks share: their options, the machine's description and their result files.

    parser = results.parser(__doc__, quick="what --quick leaves out")
    ...
    results.publish("NAME", args, figures, title=..., body=..., plot=...)

A full run leaves `results/NAME.md` and, with a plot, `results/NAME.png` beside this file; these are
committed. A `--quick` run leaves them alone unless `--results DIR` names a folder. `--json FILE`
takes the bare figures, whatever the run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results"
_PACKAGES = ("torch", "deepspeed", "transformers", "numpy")
_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")  # what decides the speed of our kernels
_COLOURS = ("#1f5fbf", "#c2540a", "#1a7f4e", "#8a3ffc", "#b5196b", "#0b7285")
_INK, _MUTED, _GRID = "#1f2429", "#57606b", "#dfe3e8"
_LABEL_HEIGHT = 0.062  # of the axes: two labels at the end of lines are at least that far apart

Point = tuple[float, float]


@dataclass(frozen=True)
class LogLogPlot:
    """Lines over two logarithmic axes, each labelled at its right end."""

    title: str
    x_label: str
    """With its unit."""
    y_label: str
    """With its unit."""
    lines: Mapping[str, Sequence[Point]]
    """Points by name, x ascending."""
    floor: str | None = None
    """The line to draw dashed and grey: what no system can beat."""


def parser(doc: str | None, quick: str) -> argparse.ArgumentParser:
    """Returns a parser with the options that every benchmark has.

    Args:
        doc: the benchmark's docstring; its first line describes it.
        quick: what a quick run is.
    """
    made = argparse.ArgumentParser(description=(doc or "").split("\n")[0])
    made.add_argument("--quick", action="store_true", help=quick)
    made.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    made.add_argument(
        "--results", type=Path, metavar="DIR",
        help="folder of the table and the plot (default: scripts/bench/results; --quick: none)",
    )  # fmt: skip
    return made


def publish(
    name: str,
    args: argparse.Namespace,
    figures: Any,
    *,
    title: str,
    body: str,
    plot: LogLogPlot | None = None,
) -> None:
    """Prints the results and writes the files that `args`, of `parser`, ask for.

    Args:
        name: of the files.
        args: the parsed options.
        figures: plain data, for `--json`.
        title: heading of the page.
        body: Markdown.
        plot: drawn beside it.
    """
    print("\n" + body, flush=True)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    folder = args.results or (None if args.quick else RESULTS)
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    page = [f"# {title}", "", body, ""]
    if plot is not None:
        draw(plot, folder / f"{name}.png")
        page += [f"![{plot.title}]({name}.png)", ""]
    page += ["## Run", "", "```", command(), "```", ""]
    page += [f"- {key}: {value}" for key, value in machine().items()]
    (folder / f"{name}.md").write_text("\n".join(page) + "\n", encoding="utf-8")


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], texts: int = 1) -> str:
    """Returns a Markdown table whose first `texts` columns are words and the others numbers."""
    rule = ["---"] * texts + ["--:"] * (len(columns) - texts)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (columns, rule, *rows))


def command() -> str:
    """Returns the command line, as it is typed in the repository's root."""
    script = Path(sys.argv[0]).resolve()
    if script.is_relative_to(ROOT):
        script = script.relative_to(ROOT)
    threads = os.environ.get("OMP_NUM_THREADS")
    prefix = f"OMP_NUM_THREADS={threads} " if threads else ""
    return prefix + shlex.join(["python", str(script), *sys.argv[1:]])


def machine() -> dict[str, str]:
    """Returns what the figures depend on beside the command."""
    import torch

    model, flags = _cpu()
    threads = f"{torch.get_num_threads()} threads"
    about = {
        "processor": f"{model}, {len(os.sched_getaffinity(0))} cores, {threads}; {flags}",
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB",
        "load": f"{os.getloadavg()[0]:.1f} when the run ended, the run itself included",
        "versions": ", ".join(
            [f"Python {platform.python_version()}", *(f"{p} {version(p)}" for p in _PACKAGES)]
        ),
        "commit": _commit(),
    }
    if torch.cuda.is_available():
        about["accelerator"] = torch.cuda.get_device_name()
    return about


def _cpu() -> tuple[str, str]:
    """Returns the processor's name and those of its instruction sets that matter here."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor() or platform.machine(), "instruction sets unknown"
    fields = dict(
        (part.strip() for part in line.split(":", 1))
        for line in info.read_text().split("\n\n")[0].splitlines()
        if ":" in line
    )
    found = set(fields.get("flags", "").split())
    names = [f"{name} {'yes' if name in found else 'no'}" for name in _FLAGS]
    return fields.get("model name", platform.machine()), ", ".join(names)


def _commit() -> str:
    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False
        )
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", "unidec_ds", "scripts")
    return (git("rev-parse", "HEAD") or "unknown") + (" with changes" if changed else "")


def draw(plot: LogLogPlot, path: Path) -> None:
    """Writes the plot as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.4), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    axes.set(xscale="log", yscale="log")
    axes.set_title(plot.title, loc="left", fontsize=14, color=_INK, pad=12)
    axes.set_xlabel(plot.x_label, fontsize=12, color=_MUTED)
    axes.set_ylabel(plot.y_label, fontsize=12, color=_MUTED)
    axes.tick_params(which="both", labelsize=11, colors=_MUTED, length=0)
    axes.grid(color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(_GRID)
    colours = iter(_COLOURS * 4)
    ends: list[tuple[str, Point, str]] = []
    for name, points in plot.lines.items():
        is_floor = name == plot.floor
        colour = _MUTED if is_floor else next(colours)
        style = {"linestyle": "--", "linewidth": 1.6} if is_floor else {"marker": "o"}
        axes.plot(*zip(*points, strict=True), color=colour, **{"linewidth": 2.2, **style})
        ends.append((name, points[-1], colour))
    figure.draw_without_rendering()  # the limits are now final
    to_axes = axes.transData + axes.transAxes.inverted()
    places = [to_axes.transform(point) for _, point, _ in ends]
    heights = _spread([float(y) for _, y in places])
    for (name, point, colour), height in zip(ends, heights, strict=True):
        axes.annotate(
            name, point, xytext=(1.03, height), textcoords="axes fraction", fontsize=11.5,
            color=colour, va="center", annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "alpha": 0.35, "linewidth": 0.8},
        )  # fmt: skip
    figure.savefig(path, facecolor="white")


def _spread(heights: list[float]) -> list[float]:
    """Returns the heights moved up as little as keeps each `_LABEL_HEIGHT` from the one below."""
    moved = list(heights)
    below = float("-inf")
    for place in sorted(range(len(heights)), key=heights.__getitem__):
        moved[place] = max(heights[place], below + _LABEL_HEIGHT)
        below = moved[place]
    return moved
