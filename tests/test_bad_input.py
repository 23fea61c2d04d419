"""What a user gets wrong: exit code 2, a message that helps, and nothing left behind."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from data.raw_corpora import random_content, write_renee
from tiny import DS_CONFIG, make_inputs, write_recipe_file

from unidec_ds.config import load_recipe
from unidec_ds.exits import exit_with_message
from unidec_ds.job import prepare_job


@pytest.fixture
def inputs(tmp_path):
    return make_inputs(tmp_path)


def leave(inputs, capsys, overrides=(), ds_config=None, run="run", resume=None, **sections):
    """Returns (exit code, message) of a job that gets no further than its checks."""
    recipe = write_recipe_file(inputs, **sections)
    ds_file = inputs / "ds_config.json"
    if ds_config is not None:
        ds_file.write_text(json.dumps(ds_config))

    def main():
        prepare_job(load_recipe(str(recipe), list(overrides)), ds_file, inputs / run, resume)

    code = exit_with_message(main)
    return code, capsys.readouterr().err


def test_good_input_passes_every_check(inputs, capsys):
    code, message = leave(inputs, capsys)
    assert code == 0, message


@pytest.mark.parametrize(
    ("overrides", "needed"),
    [
        (["train.bach_size=4"], "did you mean batch_size"),
        (["optimizer.row_lr=-1"], "optimizer.row_lr"),
        (["corpus.path=/nowhere"], "neither a folder"),
        (["encoder.name=/nowhere"], "there is no folder"),
        (["encoder.max_length=2"], "encoder.max_length"),
    ],
)
def test_recipe_values(inputs, capsys, overrides, needed):
    code, message = leave(inputs, capsys, overrides)
    assert code == 2
    assert needed in message
    assert "Traceback" not in message


@pytest.mark.parametrize(
    ("change", "needed"),
    [
        ({"fp16": {"enabled": True}}, "fp16 is refused"),
        ({"gradient_accumulation_steps": 2}, "train.encoder_chunk"),
        ({"zero_optimization": {"stage": 2, "stge": 1}}, "zero_optimization.stge"),
        ({"train_batch_size": 999}, "train.batch_size 12"),
    ],
)
def test_ds_config_values(inputs, capsys, change, needed):
    code, message = leave(inputs, capsys, ds_config={**DS_CONFIG, **change})
    assert code == 2
    assert needed in message


def test_more_ranks_than_queries(inputs, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "13")
    code, message = leave(inputs, capsys)
    assert code == 2
    assert "13 ranks" in message


def test_a_ds_config_that_differs_from_the_launchers(inputs, capsys, monkeypatch):
    other = inputs / "other.json"
    other.write_text(json.dumps({"zero_optimization": {"stage": 1}}))
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(other))
    code, message = leave(inputs, capsys)
    assert code == 2
    assert "give both the same file" in message
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(inputs / "ds_config.json"))
    assert leave(inputs, capsys)[0] == 0


def test_a_corpus_with_a_bad_line_names_it_and_leaves_no_corpus(inputs, capsys):
    content = random_content(num_train=9)
    content.targets["train"][4] = [999]
    write_renee(inputs / "bad", content)
    code, message = leave(inputs, capsys, [f"corpus.path={inputs / 'bad'}"])
    assert code == 2
    assert "trn_X_Y.txt:6" in message
    assert "999" in message
    assert not [p for p in (inputs / "prepared").glob("bad*") if (p / "corpus.json").exists()]


def test_training_prepares_a_corpus_without_its_bad_lines_where_a_quarantine_is_named(
    inputs, capsys
):
    content = random_content(num_train=19)
    content.targets["train"][4] = [999]
    write_renee(inputs / "bad", content)
    overrides = [f"corpus.path={inputs / 'bad'}", f"corpus.quarantine={inputs / 'lines.jsonl'}"]
    code, message = leave(inputs, capsys, overrides)
    assert code == 0, message
    (line,) = (json.loads(text) for text in (inputs / "lines.jsonl").read_text().splitlines())
    assert line["file"].endswith("trn_X_Y.txt")
    assert (line["line"], line["text"]) == (6, "999:1.0")
    assert "label id 999 is out of range" in line["reason"]


def test_resume_and_output(inputs, capsys):
    run = inputs / "run"
    run.mkdir()
    (run / "config.yaml").write_text("corpus: {}")
    code, message = leave(inputs, capsys)
    assert code == 2
    assert "--resume auto" in message
    code, message = leave(inputs, capsys, resume=str(inputs / "none"), run="other")
    assert code == 2
    assert "there is no checkpoint" in message


@pytest.mark.slow
def test_a_table_that_does_not_fit_leaves_train_py_with_2_and_nothing_allocated(inputs):
    """/proc is a folder on a file system without a free byte."""
    offload = {"device": "nvme", "nvme_path": "/proc"}
    (inputs / "ds_config.json").write_text(
        json.dumps({"zero_optimization": {"stage": 2, "offload_optimizer": offload}})
    )
    command = [sys.executable, "train.py", "--recipe", str(write_recipe_file(inputs))]
    command += ["--ds_config", str(inputs / "ds_config.json"), "--output", str(inputs / "run")]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 2, done.stderr
    assert "does not fit into the disk of /proc: 60 labels x 16" in done.stderr
    assert "(11,520 bytes) there, and 0.0 GiB (0 bytes) are free. Not one row fits" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (inputs / "run").exists()


def test_our_own_faults_leave_with_1_and_a_traceback_that_names_the_rank(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    assert exit_with_message(lambda: 1 // 0) == 1
    assert "[rank 3] ZeroDivisionError" in capsys.readouterr().err


def test_train_py_is_short_and_documents_its_launchers():
    source = (Path(__file__).parents[1] / "train.py").read_text()
    assert len(source.splitlines()) < 80
    for launcher in ("deepspeed", "accelerate launch", "torchrun", "python train.py"):
        assert launcher in source
