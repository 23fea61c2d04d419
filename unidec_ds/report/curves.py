"""Which charts a run gets: its training curves, where its time went, its parts by frequency."""

from __future__ import annotations

from collections.abc import Sequence

from unidec_ds.report.charts import (
    Bars,
    Chart,
    Series,
    area_chart,
    grouped_bars,
    horizontal_bars,
    line_chart,
    precision_parts,
    stacked_bars,
)
from unidec_ds.report.record import Record, RunRecord

# Title, and the logged names with what to call them.
_STEP_CHARTS: list[tuple[str, dict[str, str]]] = [
    ("Loss", {"loss": "both", "loss_de": "dual encoder", "loss_classifier": "classifier"}),
    ("Loss by direction", {
        "loss_de_q2l": "dual encoder, query to label",
        "loss_de_l2q": "dual encoder, label to query",
        "loss_classifier_q2l": "classifier, query to label",
        "loss_classifier_l2q": "classifier, label to query",
    }),
    ("Learning rates", {"lr": "encoder", "lr_head": "heads", "lr_row": "classifier rows"}),
    ("Gradient norm before clipping", {"grad_norm": "gradient norm"}),
    ("Labels of a step", {"pool_size": "pool", "hard_negatives": "hard negatives in it"}),
    ("Texts per second", {"texts_per_s": "texts per second"}),
    ("Memory, GiB", {"host_memory_gib": "host", "device_memory_gib": "device"}),
]  # fmt: skip
_FROM_ZERO = {"Labels of a step", "Texts per second", "Memory, GiB", "Learning rates"}
_VIEW_COLOURS = {"de": 1, "classifier": 2, "unified": 3, "unified_tuned": 5, "untrained": 8}
_VALIDATION_METRICS = ("P@1", "nDCG@5", "PSP@5", "R@100")


def training_charts(record: RunRecord) -> list[Chart]:
    """Returns the curves of the logged steps; none if no step was logged."""
    charts = []
    for title, names in _STEP_CHARTS:
        series = [
            line
            for name, shown in names.items()
            if (line := _line(record.steps, name, shown)) and any(line.y)
        ]
        if series:
            from_zero = title in _FROM_ZERO
            charts.append(line_chart(title, series, x_label="step", from_zero=from_zero))
    return charts


def validation_charts(record: RunRecord) -> list[Chart]:
    """Returns how the validation metrics went, epoch by epoch; none without validation."""
    epochs = [entry["epoch"] + 1 for entry in record.validations]
    charts = []
    for metric in _VALIDATION_METRICS if epochs else ():
        views = record.validations[-1]["evaluation"]
        series = [
            Series(
                view,
                epochs,
                [entry["evaluation"][view][metric] for entry in record.validations],
                _VIEW_COLOURS.get(view, 0),
            )
            for view in views
        ]
        title = f"Validation {metric}, percent"
        charts.append(line_chart(title, series, x_label="epochs trained", points=True))
    return charts


def time_charts(record: RunRecord) -> list[Chart]:
    """Returns where a step's time goes, and the whole training's; none if no step was logged."""
    steps = [entry for entry in record.steps if "time_s" in entry and "step_s" in entry]
    if not steps:
        return []
    parts = _step_parts(steps)
    at = [entry["step"] for entry in steps]
    layers = [Series(_spaced(name), at, seconds) for name, seconds in parts.items()]
    charts = [area_chart("Seconds per step, by part", layers, x_label="step")]
    shares = time_shares(record)
    charts.append(
        horizontal_bars(
            "Share of training time", list(shares), [100 * share for share in shares.values()], "%"
        )
    )
    return charts


def time_shares(record: RunRecord) -> dict[str, float]:
    """Returns each part's share of steps and minings together; what is between is not counted.

    Steps that were not logged are taken to be like those that were.
    """
    steps = [entry for entry in record.steps if "time_s" in entry and "step_s" in entry]
    if not steps:
        return {}
    not_logged = record.num_steps / len(steps)
    seconds = {
        _spaced(name): sum(values) * not_logged for name, values in _step_parts(steps).items()
    }
    for name in ("embed", "search", "cluster") if record.minings else ():
        total = sum(entry.get(f"mining_{name}_s", 0.0) for entry in record.minings)
        seconds[f"mining: {name}"] = total
    whole = sum(seconds.values())
    return {name: value / whole for name, value in seconds.items()} if whole else {}


def mining_share(record: RunRecord) -> float | None:
    """Returns mining's share of the training time, None if nothing was mined or logged."""
    shares = time_shares(record)
    mined = [share for name, share in shares.items() if name.startswith("mining: ")]
    return sum(mined) if mined else None


def frequency_charts(record: RunRecord) -> list[Chart]:
    """Returns what head, torso and tail add to P, and how much of each is found."""
    breakdown = record.breakdown
    if not breakdown:
        return []
    charts = [
        stacked_bars(f"What each part adds to {metric}, percent",
                     *precision_parts(breakdown, metric))
        for metric in ("P@1", "P@5")
    ]  # fmt: skip
    names = [part["name"] for part in next(iter(breakdown.values()))]
    groups = [
        Bars(view, [part["scores"]["R@100"] for part in bins], _VIEW_COLOURS.get(view, 0))
        for view, bins in breakdown.items()
    ]
    charts.append(grouped_bars("Share of each part's true labels in the top 100", names, groups))
    return charts


def _line(steps: Sequence[Record], name: str, shown: str) -> Series | None:
    logged = [entry for entry in steps if name in entry]
    if not logged:
        return None
    return Series(shown, [entry["step"] for entry in logged], [entry[name] for entry in logged])


def _step_parts(steps: Sequence[Record]) -> dict[str, list[float]]:
    """Returns the seconds of each part of a step, and of what no part counts."""
    names = list(dict.fromkeys(name for entry in steps for name in entry["time_s"]))
    parts = {name: [entry["time_s"].get(name, 0.0) for entry in steps] for name in names}
    parts["other"] = [max(0.0, e["step_s"] - sum(e["time_s"].values())) for e in steps]
    return parts


def _spaced(name: str) -> str:
    return name.replace("_", " ")
