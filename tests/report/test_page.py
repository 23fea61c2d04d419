"""The report page of real runs: finished, unfinished, with one view, with hostile texts."""

import json
import re
import shutil

import pytest
from data.raw_corpora import random_content, write_renee
from html_page import Page
from ranks import run_ranks
from tiny import DS_CONFIG, bert_config, make_encoder, make_inputs, write_recipe_file
from training import train

from unidec_ds.config import load_recipe
from unidec_ds.ds_config import load_ds_config
from unidec_ds.exits import exit_with_message
from unidec_ds.metrics import KS
from unidec_ds.monitor import Monitor
from unidec_ds.report.page import write_report
from unidec_ds.report.record import read_record
from unidec_ds.run import write_json, write_run

HOSTILE = "<script>alert('x')</script> & \"red\" {{ 7 * 7 }} car"


def make_run(folder, **sections):
    """A run before its first step."""
    make_inputs(folder)
    recipe_file = write_recipe_file(folder, **sections)
    run = folder / "run"
    ds_config = load_ds_config(folder / "ds_config.json", batch_size=12, world_size=1)
    write_run(run, load_recipe(str(recipe_file)), ds_config)
    return run


def parse(run):
    return Page(write_report(run).read_text())


def step_record(step):
    return {
        "step": step, "epoch": 0, "loss": 2.0, "loss_de": 1.5, "lr": 0.1, "pool_size": 20,
        "texts_per_s": 10.0, "step_s": 0.5, "time_s": {"forward": 0.3, "backward": 0.1},
    }  # fmt: skip


def assert_stands_alone(page):
    assert page.loads() == []
    assert not [tag for tag, _ in page.tags if tag in ("script", "link", "iframe", "img")]
    assert len(page.ids()) == len(set(page.ids()))
    assert ("html", {"lang": "en"}) in page.tags
    assert [tag for tag, _ in page.tags].count("title") == 1
    assert [tag for tag, _ in page.tags].count("h1") == 1


def test_a_run_before_its_first_step(tmp_path):
    page = parse(make_run(tmp_path))
    assert_stands_alone(page)
    assert "not finished: no step yet" in page.text
    assert "no training step has been logged" in page.text
    assert "final evaluation comes after the last step" in page.text
    assert page.tables.keys().isdisjoint({f"metric-{name}" for name in ("P", "R")})


def test_an_unfinished_run_shows_what_it_has(tmp_path):
    run = make_run(tmp_path, mining={"every_epochs": 1})
    monitor = Monitor(run, 0, 40)
    for step in range(3):
        monitor.log_step(step_record(step))
    monitor.close()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')  # being written
    untrained = {f"{name}@{k}": 12.5 for name in ("P", "nDCG", "PSP", "PSnDCG", "R", "coverage")
                 for k in KS}  # fmt: skip
    write_json(run / "untrained.json", {"test": untrained})
    page = parse(run)
    assert_stands_alone(page)
    assert "not finished: 3 steps, no checkpoint yet" in page.text
    assert "Nothing was mined yet" in page.text
    assert page.tables["metric-P"]["untrained"] == ["12.50"] * 5
    captions = page.text
    assert "Loss" in captions
    assert "Gradient norm" not in captions  # not logged: no empty chart
    # 0.3, 0.1 and the 0.1 that no part counts, of 0.5
    shares = re.findall(r"(\d+\.\d)%", page.text)
    assert shares == ["60.0", "20.0", "20.0"]


def test_a_run_without_validation_or_mining_says_so(tmp_path):
    run = make_run(tmp_path, corpus={"validation_fraction": 0.0})
    monitor = Monitor(run, 0, 40)
    monitor.log_step(step_record(0))
    monitor.close()
    page = parse(run)
    assert "this run evaluates no validation queries" in page.text
    assert "This run does not mine" in page.text


def test_the_final_evaluation_of_a_corpus_without_test_set_is_no_epoch_of_its_own(tmp_path):
    run = make_run(tmp_path, train={"epochs": 3})
    values = dict.fromkeys(("P@1", "nDCG@5", "PSP@5", "R@100"), 1.0)
    monitor = Monitor(run, 0, 30)
    for step, epoch in ((10, 0), (20, 1), (30, 2), (30, 3)):  # the last is the final one
        monitor.log_evaluation(step, epoch, "validation", {"de": values})
    monitor.close()
    assert [entry["epoch"] for entry in read_record(run).validations] == [0, 1, 2]
    assert "Validation P@1" in parse(run).text


def test_texts_of_the_user_are_escaped_wherever_they_stand(tmp_path):
    run = make_run(tmp_path)
    environment = json.loads((run / "environment.json").read_text())
    write_json(run / "environment.json", {**environment, "command": HOSTILE})
    label = {"uid": HOSTILE, "text": HOSTILE}
    query = {**label, "predictions": [{**label, "score": 1.0, "is_true": True}],
             "missed": [label], "num_missed": 3}  # fmt: skip
    write_json(run / "samples.json", {"split": "test", "view": "de", "right": [query], "wrong": []})
    page = parse(run)
    assert_stands_alone(page)
    assert page.text.count(HOSTILE) == 5  # command, query, its uid, a prediction, a missed label
    assert "and 2 more" in page.text


def test_a_folder_that_is_no_run_and_an_output_that_cannot_be_written(tmp_path, capsys):
    assert exit_with_message(lambda: print(write_report(tmp_path / "nothing"))) == 2
    assert "not a run directory" in capsys.readouterr().err
    run = make_run(tmp_path)
    nowhere = tmp_path / "none" / "page.html"
    assert exit_with_message(lambda: print(write_report(run, nowhere))) == 2
    assert f"--out: {nowhere} cannot be written" in capsys.readouterr().err


# ------------------------------------------------------------------ trained runs


@pytest.fixture(scope="module")
def hostile_inputs(tmp_path_factory):
    """A corpus in which every text tries to break out of the page, and of a TSV file."""
    folder = tmp_path_factory.mktemp("inputs")
    make_encoder(folder / "encoder")
    content = random_content(num_train=90, num_labels=60)
    content.labels = [f"{HOSTILE} {text}" if text else "" for text in content.labels]
    for texts in content.queries.values():
        texts[:] = [f"{HOSTILE} {text}" for text in texts]
    write_renee(folder / "raw", content)
    (folder / "ds_config.json").write_text(json.dumps(DS_CONFIG))
    return folder


def trained(inputs, run, **sections):
    recipe = write_recipe_file(inputs, f"{run.name}.yaml", **sections)
    arguments = (str(recipe), str(inputs / "ds_config.json"), str(run), [])
    run_ranks(1, train, *arguments, join=False)
    return run


@pytest.fixture(scope="module")
def run(hostile_inputs, tmp_path_factory):
    sections = {
        "mining": {"start_epoch": 1, "every_epochs": 1},
        "evaluation": {"projector_labels": 20},
    }
    return trained(hostile_inputs, tmp_path_factory.mktemp("runs") / "whole", **sections)


@pytest.mark.slow
@pytest.mark.kernel
def test_the_page_of_a_trained_run_holds_the_figures_of_its_evaluation(run):
    page = parse(run)
    assert_stands_alone(page)
    assert "finished, 21 steps" in page.text
    assert "{{ 7 * 7 }}" in page.text
    evaluation = json.loads((run / "evaluation.json").read_text())
    views = ["untrained", "de", "classifier", "unified", "unified_tuned"]
    assert list(evaluation["test"]) == views
    for view, values in evaluation["test"].items():
        for name in ("P", "nDCG", "PSP", "PSnDCG", "R", "coverage"):
            expected = [f"{values[f'{name}@{k}']:.2f}" for k in KS]
            assert page.tables[f"metric-{name}"][view] == expected
    assert "a=0.55, b=1.5, N=90 train queries" in page.text
    for needed in ("Validation P@1", "2 minings", "mining: search", "First prediction wrong"):
        assert needed in page.text


@pytest.mark.slow
@pytest.mark.kernel
def test_the_parts_by_frequency_add_up_and_are_in_page_file_and_text(run):
    evaluation = json.loads((run / "evaluation.json").read_text())
    parts = evaluation["breakdown"]["test"]
    assert parts.keys() == evaluation["test"].keys()
    for view, bins in parts.items():
        assert [part["name"] for part in bins] == ["head", "torso", "tail"]
        assert sum(part["num_labels"] for part in bins) == 60
        for k in KS:
            total = sum(part["scores"][f"P@{k}"] for part in bins)
            assert total == pytest.approx(evaluation["test"][view][f"P@{k}"])
    report = (run / "report.txt").read_text()
    tail = next(line for line in report.splitlines() if line.startswith("tail"))
    expected = [f"{parts['unified'][2]['scores'][name]:.2f}" for name in ("P@1", "P@5", "R@10")]
    assert tail.split()[-4:-1] == expected
    assert any(bins.get("tail", [])[2:5] == expected for bins in parse(run).tables.values())


@pytest.mark.slow
@pytest.mark.kernel
def test_tensorboard_has_the_label_vectors_and_the_frequency_figure(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = run / "00021" / "labels"
    vectors = [line.split("\t") for line in (folder / "tensors.tsv").read_text().splitlines()]
    assert (len(vectors), {len(vector) for vector in vectors}) == (20, {bert_config().hidden_size})
    header, *rows = (folder / "metadata.tsv").read_text().splitlines()
    assert header == "label\ttrain_positives"
    assert len(rows) == 20
    assert all(HOSTILE in row and row.split("\t")[1].isdigit() for row in rows)
    assert "00021/labels/tensors.tsv" in (run / "projector_config.pbtxt").read_text()
    events = EventAccumulator(str(run)).Reload()
    tags = events.Tags()["images"]
    assert sorted(tags) == [f"{s}/precision_by_label_frequency" for s in ("test", "validation")]
    assert len(events.Images("validation/precision_by_label_frequency")) == 3


@pytest.mark.slow
@pytest.mark.kernel
def test_a_run_with_one_view_and_nothing_optional(hostile_inputs, tmp_path):
    sections = {
        "corpus": {"validation_fraction": 0.0},
        "objective": {"de": "none", "classifier": "bce"},
        "train": {"max_steps": 2},
    }
    run = trained(hostile_inputs, tmp_path / "single", **sections)
    page = parse(run)
    assert_stands_alone(page)
    assert list(page.tables["metric-P"])[1:] == ["untrained", "classifier"]
    assert not (run / "projector_config.pbtxt").exists()  # there is no dual encoder to look at
    shutil.copytree(run, tmp_path / "older")
    for name in ("samples.json", "untrained.json", "environment.json", "ds_config.json"):
        (tmp_path / "older" / name).unlink()
    older = json.loads((run / "evaluation.json").read_text())
    del older["breakdown"]
    write_json(tmp_path / "older" / "evaluation.json", older)
    assert_stands_alone(parse(tmp_path / "older"))
