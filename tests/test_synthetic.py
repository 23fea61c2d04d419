import importlib.util
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from unidec_ds.data.formats import recognise
from unidec_ds.errors import UserError

SCRIPTS = Path(__file__).parent.parent / "scripts"
SIZES = (600, 40, 500, 12.0)


def load_script(name: str):
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make_synthetic = load_script("make_synthetic")
make_tiny_encoder = load_script("make_tiny_encoder")


def make(folder: Path, seed: int = 0, filter_share: float = 0.0) -> Path:
    corpus = make_synthetic.Synthetic(make_synthetic.Sizes(*SIZES), 200, seed)
    make_synthetic.write(corpus, folder, filter_share=filter_share, show_progress=False)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make(tmp_path_factory.mktemp("synthetic") / "raw", filter_share=0.5)


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_package_reads_it_with_the_sizes_asked_for(folder):
    raw = recognise(folder)
    assert raw.layout == "XMC repository"
    labels = list(raw.labels())
    assert len({record.uid for record in labels}) == 500
    assert all(4 <= len(record.title.split()) <= 7 for record in labels)
    for split, count in (("train", 600), ("test", 40)):
        records = list(raw.queries(split, 500))
        assert len({record.uid for record in records}) == count
        assert all(list(r.targets) == sorted(set(r.targets)) for r in records)
        rows, _ = raw.filter_pairs(split, count, 500)
        assert 0.3 * count < len(rows) < 0.7 * count


def test_positives_have_the_mean_and_the_tails_asked_for(folder):
    targets = [record.targets for record in recognise(folder).queries("train", 500)]
    counts = np.array([len(labels) for labels in targets])
    assert counts.mean() == pytest.approx(12.0, rel=0.15)
    assert counts.min() == 1
    assert counts.max() > 4 * np.median(counts)  # log-normal
    frequency = np.sort(np.bincount(np.concatenate(targets), minlength=500))
    assert frequency[-1] > 5 * np.median(frequency)


def test_texts_tell_which_labels_are_near(folder):
    """A query shares more words with its positives than with other labels."""
    raw = recognise(folder)
    words = [set(record.title.split()) for record in raw.labels()]
    shared = Counter()
    for record in raw.queries("train", 500):
        mine = set(record.title.split())
        shared["true"] += np.mean([len(mine & words[label]) for label in record.targets])
        shared["any"] += np.mean([len(mine & other) for other in words])
    assert shared["true"] > 1.5 * shared["any"]


def test_it_is_a_function_of_the_seed(folder, tmp_path):
    assert bytes_of(make(tmp_path / "again", filter_share=0.5)) == bytes_of(folder)
    other = bytes_of(make(tmp_path / "other", seed=1, filter_share=0.5))
    assert all(other[name] != content for name, content in bytes_of(folder).items())


def test_records_do_not_depend_on_what_is_made_beside_them(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(make_synthetic, "BLOCK", 7)
    small = recognise(make(tmp_path / "small"))
    whole = recognise(folder)
    assert [r.title for r in small.queries("train", 500)] == [
        r.title for r in whole.queries("train", 500)
    ]


def test_a_folder_that_holds_files_is_refused(tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(UserError, match="not empty"):
        make(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    ("option", "message"),
    [("--labels=0", "every size"), ("--words=3", "--words"), ("--filter-share=2", "--filter")],
)
def test_wrong_options_exit_with_2(tmp_path, option, message):
    command = [sys.executable, SCRIPTS / "make_synthetic.py", f"--out={tmp_path / 'x'}", option]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, message in done.stderr) == (2, True), done.stderr
    assert not (tmp_path / "x").exists()


def test_the_tiny_encoder_knows_the_corpus_words(folder, tmp_path):
    make_tiny_encoder.make_encoder(folder, tmp_path / "encoder", width=32, num_words=150)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "encoder")
    model = AutoModel.from_pretrained(tmp_path / "encoder")
    words = Counter(word for record in recognise(folder).labels() for word in record.title.split())
    common = [word for word, _ in words.most_common(100)]
    assert tokenizer.tokenize(" ".join(common)) == common
    rare = tokenizer.tokenize("zzyx Émile-7")
    assert len(rare) > 2
    assert "".join(piece.removeprefix("##") for piece in tokenizer.tokenize("bazu")) == "bazu"
    with torch.no_grad():
        output = model(**tokenizer([common[0], "bazu"], return_tensors="pt", padding=True))
    assert output.last_hidden_state.shape[::2] == (2, 32)
    assert output.last_hidden_state.isfinite().all()


def test_the_tiny_encoder_does_not_overwrite(folder, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="not empty"):
        make_tiny_encoder.make_encoder(folder, tmp_path, width=32, num_words=150)
