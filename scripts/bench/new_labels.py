"""Measures labels that a run never saw: how well they are found, and what they cost the others.

    python scripts/bench/new_labels.py [--quick] [--json FILE] [--work DIR]

A seeded tenth of the labels of LF-WordNet-Verbs-9K is held out: the quickstart recipe is trained on
the same texts without these labels (queries left without a positive are dropped), then the held-out
labels are added as new labels and all test queries ranked over all labels, in the unified view.
A held-out label's text may have been seen as a *query* (the corpus relates items to items).

Metrics of "held" and "seen" count only the pairs with such labels as truth, over the queries that
have one; all labels compete. Ways to score a new label in the classifier's place, added to cos_DE:

- no new labels: the run as it is; what the new ones cost the others is measured against it.
- de alone: cos_DE for every label, new or not.
- row 0: nothing is added, as if the classifier knew no such label.
- as it is: cos(g2(query), g2(text)), uncalibrated.
- shift, positives: plus an offset; the mean of the train positives' scores agrees.
- moments, positives: mean and spread of the train positives' scores agree.
- moments, best others: the package's own (`unidec_ds.serving.new_labels`): mean and spread of the
  best 100 non-positive scores of train queries agree.
- moments, oracle: the same, but of the held-out labels themselves and the test queries.
- de again: cos_DE a second time, calibrated as the package does.

(slope, offset) multiply and shift the cosine. --quick trains 5 steps and shows only that it runs.
--work keeps corpus and run, and goes on with a run that is there.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

import unidec_ds
from unidec_ds.assembly import LoadedRun, load_run
from unidec_ds.data.corpus import Corpus
from unidec_ds.data.keyed import hash64
from unidec_ds.data.pairs import Pairs
from unidec_ds.data.prepare import embedded_corpora, prepare
from unidec_ds.embedding import embed_all
from unidec_ds.metrics import inverse_propensity, score_predictions
from unidec_ds.search import TopK
from unidec_ds.serving.new_labels import calibration

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results" / "new_labels.md"
CORPUS, HELD_OUT, BEST = "lf-wordnet-verbs-9k", 0.1, 100
METRICS = ("P@1", "R@10", "R@100")


def write_reduced_corpus(folder: Path) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Writes the corpus without the held-out labels, and those to new.jsonl; returns bool [L]."""
    source = embedded_corpora()[CORPUS]

    def read(name: str) -> list[dict[str, Any]]:
        with gzip.open(source / f"{name}.json.gz", "rt", encoding="utf-8") as file:
            return [json.loads(line) for line in file]

    def dump(name: str, rows: list[dict[str, Any]]) -> None:
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.json.gz").write_bytes(gzip.compress(text.encode(), mtime=0))

    labels = read("lbl")
    order = np.argsort(hash64(0, "held-out labels", np.arange(len(labels))), kind="stable")
    held_L = np.zeros(len(labels), bool)
    held_L[order[: int(HELD_OUT * len(labels))]] = True
    if (folder / "lbl.json.gz").exists():
        return held_L
    folder.mkdir(parents=True)
    column = np.cumsum(~held_L) - 1
    for name, split in (("trn", "train"), ("tst", "test")):
        kept: dict[int, dict[str, Any]] = {}
        for row, query in enumerate(read(name)):
            targets = [int(column[t]) for t in query["target_ind"] if not held_L[t]]
            if targets or split == "test":
                kept[row] = {**query, "target_ind": targets, "target_rel": [1.0] * len(targets)}
        dump(name, list(kept.values()))
        place = {row: at for at, row in enumerate(kept)}
        lines = (source / f"filter_labels_{split}.txt").read_text().splitlines()
        pairs = [tuple(map(int, line.split())) for line in lines]
        (folder / f"filter_labels_{split}.txt").write_text(
            "".join(f"{place[r]} {column[c]}\n" for r, c in pairs if r in place and not held_L[c])
        )
    dump("lbl", [label for label, held in zip(labels, held_L, strict=True) if not held])
    return held_L


def write_new_labels(path: Path, corpus: Corpus, held_L: np.ndarray[Any, Any]) -> None:
    """Writes the held-out labels as `predict --new-labels` takes them."""
    ids = np.flatnonzero(held_L)
    rows = zip(corpus.labels.uids(ids), corpus.labels.texts(ids), strict=True)
    path.write_text("".join(json.dumps({"id": uid, "text": text}) + "\n" for uid, text in rows))


def train(work: Path, quick: bool) -> None:
    """Trains the reduced run, or goes on with it."""
    command = [
        sys.executable, str(ROOT / "train.py"), "--recipe", "quickstart",
        "--ds_config", str(ROOT / "ds_configs" / "cpu_bf16.json"),
        "--corpus", str(work / "reduced"), "--output", str(work / "run"), "--resume", "auto",
        "--set", f"corpus.prepared_dir={work / 'prepared'}", "--set", "train.epochs=2",
    ]  # fmt: skip
    with contextlib.redirect_stdout(None):
        subprocess.run([*command, *(["--set", "train.max_steps=5"] if quick else [])], check=True)


class Vectors:
    """Unit vectors of all labels and of the test and train queries, of both heads."""

    def __init__(self, run: LoadedRun, full: Corpus, held_L: np.ndarray[Any, Any]) -> None:
        both, pad = ("de", "classifier"), full.pad_token_id
        model, every = run.model, np.arange
        test, train = full.queries["test"], run.corpus.queries["train"]
        self.label_de, self.label_g2 = embed_all(model, full.labels, every(len(held_L)), both, pad)
        self.test_de, self.test_g2 = embed_all(model, test, every(len(test)), both, pad)
        self.train_de, self.train_g2 = embed_all(model, train, every(len(train)), both, pad)
        self.held, self.seen = torch.from_numpy(held_L), torch.from_numpy(~held_L)
        self.rows = normalize(run.rows.read(every(int((~held_L).sum()))), dim=1)


def moments(wanted: Tensor, found: Tensor) -> tuple[float, float]:
    """Returns the (slope, offset) that give `found` the mean and spread of `wanted`."""
    slope = float(wanted.std() / found.std())
    return slope, float(wanted.mean() - slope * found.mean())


def best_others(scores_QL: Tensor, sets: list[Pairs]) -> Tensor:
    """Returns the BEST scores of each query that are in none of the sets."""
    scores_QL = scores_QL.clone()
    for pairs in sets:
        row, column = pairs.take(np.arange(pairs.num_rows))
        scores_QL[row, column] = -torch.inf
    return scores_QL.topk(BEST, dim=1).values


def calibrations(run: LoadedRun, full: Corpus, v: Vectors) -> dict[str, tuple[float, float]]:
    """Returns (slope, offset) of each way that uses the classifier head."""
    train, known = run.corpus.positives["train"], run.corpus.filter_pairs["train"]
    query, label = train.without(known).take(np.arange(train.num_rows))
    by_row = (v.train_g2[query] * v.rows[label]).sum(1)
    by_text = (v.train_g2[query] * v.label_g2[v.seen][label]).sum(1)
    truth = [full.positives["test"], full.filter_pairs["test"]]
    everywhere = v.test_g2 @ v.label_g2.T
    everywhere[:, v.seen] = v.test_g2 @ v.rows.T
    seen, held = everywhere.clone(), everywhere.clone()
    seen[:, v.held], held[:, v.seen] = -torch.inf, -torch.inf
    share = float(v.held.float().mean())  # as deep into the held-out labels as into the others
    depth = max(1, round(BEST * share))
    oracle = moments(best_others(seen, truth), best_others(held, truth)[:, :depth])
    return {
        "row 0": (0.0, 0.0),
        "as it is": (1.0, 0.0),
        "shift, positives": (1.0, float(by_row.mean() - by_text.mean())),
        "moments, positives": moments(by_row, by_text),
        "moments, best others": tuple(calibration(run, "unified", show_progress=False)),
        "moments, oracle": oracle,
    }


def de_again(run: LoadedRun, v: Vectors) -> tuple[float, float]:
    """Returns the package's calibration with the dual encoder as the substitute."""
    sets = [run.corpus.positives["train"], run.corpus.filter_pairs["train"]]
    by_row = best_others(v.train_g2 @ v.rows.T, sets)
    return moments(by_row, best_others(v.train_de @ v.label_de[v.seen].T, sets))


def measure(scores_QL: Tensor, full: Corpus, v: Vectors) -> dict[str, float]:
    """Returns the metrics of one ranking of all labels for the test queries, in percent."""
    top = TopK(len(scores_QL), BEST)
    top.update(scores_QL.clone(), exclude=full.filter_pairs["test"])
    _, found_QK = top.result()
    found, truth = found_QK.numpy(), full.positives["test"]
    query, label = truth.take(np.arange(truth.num_rows))
    weights = inverse_propensity(full.positives["train"], 0.55, 1.5)
    result: dict[str, float] = {}
    masks = {"held": v.held.numpy(), "seen": v.seen.numpy(), "all": np.ones(len(v.held), bool)}
    for name, mask in masks.items():
        kept = mask[label]
        pairs = Pairs.from_pairs(query[kept], label[kept], truth.num_rows, truth.num_columns)
        asked = np.flatnonzero(pairs.row_counts())
        row, column = pairs.take(asked)
        own = Pairs.from_pairs(row, column, len(asked), truth.num_columns)
        scores = score_predictions(own, found[asked], inverse_propensity=weights, ks=(1, 10, 100))
        result |= {f"{name} {metric}": scores[metric] for metric in METRICS}
    result["new in top 10"] = 100 * float(v.held.numpy()[found[:, :10]].mean())
    return result


def check_against_predict(
    work: Path, full: Corpus, held_L: np.ndarray[Any, Any], scores_QL: Tensor
) -> None:
    """Makes sure that `predict` with the new labels gives the ranking measured here."""
    write_new_labels(work / "new.jsonl", full, held_L)
    predictor = unidec_ds.load(
        work / "run", device="cpu", view="unified", new_labels=work / "new.jsonl"
    )
    print(predictor.describe())
    ids = np.arange(64)
    answers = predictor.predict(full.queries["test"].texts(ids), k=10)
    expected = scores_QL[:64].topk(10).values
    scores = torch.tensor([[label.score for label in labels] for labels in answers])
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-4)


@torch.no_grad()
def main() -> None:
    """Prints one table and writes what it holds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="train 5 steps only")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    parser.add_argument("--work", type=Path, help="keep corpus and run here")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = arguments.work or Path(temporary)
        held_L = write_reduced_corpus(work / "reduced")
        train(work, arguments.quick)
        run = load_run(work / "run", torch.device("cpu"))
        encoder = run.recipe.encoder
        full = prepare(
            embedded_corpora()[CORPUS],
            encoder=encoder.name,
            max_length=encoder.max_length,
            prepared_dir=work / "prepared",
            show_progress=False,
        )
        v = Vectors(run, full, held_L)
        de = v.test_de @ v.label_de.T
        classifier = torch.zeros_like(de)
        classifier[:, v.seen] = v.test_g2 @ v.rows.T
        substitute = v.test_g2 @ v.label_g2[v.held].T

        def with_new(scores: Tensor) -> Tensor:
            whole = de + classifier
            whole[:, v.held] += scores
            return whole

        table: dict[str, dict[str, float]] = {}
        without = de + classifier
        without[:, v.held] = -torch.inf
        table["no new labels"] = measure(without, full, v)
        table["de alone"] = measure(de, full, v)
        for name, (slope, offset) in calibrations(run, full, v).items():
            scores = with_new(slope * substitute + offset)
            table[name] = {"slope": slope, "offset": offset, **measure(scores, full, v)}
            if name == "moments, best others":
                check_against_predict(work, full, held_L, scores)
        slope, offset = de_again(run, v)
        again = with_new(slope * de[:, v.held] + offset)
        table["de again"] = {"slope": slope, "offset": offset, **measure(again, full, v)}
        trained = json.loads((work / "run" / "environment.json").read_text())
        counts = {
            "labels": len(held_L),
            "held out": int(held_L.sum()),
            "train queries": len(run.corpus.queries["train"]),
            "test queries": len(full.queries["test"]),
            "steps": int(run.checkpoint.name.removeprefix("step_")),
        }
    columns = ["slope", "offset", *table["de alone"]]
    lines = [f"| {'':<20} | {' | '.join(columns)} |", "|:--|" + "--:|" * len(columns)]
    for name, values in table.items():
        digits = {"slope": 3, "offset": 3}
        cells = [f"{values[c]:.{digits.get(c, 2)}f}" if c in values else "" for c in columns]
        lines.append(f"| {name:<20} | {' | '.join(cells)} |")
    said = ", ".join(f"{name} {count:,}" for name, count in counts.items())
    print("\n".join([said, *lines]))
    results = {"counts": counts, "environment": trained, "ways": table}
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")
    if not arguments.quick:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(report(said, lines, trained))


def report(said: str, lines: list[str], trained: dict[str, Any]) -> str:
    """Returns the Markdown that is committed."""
    versions = ", ".join(f"{name} {version}" for name, version in trained["packages"].items())
    return "\n".join(
        [
            "# Labels that a run never saw",
            "",
            "`python scripts/bench/new_labels.py`; its first lines say what is measured. Percent.",
            f"LF-WordNet-Verbs-9K, quickstart, one seed: {said}.",
            f"Trained at commit {trained['commit']} on {trained['accelerator']} with {versions}.",
            "",
            *lines,
            "",
        ]
    )


if __name__ == "__main__":
    main()
