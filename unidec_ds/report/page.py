"""One HTML page about a run: results, curves, where time went, examples, settings, environment.

The page stands alone: styles and charts are in it, nothing is loaded from anywhere, and every text
that comes from the run is escaped by the template engine. What a run does not have (yet) is said
where it would stand.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from unidec_ds.errors import UserError
from unidec_ds.metrics import KS
from unidec_ds.report.curves import (
    frequency_charts,
    mining_share,
    time_charts,
    training_charts,
    validation_charts,
)
from unidec_ds.report.record import Record, RunRecord, read_record

PAGE = "report.html"
_METRICS = {
    "P": "Precision: correct among the first k, over k",
    "nDCG": "nDCG: precision that prefers correct labels first",
    "PSP": "Propensity-scored precision: rare labels count more",
    "PSnDCG": "Propensity-scored nDCG",
    "R": "Recall: share of a query's true labels found",
    "coverage": "Coverage: share of the true labels that are ever found",
}
_HEADLINES = ("P@1", "P@5", "nDCG@5", "PSP@1", "PSP@5", "R@100")


class Cell(NamedTuple):
    """One figure of a table."""

    text: str
    is_best: bool
    """Of its column."""


class MetricTable(NamedTuple):
    """One metric at every k."""

    name: str
    meaning: str
    rows: dict[str, list[Cell]]
    """By view."""


def write_report(run: Path, out: Path | None = None) -> Path:
    """Writes the page of a run, finished or not; returns where it is.

    Args:
        run: the run directory.
        out: the file; RUN/report.html by default.

    Raises:
        UserError: `run` is not a run directory, or `out` cannot be written.
    """
    page = render(read_record(run))
    path = out or run / PAGE
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out: {path} cannot be written: {error.strerror}") from error
    return path


def render(record: RunRecord) -> str:
    """Returns the page as HTML."""
    environment = Environment(
        loader=PackageLoader("unidec_ds.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["svg"] = Markup  # charts are made here: the only markup that is let through
    return environment.get_template("report.html").render(
        record=record,
        progress=_progress(record),
        corpus=record.recipe.get("corpus", {}).get("path", "not known"),
        encoder=record.recipe.get("encoder", {}).get("name", "not known"),
        view=_used_view(record),
        headlines=_headlines(record),
        tables=_tables(record.metrics),
        ks=KS,
        propensity=record.details.get("propensity")
        or record.recipe.get("evaluation", {}).get("propensity"),
        frequency_charts=frequency_charts(record),
        training_charts=training_charts(record),
        validation_charts=validation_charts(record),
        time_charts=time_charts(record),
        mining_share=mining_share(record),
        validates=bool(
            record.recipe.get("corpus", {}).get("validation_fraction")
            and record.recipe.get("evaluation", {}).get("every_epochs")
        ),
        mining_wanted=bool(record.recipe.get("mining", {}).get("every_epochs")),
        samples={kind: record.samples.get(kind, []) for kind in ("right", "wrong")},
        recipe={
            section: {key: _plain(value) for key, value in values.items()}
            for section, values in record.recipe.items()
        },
        ds_config=json.dumps(record.ds_config, indent=2) if record.ds_config else "",
        environment=_flat(record.environment),
    )


def _progress(record: RunRecord) -> str:
    if record.is_finished:
        return f"finished, {record.num_steps:,} steps"
    if record.total_steps is not None:
        return f"not finished: {record.num_steps:,} of {record.total_steps:,} steps"
    if record.num_steps:
        return f"not finished: {record.num_steps:,} steps, no checkpoint yet"
    return "not finished: no step yet"


def _headlines(record: RunRecord) -> list[tuple[str, float, float | None]]:
    """Returns (metric, value, gain over the untrained encoder) of the view that is used."""
    metrics = record.metrics
    view = _used_view(record)
    if view is None:
        return []
    before = metrics.get("untrained")
    return [
        (name, metrics[view][name], metrics[view][name] - before[name] if before else None)
        for name in _HEADLINES
    ]


def _used_view(record: RunRecord) -> str | None:
    chosen = record.samples.get("view")
    trained = [view for view in record.metrics if view != "untrained"]
    return chosen if chosen in trained else trained[-1] if trained else None


def _tables(metrics: Record) -> list[MetricTable]:
    """Returns a table for each metric; none without figures."""
    tables = []
    for name, meaning in _METRICS.items() if metrics else ():
        columns = {k: [values[f"{name}@{k}"] for values in metrics.values()] for k in KS}
        rows = {
            view: [
                Cell(f"{column[place]:.2f}", len(column) > 1 and column[place] == max(column))
                for column in columns.values()
            ]
            for place, view in enumerate(metrics)
        }
        tables.append(MetricTable(name, meaning, rows))
    return tables


def _flat(content: Record, prefix: str = "") -> dict[str, str]:
    """Returns nested settings as dotted keys and printable values."""
    flat: dict[str, str] = {}
    for key, value in content.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = _plain(value)
    return flat


def _plain(value: Any) -> str:
    """Returns a value as it would stand in YAML."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
