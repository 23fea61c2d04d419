"""Small charts: as SVG that follows the page's colours, light or dark, or as an image.

Charts are drawn by matplotlib in the colours of `_COLOURS`. In SVG every one of these becomes a CSS
variable of the page, text stays text in the page's font, and all ids get the chart's own prefix, so
that many charts can stand in one page. pyplot is not used: there is no global state.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from unidec_ds.metrics import FrequencyBin

_COLOURS = {
    "ink": "#1f2429",
    "muted": "#57606b",
    "grid": "#dfe3e8",
    "surface": "#fffffe",
    "series-1": "#1f5fbf",
    "series-2": "#c2540a",
    "series-3": "#1a7f4e",
    "series-4": "#8a3ffc",
    "series-5": "#b5196b",
    "series-6": "#0b7285",
    "series-7": "#8f6a00",
    "series-8": "#6b7280",
}
"""By CSS variable; the values are those of the light page."""

_SERIES = [value for name, value in _COLOURS.items() if name.startswith("series")]
_DASHES: list[Any] = ["-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1, 2))]
_STYLE = {
    "font.family": ["DejaVu Sans"],
    "font.size": 12,
    "svg.fonttype": "none",
    "text.color": _COLOURS["ink"],
    "axes.facecolor": "none",
    "axes.edgecolor": _COLOURS["grid"],
    "axes.labelcolor": _COLOURS["muted"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.unicode_minus": False,
    "grid.color": _COLOURS["grid"],
    "grid.linewidth": 0.8,
    "xtick.color": _COLOURS["muted"],
    "ytick.color": _COLOURS["muted"],
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
}
_WIDTH, _HEIGHT = 320, 200  # in CSS pixels where the page is narrow; wider pages scale them up
_MOST_POINTS = 160


class Key(NamedTuple):
    """One entry of a legend."""

    name: str
    series: int
    """1, 2, ...: the colour, and for lines the dashes."""


@dataclass(frozen=True)
class Chart:
    """A finished chart."""

    title: str
    svg: str
    """Markup to stand in an HTML page."""
    legend: list[Key]
    """Empty where there is nothing to tell apart."""
    mark: Literal["line", "area"]
    """How the legend's entries look."""
    note: str = ""
    """What a reader must know."""


class Series(NamedTuple):
    """One line of a line chart, or one layer of an area chart."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    series: int = 0
    """1, 2, ...: which colour; 0 takes the next."""


class Bars(NamedTuple):
    """One colour of a bar chart: a value for each category."""

    name: str
    values: Sequence[float]
    series: int = 0
    """As in `Series`."""


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    x_label: str,
    points: bool = False,
    from_zero: bool = False,
) -> Chart:
    """Draws values over steps or epochs.

    Args:
        title: of the chart.
        series: at least one; long ones are averaged in pieces.
        x_label: what x counts.
        points: mark every point, for few of them.
        from_zero: start the vertical axis at 0.
    """
    with _drawing() as (figure, axes):
        per_point = 1
        legend = _keys(series)
        for line, key in zip(series, legend, strict=True):
            x, y, per_point = _thin(line.x, line.y)
            axes.plot(
                x,
                y,
                color=_SERIES[key.series - 1],
                linestyle=_DASHES[(key.series - 1) % len(_DASHES)],
                linewidth=1.8,
                marker="o" if points or len(x) == 1 else None,
                markersize=4,
            )
        _label(axes, x_label)
        if from_zero:
            axes.set_ylim(bottom=0)
        return _finish(
            figure, title, legend if len(legend) > 1 else [], "line", _averaged(per_point)
        )


def area_chart(title: str, series: Sequence[Series], *, x_label: str) -> Chart:
    """Draws parts that add up, one above the other; all series have the same x.

    Rare peaks (over three times the median sum) are cut off, and the note says so.
    """
    with _drawing() as (figure, axes):
        thinned = [_thin(layer.x, layer.y) for layer in series]
        x, _, per_point = thinned[0]
        layers = [y for _, y, _ in thinned]
        if len(x) == 1:  # one step is a bar
            x, layers = np.array([x[0] - 0.5, x[0] + 0.5]), [np.repeat(y, 2) for y in layers]
        axes.stackplot(
            x, layers, colors=_SERIES, edgecolor=_COLOURS["surface"], linewidth=0.6, linestyle="-"
        )
        axes.margins(x=0)
        sums = np.sum(layers, axis=0)
        top = 3 * np.median(sums)
        is_cut = bool(top > 0) and bool(sums.max() > top)
        axes.set_ylim(0, top if is_cut else None)
        _label(axes, x_label)
        legend = _keys(series)
        notes = [
            _averaged(per_point),
            f"peaks are cut off, the highest is {sums.max():.3g}" if is_cut else "",
        ]
        return _finish(figure, title, legend, "area", "; ".join(filter(None, notes)))


def stacked_bars(title: str, categories: Sequence[str], parts: Sequence[Bars]) -> Chart:
    """Draws one horizontal bar per category, made of parts that add up, with their sum."""
    with _drawing(height=60 + 34 * len(categories)) as (figure, axes):
        _draw_stacked(axes, categories, parts)
        legend = _keys(parts)
        return _finish(figure, title, legend, "area")


def horizontal_bars(
    title: str, categories: Sequence[str], values: Sequence[float], unit: str
) -> Chart:
    """Draws one horizontal bar per category, with its value."""
    with _drawing(height=30 + 22 * len(categories)) as (figure, axes):
        places = np.arange(len(categories))
        axes.barh(places, values, height=0.7, color=_SERIES[0])
        for place, value in zip(places, values, strict=True):
            axes.annotate(
                f"{value:.1f}{unit}", (value, place), xytext=(4, 0), textcoords="offset points",
                va="center", color=_COLOURS["ink"],
            )  # fmt: skip
        axes.set_yticks(places, categories)
        axes.invert_yaxis()
        axes.set_xlim(0, 1.2 * max([*values, 1e-9]))
        axes.set_xticks([])
        axes.spines["bottom"].set_visible(False)
        axes.grid(visible=False)
        return _finish(figure, title, [], "area")


def grouped_bars(title: str, categories: Sequence[str], groups: Sequence[Bars]) -> Chart:
    """Draws the groups' values side by side in each category."""
    with _drawing() as (figure, axes):
        width = 0.8 / len(groups)
        places = np.arange(len(categories))
        legend = _keys(groups)
        for number, (group, key) in enumerate(zip(groups, legend, strict=True)):
            offset = (number - (len(groups) - 1) / 2) * width
            axes.bar(places + offset, group.values, 0.9 * width, color=_SERIES[key.series - 1])
        axes.set_xticks(places, categories)
        axes.set_ylim(bottom=0)
        return _finish(figure, title, legend, "area")


def precision_parts(
    breakdown: Mapping[str, Sequence[Mapping[str, Any]]], metric: str
) -> tuple[list[str], list[Bars]]:
    """Returns the views, and what the head, the torso and the tail add to each view's metric.

    Args:
        breakdown: by view, each bin as plain data (`FrequencyBin`).
        metric: "P@k".
    """
    names = [part["name"] for part in next(iter(breakdown.values()))]
    parts = [
        Bars(name, [bins[index]["scores"][metric] for bins in breakdown.values()])
        for index, name in enumerate(names)
    ]
    return list(breakdown), parts


def frequency_image(
    breakdown: Mapping[str, Sequence[FrequencyBin]], *, title: str
) -> NDArray[np.uint8]:
    """Draws what labels of each train frequency add to P@1 and P@5; returns RGB [H, 350, 3].

    That is as wide as TensorBoard shows an image: it scales others without smoothing.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    plain = {
        view: [{"name": part.name, "scores": part.scores} for part in bins]
        for view, bins in breakdown.items()
    }
    with matplotlib.rc_context({**_STYLE, "font.size": 8}):
        figure = Figure(
            figsize=(3.5, 1.5 + 0.5 * len(plain)), dpi=100, layout="constrained", facecolor="white"
        )
        canvas = FigureCanvasAgg(figure)
        for axes, metric in zip(figure.subplots(2), ("P@1", "P@5"), strict=True):
            views, parts = precision_parts(plain, metric)
            _draw_stacked(axes, views, parts)
            axes.set_title(f"{metric}, percent", fontsize=8)
        handles = [Patch(color=_SERIES[n], label=part.name) for n, part in enumerate(parts)]
        figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
        figure.suptitle(f"By train frequency of the label: {title}", fontsize=9)
        canvas.draw()
        image: NDArray[np.uint8] = np.array(canvas.buffer_rgba())[..., :3]
    return image


def _keys(series: Sequence[Series | Bars]) -> list[Key]:
    """Returns the legend: each one's own colour, or that of its place."""
    return [
        Key(one.name, one.series or number % len(_SERIES) + 1) for number, one in enumerate(series)
    ]


def _draw_stacked(axes: Any, categories: Sequence[str], parts: Sequence[Bars]) -> None:
    places, sums = np.arange(len(categories)), np.zeros(len(categories))
    for number, part in enumerate(parts):
        axes.barh(places, part.values, height=0.62, left=sums, color=_SERIES[number],
                  edgecolor=_COLOURS["surface"], linewidth=0.8)  # fmt: skip
        sums = sums + np.asarray(part.values)
    for place, total in zip(places, sums, strict=True):
        axes.annotate(f"{total:.1f}", (total, place), xytext=(4, 0), textcoords="offset points",
                      va="center", color=_COLOURS["ink"])  # fmt: skip
    axes.set_yticks(places, categories)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.15 * max(sums.max(), 1e-9))
    axes.grid(visible=True, axis="x")
    axes.grid(visible=False, axis="y")
    axes.xaxis.set_major_locator(_nice_ticks())


@contextmanager
def _drawing(height: int = _HEIGHT) -> Iterator[tuple[Any, Any]]:
    """Yields a figure and its axes, in the style of all charts."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH / 72, height / 72), layout="constrained")
        yield figure, figure.subplots()


def _label(axes: Any, x_label: str) -> None:
    from matplotlib.ticker import FuncFormatter

    axes.set_xlabel(x_label)
    axes.xaxis.set_major_locator(_nice_ticks(integer=True))
    axes.yaxis.set_major_locator(_nice_ticks())
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))


def _nice_ticks(integer: bool = False) -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(4, integer=integer, steps=[1, 2, 2.5, 5, 10])


def _short(value: float) -> str:
    """Returns a number in at most some six characters: 0.25, 12, 1,500, 40k, 1.3M, 2e-05."""
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:g}M"
    if size >= 1e4:
        return f"{value / 1e3:g}k"
    if size >= 1e3:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def _thin(x: Sequence[float], y: Sequence[float]) -> tuple[Any, Any, int]:
    """Returns at most `_MOST_POINTS` points, each the mean of so many neighbours."""
    per_point = -(-len(x) // _MOST_POINTS)
    starts = np.arange(0, len(x), per_point)
    sizes = np.diff(np.append(starts, len(x)))
    x_means, y_means = (np.add.reduceat(np.asarray(v, float), starts) / sizes for v in (x, y))
    return x_means, y_means, per_point


def _averaged(per_point: int) -> str:
    return f"each point is the mean of {per_point} logged steps" if per_point > 1 else ""


def _finish(
    figure: Any, title: str, legend: list[Key], mark: Literal["line", "area"], note: str = ""
) -> Chart:
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": title}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return Chart(title, _for_page(buffer.getvalue(), title), legend, mark, note)


def _for_page(svg: str, title: str) -> str:
    """Makes a matplotlib SVG file part of a page: its colours, its font, no ids in common."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg, flags=re.S)
    view_box = re.search(r'viewBox="[^"]*"', svg)
    assert view_box is not None
    # The caption beside it names the chart; screen readers need not read its ticks.
    svg = re.sub(r"<svg.*?>", f'<svg {view_box[0]} aria-hidden="true">', svg, count=1, flags=re.S)
    prefix = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = svg.replace("url(#", f"url(#{prefix}-")
    svg = re.sub(r'xlink:href="#', f'href="#{prefix}-', svg)
    svg = re.sub(r" ?font-family: [^;\"]*;", "", svg)
    for name, colour in _COLOURS.items():
        svg = svg.replace(colour, f"var(--{name})")
    return re.sub(r"\n\s*", "\n", svg).strip()
