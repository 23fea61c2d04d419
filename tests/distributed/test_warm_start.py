"""A run begun from another one: its weights, its rows by label, its scores; the rest from texts."""

import contextlib
import io
import json
import os
import shutil
import socket
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from data.raw_corpora import Content, random_content, tables, write
from ranks import run_ranks
from tiny import make_encoder, write_recipe_file
from torch.nn.functional import normalize
from training import whole_rows

from unidec_ds import checkpoint
from unidec_ds.assembly import load_run
from unidec_ds.checkpoint import latest
from unidec_ds.classifier.storage import Placement
from unidec_ds.classifier.table import ClassifierTable
from unidec_ds.config import load_recipe
from unidec_ds.data.corpus import open_corpus
from unidec_ds.data.prepare import resolve_corpus
from unidec_ds.data.uids import UidDigests
from unidec_ds.embedding import embed
from unidec_ds.errors import CheckpointError, UserError
from unidec_ds.job import prepare_job, run_job
from unidec_ds.lifeline import Lifeline
from unidec_ds.manifest import read_manifest
from unidec_ds.warm_start import plan_warm_start

pytestmark = pytest.mark.slow

DS_CONFIG = {"zero_optimization": {"stage": 1}}
NUM_LABELS = 60
GONE = [0, 7, 31, 59]
ADDED = ["red boat", "the old house", "", "new paper car"]


def write_tables(folder: Path, content: Content, uids: list[str]) -> None:
    rows = tables(content, key=lambda label: uids[label])
    for name, table in rows.items():
        write(folder / f"{name}.jsonl", [json.dumps(row) for row in table], False)


def changed(content: Content, uids: list[str]) -> tuple[Content, list[str]]:
    """Other labels in another order: `GONE` is gone, `ADDED` is there."""
    kept = [label for label in reversed(range(NUM_LABELS)) if label not in GONE]
    order = kept[:20] + [None] * len(ADDED) + kept[20:]
    place = {label: at for at, label in enumerate(order) if label is not None}
    added = iter(ADDED)
    labels = [next(added) if label is None else content.labels[label] for label in order]
    targets = {
        split: [[place[t] for t in row if t in place] for row in rows]
        for split, rows in content.targets.items()
    }
    new_uids = [f"new{at}" if label is None else uids[label] for at, label in enumerate(order)]
    return Content(labels, content.queries, targets), new_uids


def train(recipe: str, ds_config: str, run: str, init_from: str | None, resume: str | None):
    run_job(
        prepare_job(
            load_recipe(recipe),
            Path(ds_config),
            Path(run),
            resume,
            Path(init_from) if init_from else None,
        )
    )


def start_only(recipe: str, ds_config: str, run: str, init_from: str):
    """Returns what a warm start leaves before the first step."""
    from unidec_ds.engine import start_engine
    from unidec_ds.trainer import Trainer

    job = prepare_job(load_recipe(recipe), Path(ds_config), Path(run), None, Path(init_from))
    engine = start_engine(job.ds_config, job.recipe.train.batch_size)
    if os.environ["RANK"] == "0":
        Path(run).mkdir(parents=True)
    trainer = Trainer(
        job.recipe, job.ds_config, job.corpus, engine, job.run, warm_start=job.warm_start
    )
    trainer.monitor.close()
    result = {
        "state": engine.state(),
        "rows": trainer.table.state(),
        "details": job.warm_start.details,
    }
    engine.close()
    return result


def rows_only(recipe: Path, init_from: Path):
    """Returns the same of one process without an engine."""
    loaded = load_recipe(str(recipe))
    source = load_run(init_from, torch.device("cpu"))
    corpus = resolve_corpus(loaded.corpus, loaded.encoder.name, loaded.encoder.max_length)
    warm_start = plan_warm_start(init_from, loaded, corpus)
    table = ClassifierTable(
        num_labels=corpus.num_labels,
        width=source.model.width,
        rank=0,
        world_size=1,
        config=loaded.classifier,
        placement=Placement(kind="cpu"),
        device=torch.device("cpu"),
        seed=1,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.0,
    )
    cosine = loaded.objective.classifier_logits == "cosine"
    warm_start.fill_rows(table, source.model, corpus, cosine=cosine)
    state = {name: value.detach() for name, value in source.model.named_parameters()}
    return {"state": state, "rows": table.state(), "details": warm_start.details}


def begin_on_this_rank(recipe: str, ds_config: str, run: str, init_from: list[str | None]):
    """Returns what the job's checks say on this rank, "" for nothing."""
    lifeline = Lifeline.of_launch()
    source = init_from[lifeline.rank]
    lifeline.open(timedelta(seconds=60))
    try:
        prepare_job(
            load_recipe(recipe),
            Path(ds_config),
            Path(run),
            init_from=Path(source) if source else None,
            lifeline=lifeline,
        )
    except UserError as error:
        return str(error)
    finally:
        lifeline.close()
    return ""


class StaleView(Lifeline):
    """That of a rank which, once it has seen the run directory, sees it as it was before."""

    view, before = Path(), Path()

    def exchange(self, key, value):
        found = super().exchange(key, value)
        if key == "run directory seen":
            self.view.unlink()
            self.view.symlink_to(self.before)
        return found


def continue_with_a_stale_view(recipe: str, ds_config: str, run: str, before: str, view: str):
    """Continues a finished run, which rank 1 finds unfinished; returns what is said."""
    lifeline = Lifeline.of_launch()
    if lifeline.rank == 1:
        lifeline = StaleView(1, 2)
        lifeline.view, lifeline.before = Path(view), Path(before)
        lifeline.view.symlink_to(run)
        run = view
    lifeline.open(timedelta(seconds=30))
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        job = prepare_job(
            load_recipe(recipe), Path(ds_config), Path(run), "auto", lifeline=lifeline
        )
        run_job(job, lifeline)
    lifeline.close()
    return said.getvalue()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    make_encoder(folder / "encoder")
    (folder / "ds_config.json").write_text(json.dumps(DS_CONFIG))
    content = random_content(num_train=90, num_labels=NUM_LABELS)
    content.filters.clear()
    uids = [f"label {label}" for label in range(NUM_LABELS)]
    uids[40] = uids[10]  # a uid that repeats: targets mean the first
    write_tables(folder / "raw", content, uids)
    write_tables(folder / "grown", *changed(content, uids))
    recipe = write_recipe_file(
        folder,
        corpus={"path": str(folder / "raw")},
        train={"epochs": 2},
        checkpoint={"every_steps": 7, "keep": 2},
    )
    arguments = (str(recipe), str(folder / "ds_config.json"), str(folder / "source"), None, None)
    run_ranks(2, train, *arguments, join=False)
    return folder


@pytest.mark.parametrize(
    ("world_size", "row_format", "logits"),
    [(1, "fp32", "dot"), (1, "rowwise", "cosine"), (2, "bf16", "dot")],
)
def test_shared_labels_keep_their_rows_and_new_ones_start_from_their_text(
    inputs, tmp_path, world_size, row_format, logits
):
    recipe = write_recipe_file(
        tmp_path,
        corpus={"path": str(inputs / "grown"), "prepared_dir": str(inputs / "prepared")},
        encoder={"name": str(inputs / "encoder")},
        classifier={"format": row_format, "kernel": "torch"},
        objective={"classifier_logits": logits},
    )
    if world_size == 1:
        results = [rows_only(recipe, inputs / "source")]
    else:
        files = (recipe, inputs / "ds_config.json", tmp_path / "run", inputs / "source")
        results = run_ranks(world_size, start_only, *map(str, files), join=False)
    source = load_run(inputs / "source", torch.device("cpu"))
    encoder = dict(source.model.named_parameters())
    for result in results:
        assert result["state"].keys() == encoder.keys()  # no moments yet
        for name, tensor in result["state"].items():
            assert torch.equal(tensor, encoder[name]), name
        assert not any(result["rows"][name].any() for name in result["rows"] if "exp_avg" in name)

    (path,) = (inputs / "prepared").glob("grown-*")
    corpus = open_corpus(path)
    rows = whole_rows(results, corpus.num_labels)
    old_uids = source.corpus.labels.uids(np.arange(NUM_LABELS))
    expected, taken = torch.full_like(rows, float("nan")), []
    for label, uid in enumerate(corpus.labels.uids(np.arange(corpus.num_labels))):
        same = [old for old, old_uid in enumerate(old_uids) if old_uid == uid and old not in taken]
        if same:
            taken.append(same[0])
            expected[label] = source.rows.read(np.array(same[:1]))[0]
    length = expected[~expected[:, 0].isnan()].norm(dim=1).mean() if logits == "dot" else 1.0
    ids = np.flatnonzero(expected[:, 0].isnan().numpy() & corpus.label_has_text)
    assert len(ids) == 3
    (vectors,) = embed(source.model, corpus.labels, ids, ("classifier",), corpus.pad_token_id)
    expected[ids] = normalize(vectors, dim=1) * length
    known = ~expected[:, 0].isnan()  # all but the new label without a text
    assert (~known).sum() == 1
    tolerance = 1e-6 if row_format == "fp32" else 2**-8
    torch.testing.assert_close(rows[known], expected[known], rtol=tolerance, atol=1e-7)
    details = results[0]["details"]
    counts = {name: details[name] for name in ("matched", "new", "dropped", "new_without_text")}
    assert counts == {"matched": 56, "new": 4, "dropped": 4, "new_without_text": 1}
    assert details["repeated"] == 2  # one uid in each corpus


def test_an_unchanged_label_set_scores_the_same_and_the_run_is_continued_as_it_was_begun(
    inputs, tmp_path
):
    run, source, ds_config = tmp_path / "run", inputs / "source", inputs / "ds_config.json"
    recipe = write_recipe_file(inputs, "continued.yaml", train={"max_steps": 3})
    arguments = map(str, (recipe, ds_config, run, source))
    run_ranks(1, train, *arguments, None, join=False)
    record = json.loads((run / "warm_start.json").read_text())
    counts = tuple(record[name] for name in ("source", "matched", "new", "dropped"))
    assert counts == (str(source), NUM_LABELS, 0, 0)
    before = json.loads((source / "evaluation.json").read_text())["test"]  # of two ranks
    for view in ("untrained", "unified_tuned"):  # the start has neither
        before.pop(view)
    assert record["evaluation"]["test"] == before
    report = json.loads((run / "evaluation.json").read_text())["test"]
    assert report["warm_start"] == before["unified"] != report["unified"]
    assert "warm_start" in (run / "report.txt").read_text()

    def prepare(init_from, resume="auto"):
        return prepare_job(load_recipe(str(recipe)), ds_config, run, resume, init_from)

    for init_from in (None, source):
        job = prepare(init_from)
        assert job.resume_from is not None
        assert job.warm_start is None
    with pytest.raises(UserError, match=r"was begun from .*source, not from"):
        prepare(tmp_path)
    with pytest.raises(UserError, match="was begun cold, not from"):
        prepare_job(load_recipe(str(inputs / "recipe.yaml")), ds_config, source, "auto", run)
    with pytest.raises(UserError, match="begins a new run"):
        prepare(source, resume=str(latest(run)))
    (run / "checkpoints").rename(tmp_path / "lost")  # as if killed before the first checkpoint
    assert prepare(None).warm_start.details["matched"] == NUM_LABELS


def test_what_does_not_fit_is_refused(inputs, tmp_path):
    def prepare(source, **sections):
        recipe = write_recipe_file(inputs, "other.yaml", **sections)
        ds_config = inputs / "ds_config.json"
        return prepare_job(load_recipe(str(recipe)), ds_config, tmp_path / "run", None, source)

    source = inputs / "source"
    with pytest.raises(UserError, match=r"model\.width 8 .*there \[16"):
        prepare(source, model={"width": 8})
    with pytest.raises(UserError, match=r"model\.de_activation: none, there tanh"):
        prepare(source, model={"de_activation": "none"})
    with pytest.raises(CheckpointError, match="is not a run directory"):
        prepare(tmp_path)
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "config.yaml").write_text((source / "config.yaml").read_text())
    with pytest.raises(CheckpointError, match="no complete checkpoint yet"):
        prepare(empty)


def test_ranks_that_begin_from_different_checkpoints_are_named(inputs, tmp_path):
    """They would wait for each other in different collectives."""
    source, older = inputs / "source", tmp_path / "older"
    shutil.copytree(source, older)
    checkpoints = checkpoint.newest_first(older)
    shutil.rmtree(checkpoints[0])
    (older / "checkpoints" / "latest").write_text(checkpoints[1].name + "\n")

    def begin(*init_from):
        ours = [str(path) if path else None for path in init_from]
        arguments = map(str, (inputs / "recipe.yaml", inputs / "ds_config.json", tmp_path / "run"))
        return run_ranks(2, begin_on_this_rank, *arguments, ours, join=False)

    newest = latest(source)
    described = f"with {newest} (step {read_manifest(newest)['step']}, manifest "
    said = begin(source, None)
    assert said[0] == said[1]
    assert "--init_from: rank 1 (host " in said[0]
    assert f"would begin anew, rank 0 (host {socket.gethostname()}) {described}" in said[0]
    said = begin(older, source)
    assert said[0] == said[1]
    assert f"rank 1 (host {socket.gethostname()}) would begin {described}" in said[0]
    assert f" with {latest(older)} (step {read_manifest(latest(older))['step']}, " in said[0]
    shutil.copytree(source, tmp_path / "copy")
    assert begin(source, tmp_path / "copy") == ["", ""]


def test_a_rank_that_does_not_see_the_report_leaves_a_finished_run_with_the_others(
    inputs, tmp_path
):
    source, before = inputs / "source", tmp_path / "before"
    shutil.copytree(source, before)
    (before / "report.txt").unlink()
    arguments = (inputs / "recipe.yaml", inputs / "ds_config.json", source, before)
    said = run_ranks(
        2, continue_with_a_stale_view, *map(str, arguments), str(tmp_path / "view"),
        join=False,
    )  # fmt: skip
    assert said[0].startswith(f"{source} is finished\n\ntest set, ")
    assert said[1] == ""


def test_digests_match_row_by_row():
    old, new = UidDigests(), UidDigests()
    old.add(["a", "b", "b", "c", "a"])
    new.add(["b", "x", "a", "a", "a", "b", "b"])
    assert new.rows_in(old).tolist() == [1, -1, 0, 4, -1, 2, -1]
    assert old.rows_in(old).tolist() == [0, 1, 2, 3, 4]
    assert new.rows_in(UidDigests()).tolist() == [-1] * 7


def test_digests_are_saved_in_row_order(tmp_path):
    uids = [str(i % 700) for i in range(1000)]
    digests = UidDigests()
    digests.add(uids)
    digests.save(tmp_path / "digests.npy")
    again = UidDigests.open(tmp_path / "digests.npy")
    assert len(again) == 1000
    assert again.rows(uids).tolist() == digests.rows(uids).tolist()
    assert again.rows_in(digests).tolist() == list(range(1000))
