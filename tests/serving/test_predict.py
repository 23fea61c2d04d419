"""Texts in, labels out: through the API, the command line and a terminal."""

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from saved_run import save_run
from tiny import make_inputs

import unidec_ds
from unidec_ds.assembly import load_run
from unidec_ds.errors import CheckpointError, UserError
from unidec_ds.evaluation import evaluate
from unidec_ds.exits import exit_with_message
from unidec_ds.index import IndexConfig
from unidec_ds.serving.console import answer_lines, check_files

COMMAND = str(Path(sys.executable).parent / "unidec-ds")
VIEWS = ("de", "classifier", "unified")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def run(inputs):
    return save_run(inputs)


def load(run, **options):
    return unidec_ds.load(run, device="cpu", show_progress=False, **options)


def opened(run):
    import torch

    return load_run(run, torch.device("cpu"))


# --- Python


def test_importing_the_package_imports_no_torch():
    code = "import sys, unidec_ds; assert 'torch' not in sys.modules; unidec_ds.load; " \
           "assert 'torch' in sys.modules"  # fmt: skip
    subprocess.run([sys.executable, "-c", code], check=True)
    assert not hasattr(unidec_ds, "unload")


@pytest.mark.parametrize("view", VIEWS)
def test_answers_are_those_of_evaluation(run, view):
    loaded = opened(run)
    corpus, ids = loaded.corpus, np.arange(len(loaded.corpus.queries["test"]))
    expected = evaluate(
        loaded.model, loaded.rows, corpus, ids, split="test", views=(view,),
        cosine_classifier=False, propensity=(0.55, 1.5),
    ).predictions[view]  # fmt: skip
    no_filters = np.setdiff1d(ids, corpus.filter_pairs["test"].rows_of_pairs())
    texts = [text or "  " for text in corpus.queries["test"].texts(ids)]
    answers = load(run, view=view).predict(texts, k=corpus.num_labels)
    compared = 0
    for query in no_filters:
        if texts[query].strip():
            kept = expected.label_ids[query] >= 0
            found = [label.label_id for label in answers[query]]
            scores = [label.score for label in answers[query]]
            np.testing.assert_allclose(scores, expected.scores[query][kept], atol=1e-5)
            assert sorted(found) == sorted(expected.label_ids[query][kept].tolist())
            compared += 1
    assert compared > 3


def test_a_label_without_text_is_found_by_its_row_only(run):
    corpus = opened(run).corpus
    textless = set(np.flatnonzero(~np.asarray(corpus.label_has_text)).tolist())
    assert textless
    found = {
        view: {x.label_id for x in load(run, view=view).predict(["red car"], 1000)[0]}
        for view in VIEWS
    }
    assert found["unified"] == found["classifier"] == set(range(corpus.num_labels))
    assert found["de"] == set(range(corpus.num_labels)) - textless


def test_labels_carry_their_uid_and_text(run):
    corpus = opened(run).corpus
    (labels,) = load(run).predict(["small house"], 4)
    assert len(labels) == 4
    for label in labels:
        assert isinstance(label, unidec_ds.Label)
        ids = np.array([label.label_id])
        assert [label.uid] == corpus.labels.uids(ids)
        assert [label.text] == corpus.labels.texts(ids)
    assert [x.score for x in labels] == sorted((x.score for x in labels), reverse=True)


def test_batches_and_order_do_not_matter(run):
    predictor = load(run)
    texts = ["red car", "", "the paper house", "  ", "東京", "tree", "new " * 100, "\t"]
    together = predictor.predict(texts, 3)
    assert [len(labels) for labels in together] == [3, 0, 3, 0, 3, 3, 3, 0]
    for batch_size in (1, 2, 5):
        again = predictor.predict(texts, 3, batch_size=batch_size)
        for one, other in zip(together, again, strict=True):
            assert [x.label_id for x in one] == [x.label_id for x in other]
    assert predictor.predict([], 3) == []
    assert predictor.predict(["", " "], 3) == [[], []]
    alphabets = predictor.predict(["слово", "🙂", "\x00", "café"], 2)
    assert [len(labels) for labels in alphabets] == [2, 2, 2, 2]


@pytest.mark.parametrize("kind", ["ivf", "hnsw"])
@pytest.mark.parametrize("view", VIEWS)
def test_an_index_answers_like_exact_search(run, view, kind):
    texts = ["red car", "small house", "the green tree", "old paper boat"]
    exact = load(run, view=view).predict(texts, 5)
    config = IndexConfig(kind=kind, probes=1000, search_depth=1000)
    predictor = load(run, view=view, index=config)
    near = predictor.predict(texts, 5)
    for one, other in zip(exact, near, strict=True):
        assert [x.label_id for x in one] == [x.label_id for x in other]
        assert [x.score for x in one] == pytest.approx([x.score for x in other], abs=1e-5)
    assert f"{kind} index, finds 100.0% of the exact 10 best" in predictor.describe()
    everything = predictor.predict(texts[:1], 1000)[0]
    assert len(everything) == len(load(run, view=view).predict(texts[:1], 1000)[0])


def test_an_index_is_made_once_and_again_for_a_newer_checkpoint(inputs, caplog):
    run = save_run(inputs, "aging")
    config = IndexConfig(kind="ivf")
    load(run, index=config)
    path = run / "index" / "ivf-unified.faiss"
    made_ns = path.stat().st_mtime_ns
    load(run, index=config)
    assert path.stat().st_mtime_ns == made_ns
    assert "building it again" not in caplog.text
    save_run(inputs, "aging", step=2, seed=3)
    load(run, index=config)
    assert path.stat().st_mtime_ns > made_ns
    assert "checkpoint is step_00000001, needed step_00000002" in caplog.text


def test_an_index_of_another_run_is_refused_by_name_and_replaced_in_place(inputs, run, caplog):
    other = save_run(inputs, "stranger", seed=11)
    load(other, index=IndexConfig(kind="ivf"))
    theirs = other / "index" / "ivf-unified.faiss"
    with pytest.raises(UserError, match="not the index that was needed: checkpoint_sha256 is"):
        load(run, index=theirs)
    load(run, index=IndexConfig(kind="ivf"))
    ours = run / "index" / "ivf-unified.faiss"
    assert load(run, index=ours).predict(["red car"]) == load(
        run, index=IndexConfig(kind="ivf")
    ).predict(["red car"])
    for source in (theirs, theirs.with_suffix(".json")):
        (ours.parent / source.name).write_bytes(source.read_bytes())
    load(run, index=IndexConfig(kind="ivf"))
    assert "building it again" in caplog.text
    with pytest.raises(UserError, match="is not an index of ours"):
        load(run, index=run / "index" / "vectors-unified.npy")


def test_a_weight_moves_the_unified_view_between_the_two(run):
    texts = ["red car", "small house"]
    for weight, view in ((1.0, "de"), (0.0, "classifier")):
        weighted = load(run, weight_de=weight).predict(texts, 5)
        if view == "de":
            alone = load(run, view="de").predict(texts, 5)
            for one, other in zip(weighted, alone, strict=True):
                assert [x.score / 2 for x in one] == pytest.approx(
                    [x.score for x in other], abs=1e-5
                )
        assert weighted != load(run).predict(texts, 5)


@pytest.mark.parametrize(
    ("options", "arguments", "needed"),
    [
        ({}, ("red car",), "needs a list of texts"),
        ({}, ([3],), r"texts\[0\]: found int"),
        ({}, (["ok", "\ud800"],), r"texts\[1\]: holds .*surrogate"),
        ({}, (["red"], 0), "k: found 0"),
        ({"device": "abacus"}, (), "device: 'abacus' cannot be used"),
        ({"weight_de": 1.5}, (), "weight_de: found 1.5"),
    ],
)
def test_wrong_arguments_are_named(run, options, arguments, needed):
    with pytest.raises(UserError, match=needed):
        unidec_ds.load(run, show_progress=False, **options).predict(*arguments)


def test_runs_that_cannot_answer(inputs, run, tmp_path):
    with pytest.raises(CheckpointError, match="not a run directory"):
        load(tmp_path)
    (tmp_path / "config.yaml").write_text((run / "config.yaml").read_text())
    with pytest.raises(CheckpointError, match="no complete checkpoint yet"):
        load(tmp_path)
    single = save_run(inputs, "de-only", objective={"classifier": "none"})
    assert load(single).view == "de"
    with pytest.raises(UserError, match="trained de, not classifier"):
        load(single, view="classifier")


# --- files


def answer(run, source, output=None, **options):
    answer_lines(
        load(run), str(source), output,
        **{"k": 3, "batch_size": 4, "as_json": True, **options},
    )  # fmt: skip


def test_lines_are_answered_in_order_and_the_file_is_whole(run, tmp_path):
    texts = ["red car", "", "house\u2028tree", "a boat"] * 3 + ["last, without an end"]
    source, output = tmp_path / "in.txt", tmp_path / "out.jsonl"
    source.write_text("\n".join(texts))
    answer(run, source, output)
    rows = [json.loads(line) for line in output.read_text().split("\n")[:-1]]
    assert [row["text"] for row in rows] == texts
    expected = load(run).predict(texts, 3)
    for row, labels in zip(rows, expected, strict=True):
        assert [x["label_id"] for x in row["labels"]] == [x.label_id for x in labels]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("out")] == [
        "out.jsonl"
    ]


def test_a_failure_leaves_no_half_file(run, tmp_path):
    source, output = tmp_path / "in.txt", tmp_path / "out.jsonl"
    source.write_bytes(b"red car\n" * 9 + b"\xff\n")
    with pytest.raises(UserError, match=r"in\.txt:10: byte 1 .* not UTF-8"):
        answer(run, source, output)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.txt"]


@pytest.mark.slow
def test_many_lines_take_no_more_memory_than_few(run, tmp_path):
    code = """
import resource, sys
from pathlib import Path
import unidec_ds
from unidec_ds.serving.console import answer_lines
predictor = unidec_ds.load(sys.argv[1], device="cpu")
def peak(name):
    answer_lines(predictor, name, Path(name + ".out"), k=2, batch_size=64, as_json=False)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
few = peak(sys.argv[2])
print(peak(sys.argv[3]) - few)
"""
    few, many = tmp_path / "few", tmp_path / "many"
    line = "red green blue small large old new car boat house tree paper" + "\n"
    few.write_text(line * 200)
    many.write_text(line * 12_000)  # with its answers 2 MiB of text
    done = subprocess.run(
        [sys.executable, "-c", code, str(run), str(few), str(many)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert len((tmp_path / "many.out").read_text().splitlines()) == 3 * 12_000
    assert int(done.stdout) < 1024  # KiB


@pytest.mark.parametrize(
    ("given", "needed"),
    [
        (("none.txt", None, False), "none.txt cannot be read: No such file"),
        ((".", None, False), "cannot be read: Is a directory"),
        (("in.txt", "there.txt", False), "there.txt is there already; add --overwrite"),
        (("in.txt", "nowhere/out.txt", False), "there is no folder"),
        (("in.txt", "folder", True), "is a folder"),
        ((None, None, False), "--input: missing"),
    ],
)
def test_files_are_checked_first(tmp_path, monkeypatch, given, needed):
    monkeypatch.chdir(tmp_path)
    for name in ("in.txt", "there.txt"):
        (tmp_path / name).write_text("x\n")
    (tmp_path / "folder").mkdir()
    source, output, overwrite = given
    with open(os.devnull) as nothing:
        monkeypatch.setattr(sys, "stdin", nothing)
        with pytest.raises(UserError, match=needed):
            check_files(source, Path(output) if output else None, overwrite)
    check_files("in.txt", Path("there.txt"), overwrite=True)


# --- the command


def command(*arguments, **options):
    return subprocess.run(
        [COMMAND, "predict", *map(str, arguments)],
        capture_output=True, text=True, check=False, timeout=120, **options,
    )  # fmt: skip


def test_the_command_reads_standard_input_and_overwrites_only_when_told(run, tmp_path):
    output = tmp_path / "out.txt"
    output.write_text("precious\n")
    options = (run, "--input", "-", "--output", output, "--k", 2, "--index", "ivf")
    done = command(*options, input="red car\n\nhouse\n")
    assert done.returncode == 2
    assert "add --overwrite" in done.stderr
    assert "Traceback" not in done.stderr
    assert output.read_text() == "precious\n"
    done = command(*options, "--overwrite", input="red car\n\nhouse\n")
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    lines = output.read_text().splitlines()
    assert [line for line in lines if not line.startswith("  ")] == ["red car", "", "house"]
    assert len(lines) == 7


def test_a_closed_pipe_ends_quietly(run, tmp_path):
    source = tmp_path / "in.txt"
    source.write_text("red car\n" * 5000)
    done = subprocess.run(
        ["bash", "-c", '"$0" predict "$1" --input "$2" --batch-size 16 | head -n 1',
         COMMAND, str(run), str(source)],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.stdout == "red car\n"
    assert "Broken" not in done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "needed"),
    [
        (("--k", "0"), "--k: found 0"),
        (("--batch-size", "0"), "--batch-size: found 0"),
        (("--weight-de", "2"), "--weight-de: found '2'; needs a number from 0 to 1"),
        (("--weight-de", "tuned"), "names no weight for step_"),
        (("--index", "annoy"), "--index: found annoy; needs auto, exact, ivf, hnsw or"),
    ],
)
def test_wrong_options_leave_with_2(run, capsys, monkeypatch, arguments, needed):
    from unidec_ds.cli import _main

    monkeypatch.setattr(
        sys, "argv", ["unidec-ds", "predict", str(run), "--input", "/dev/null", *arguments]
    )
    assert exit_with_message(_main) == 2
    assert needed in capsys.readouterr().err


def read_until(terminal, wanted, timeout_s=60):
    """Returns what the terminal showed up to and with `wanted`."""
    seen, deadline = b"", time.monotonic() + timeout_s
    while wanted not in seen:
        ready, _, _ = select.select([terminal], [], [], max(0.0, deadline - time.monotonic()))
        assert ready, f"waited for {wanted!r}, saw {seen.decode(errors='replace')}"
        try:
            part = os.read(terminal, 4096)
        except OSError:  # the other end is closed
            part = b""
        assert part, f"the terminal closed before {wanted!r}: {seen.decode(errors='replace')}"
        seen += part
    return seen.decode()


@pytest.fixture
def terminal(run):
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [COMMAND, "predict", str(run), "--k", "2"],
        stdin=theirs, stdout=theirs, stderr=theirs, close_fds=True,
        env={**os.environ, "TERM": "dumb"},
        # Where the tests run in the background, it would be ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    os.close(theirs)
    try:
        yield ours, process
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def test_a_person_is_asked_and_answered_until_ctrl_d(run, terminal):
    screen, process = terminal
    greeting = read_until(screen, b"> ")
    assert "60 labels, exact search" in greeting
    (expected,) = load(run).predict(["red car"], 2)
    os.write(screen, b"red car\n")
    shown = read_until(screen, b"> ")
    for label in expected:
        assert f"{label.score:6.3f}  {label.uid}  {label.text}" in shown
    os.write(screen, b"\n")
    assert "  0" not in read_until(screen, b"> ")
    os.write(screen, b"\x04")
    assert process.wait(timeout=30) == 0


@pytest.mark.slow
def test_ctrl_c_at_the_prompt_leaves_quietly(terminal):
    screen, process = terminal
    read_until(screen, b"> ")
    # One between the prompt and the wait for a key is seen with the next; nobody types so fast.
    while not process.send_signal(signal.SIGINT) and not select.select([screen], [], [], 10)[0]:
        assert process.poll() is None
    assert "Traceback" not in read_until(screen, b"interrupted")
    assert process.wait(timeout=30) == 130
