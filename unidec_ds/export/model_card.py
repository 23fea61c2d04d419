"""The page that goes with an exported run: what it is, how to use it, what it was trained on.

Markdown under the YAML header that model hubs read. Everything in it comes from the run directory
and the corpus; it names no path of the machine that trained.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from unidec_ds.assembly import LoadedRun
from unidec_ds.data.prepare import embedded_corpora
from unidec_ds.encoders import PACKAGED_ENCODER, resolve_encoder
from unidec_ds.manifest import manifest_digest, read_manifest
from unidec_ds.run import read_json

CORPUS_LICENCE = "LICENSE-CORPUS.txt"
"""Name that the corpus's licence has in an export."""

_PACKAGED_NAME = "sentence-transformers/all-MiniLM-L6-v2"
_SETTINGS = (
    "encoder.max_length", "model.width", "model.head_init", "model.de_activation",
    "model.head_dropout", "model.row_dropout", "objective.de", "objective.classifier",
    "objective.pool", "objective.l2q", "objective.weight_de", "objective.temperature",
    "objective.classifier_logits", "pool.size", "pool.num_positives", "pool.num_hard_negatives",
    "pool.mask_filter_pairs", "batches.kind", "mining.start_epoch", "mining.every_epochs",
    "mining.shortlist_size", "optimizer.encoder_lr", "optimizer.head_lr", "optimizer.row_lr",
    "optimizer.weight_decay", "classifier.init", "classifier.format", "train.batch_size",
    "train.epochs", "train.max_steps", "train.seed",
)  # fmt: skip
_COLUMNS = ("P@1", "P@3", "P@5", "nDCG@5", "PSP@1", "PSP@5", "R@10", "R@100")


def model_card(
    run: LoadedRun,
    *,
    title: str,
    introduction: str,
    usage: str,
    header: Mapping[str, Any],
    license_id: str | None,
) -> str:
    """Returns the page, Markdown.

    Args:
        run: what was exported.
        title: of the page.
        introduction: what the export holds; Markdown.
        usage: how to use it; Markdown.
        header: entries of the YAML header beside licence and base model.
        license_id: the licence that the exporter gives the model, None where none was stated.
    """
    base = _base_model(run.recipe.encoder.name)
    entries = {
        **header,
        "license": license_id or "unknown",
        **({"base_model": base} if base else {}),
    }
    sections = {
        "Use": usage,
        "Corpus": _corpus(run),
        "Results": _results(run),
        "Recipe": _recipe(run),
        "Training": _training(run),
        "Licence": _licence(run, license_id),
    }
    body = "\n\n".join(f"## {name}\n\n{text}" for name, text in sections.items())
    return f"---\n{_yaml(entries)}---\n\n# {title}\n\n{introduction}\n\n{body}\n"


def corpus_licence(run: LoadedRun) -> Path | None:
    """Returns the licence file that lies beside the run's corpus, None if there is none."""
    embedded = embedded_corpora()
    named = [name.lower() for name in (run.recipe.corpus.path, run.corpus.name)]
    folders = [Path(run.recipe.corpus.path), run.corpus.path]
    folders += [embedded[name] for name in named if name in embedded]
    found = [path for folder in folders for path in sorted(folder.glob("LICEN[CS]E*"))]
    return found[0] if found else None


def _yaml(entries: Mapping[str, Any]) -> str:
    stream = io.StringIO()
    writer = YAML()
    writer.default_flow_style = False
    writer.dump(dict(entries), stream)
    return stream.getvalue()


def _table(head: tuple[str, ...], rows: list[tuple[object, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def _base_model(name: str) -> str | None:
    """Returns the encoder's name on the hub, None for a folder of the user's."""
    if name == PACKAGED_ENCODER:
        return _PACKAGED_NAME
    return None if Path(name).expanduser().is_dir() else name


def _encoder_name(name: str) -> str:
    return _base_model(name) or Path(name).expanduser().resolve().name


def _corpus(run: LoadedRun) -> str:
    corpus = run.corpus
    rows: list[tuple[object, ...]] = [
        ("name", corpus.name),
        ("labels", f"{corpus.num_labels:,}"),
        ("labels without a text", f"{int((~corpus.label_has_text).sum()):,}"),
    ]
    for split, table in corpus.queries.items():
        rows.append((f"{split} queries", f"{len(table):,}"))
        rows.append(
            (f"{split} pairs of query and label", f"{len(corpus.positives[split].indices):,}")
        )
    rows.append(("a text is", str(corpus.manifest["text"]).replace("+", ", then ")))
    rows.append(("fingerprint", f"`{corpus.fingerprint}`"))
    return _table(("", ""), rows)


def _results(run: LoadedRun) -> str:
    """Returns the final figures, with the step they are of where that is not the exported one."""
    report = read_json(run.folder / "evaluation.json")
    details = report.get("details", {})
    parts = []
    for split in ("test", "validation"):
        metrics: dict[str, dict[str, float]] = report.get(split, {})
        if not metrics:
            continue
        columns = tuple(name for name in _COLUMNS if all(name in row for row in metrics.values()))
        rows: list[tuple[object, ...]] = [
            (view, *(f"{values[name]:.2f}" for name in columns)) for view, values in metrics.items()
        ]
        queries = f", {details['queries']}" if "queries" in details else ""
        parts.append(f"The {split} set{queries}; percent.")
        parts.append(_table(("", *columns), rows))
    if not parts:
        return "The run holds no final evaluation."
    a, b = details.get("propensity", run.recipe.evaluation.propensity)
    parts.append(
        f"PSP with propensity a = {a}, b = {b} and N = {run.corpus.positives['train'].num_rows:,} "
        "train queries. `de`: the dual encoder alone, `classifier`: the classifier alone, "
        "`unified`: both; `untrained`: the encoder before training."
    )
    step = int(read_manifest(run.checkpoint)["step"])
    if details.get("step") != step:
        parts.append(f"**These are of step {details.get('step')}; exported is step {step}.**")
    return "\n\n".join(parts)


def _recipe(run: LoadedRun) -> str:
    settings = run.recipe.as_yaml_object()
    rows: list[tuple[object, ...]] = [("`encoder.name`", _encoder_name(run.recipe.encoder.name))]
    for key in _SETTINGS:
        section, name = key.split(".")
        rows.append((f"`{key}`", settings[section][name]))
    return _table(("setting", "value"), rows)


def _training(run: LoadedRun) -> str:
    manifest, environment = (
        read_manifest(run.checkpoint),
        read_json(run.folder / "environment.json"),
    )
    versions = {"python": environment.get("python"), **environment.get("packages", {})}
    rows: list[tuple[object, ...]] = [
        ("method", "UniDEC, [arXiv 2405.03714](https://arxiv.org/abs/2405.03714)"),
        ("steps", f"{manifest['step']:,} of {manifest['total_steps']:,}"),
        ("ranks", manifest["world_size"]),
        ("accelerator", environment.get("accelerator")),
        ("versions", ", ".join(f"{name} {version}" for name, version in versions.items())),
        ("unidec_ds commit", environment.get("commit") or "not recorded"),
        ("exported by", f"unidec_ds {metadata.version('unidec_ds')}"),
        ("SHA-256 of the checkpoint's manifest", f"`{manifest_digest(run.checkpoint)}`"),
    ]
    return _table(("", ""), rows)


def _licence(run: LoadedRun, license_id: str | None) -> str:
    name = run.recipe.encoder.name
    encoder = _licence_of_encoder(name)
    lines = [
        f"- This model: {license_id or 'its maker has not stated one'}.",
        f"- The encoder it started from, {_encoder_name(name)}: {encoder or 'see its own page'}.",
    ]
    text = f"see {CORPUS_LICENCE}" if corpus_licence(run) else "no licence file came with it"
    lines.append(f"- The corpus it was trained on, {run.corpus.name}: {text}.")
    return "\n".join(lines)


def _licence_of_encoder(name: str) -> str | None:
    """Returns what the header of the README in the encoder's folder says."""
    page = Path(resolve_encoder(name)) / "README.md"
    if not page.is_file():
        return None
    parts = page.read_text(encoding="utf-8", errors="replace").split("---\n", 2)
    if len(parts) < 3 or parts[0].strip():
        return None
    try:
        header = YAML(typ="safe").load(parts[1])
    except YAMLError:
        return None
    return str(header["license"]) if isinstance(header, dict) and "license" in header else None
