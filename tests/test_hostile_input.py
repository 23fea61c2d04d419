"""Faults that broken or hostile files found once; each test names its bug."""

import json
import re
import shutil
from hashlib import sha256

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import scipy.sparse
import torch
from data.raw_corpora import (
    csr,
    random_content,
    save_tokenizer,
    write_dataset,
    write_dexml,
    write_jsonl,
    write_parquet,
    write_renee,
    write_xmc,
)
from safetensors.torch import save_file
from saved_run import save_run
from tiny import make_inputs, recipe_text

from unidec_ds import checkpoint
from unidec_ds.assembly import load_run
from unidec_ds.config import load_recipe
from unidec_ds.data.corpus import open_corpus
from unidec_ds.data.files import read_lines, shorten
from unidec_ds.data.formats import recognise
from unidec_ds.data.matrices import SparseMatrixFile, read_pairs
from unidec_ds.data.predictions import read_positives, read_predictions
from unidec_ds.data.prepare import prepare
from unidec_ds.ds_config import load_ds_config
from unidec_ds.errors import CheckpointError, ConfigError, CorpusError, UserError
from unidec_ds.manifest import ENCODER_FILE, load_tensors, read_manifest, rows_file
from unidec_ds.mining.mined import MiningSeconds, MiningTexts, open_mined, write_mined
from unidec_ds.run import describe_run, read_json


def read_queries(folder, num_labels=23):
    return list(recognise(folder).queries("train", num_labels))


# ---------------------------------------------------------------------------- raw corpora


@pytest.mark.parametrize("relevance", ["NaN", '"0"', "null", "true", "[0]"])
def test_what_is_no_number_was_taken_for_a_relevance(relevance, tmp_path):
    write_xmc(tmp_path, random_content())
    row = '{"uid": "x", "title": "red", "target_ind": [1], "target_rel": [RELEVANCE]}\n'
    (tmp_path / "trn.json").write_text(row.replace("RELEVANCE", relevance))
    with pytest.raises(CorpusError, match=r"trn\.json:1: target_rel is .*needed a list of 1 num"):
        read_queries(tmp_path)


def test_nan_was_taken_for_a_positive(tmp_path):
    content = random_content()
    write_renee(tmp_path / "renee", content)
    path = tmp_path / "renee" / "trn_X_Y.txt"
    path.write_text(path.read_text().replace(":1.0", ":nan", 1))
    write_dexml(tmp_path / "dexml", content)
    matrix = csr(content.targets["train"], 23)
    matrix.data[0] = np.nan
    scipy.sparse.save_npz(tmp_path / "dexml" / "Y.trn.npz", matrix)
    for folder in ("renee", "dexml"):
        with pytest.raises(CorpusError, match=r":\d+: label \d+ has the value NaN"):
            read_queries(tmp_path / folder)


@pytest.mark.parametrize("entry", ["1_0:1", "1:1_0", "１:1"])
def test_numbers_that_only_python_reads_were_taken_for_labels(entry, tmp_path):
    (tmp_path / "m.txt").write_text(f"1 99\n{entry}\n")
    with pytest.raises(CorpusError, match=r"m\.txt:2: found '.*', needed entries"):
        list(SparseMatrixFile(tmp_path / "m.txt"))
    (tmp_path / "f.txt").write_text("0 1_0\n")
    with pytest.raises(CorpusError, match=r"f\.txt:1: found '0 1_0', needed two integers"):
        read_pairs(tmp_path / "f.txt", 5, 99)


@pytest.mark.parametrize("header", ["-1 4", "1 -4", "1 2147483648", "1 99999999999999999999"])
def test_headers_below_zero_or_beyond_32_bits_ended_in_a_traceback(header, tmp_path):
    (tmp_path / "t.txt").write_text(f"{header}\n0:1\n")
    with pytest.raises(CorpusError, match=r"t\.txt:1: found .* not above 2147483647"):
        read_positives(tmp_path / "t.txt")


def npz(path, **changed):
    matrix = csr([[0, 3], [], [2]], 4)
    arrays = {
        "format": np.array(b"csr"),
        "shape": np.array([3, 4]),
        "indptr": matrix.indptr,
        "indices": matrix.indices,
        "data": matrix.data,
    }
    np.savez(path, **{**arrays, **changed})
    return path


@pytest.mark.parametrize(
    "changed",
    [
        {"indices": np.array([0.7, 3.2, 2.9])},  # were cut to 0, 3, 2
        {"indptr": np.array([1, 3, 3, 4])},  # every row was read one entry early
        {"indptr": np.array([0, 2, 2, 3, 3])},  # a row more than the shape says
        {"indptr": np.array([0, 2, 2, 9])},
        {"indptr": np.array([0, 2**63 - 1, -(2**63), 3])},
        {"data": np.ones(3, np.complex64)},
        {"data": np.ones(2, np.float32)},
        {"shape": np.array(3)},
        {"shape": np.array([3, 4, 5])},
        {"shape": np.array([-3, 4])},
        {"shape": np.array([3.0, np.inf])},
        {"shape": np.array([3, 2**31])},
        {"format": np.array("csr")},
        {"format": np.array([1, 2])},
    ],
    ids=str,
)
def test_npz_files_that_contradict_themselves(changed, tmp_path):
    assert [row.columns for row in SparseMatrixFile(npz(tmp_path / "Y.npz"))] == [[0, 3], [], [2]]
    with pytest.raises(CorpusError, match=r"Y\.npz:1: (not a scipy sparse matrix|a matrix of)"):
        list(SparseMatrixFile(npz(tmp_path / "Y.npz", **changed)))


def test_npz_predictions_of_type_bool_or_beyond_63_bits_were_not_ranked(tmp_path):
    path = npz(tmp_path / "p.npz", data=np.array([True, True, False]))
    assert read_predictions(path, 2, num_queries=3, num_labels=4).tolist() == [
        [0, 3], [-1, -1], [2, -1],
    ]  # fmt: skip
    path = npz(tmp_path / "p.npz", data=np.array([1, 2**63 + 4096, 5], np.uint64))
    assert read_predictions(path, 2, num_queries=3, num_labels=4)[0].tolist() == [3, 0]


def test_a_gzip_file_without_a_byte_was_an_empty_table(tmp_path):
    write_renee(tmp_path, random_content(), gz=True)
    (tmp_path / "trn_filter_labels.txt.gz").write_bytes(b"")
    with pytest.raises(CorpusError, match=r"labels\.txt\.gz:1: the gzip file is damaged"):
        recognise(tmp_path).filter_pairs("train", 40, 23)


def test_a_damaged_page_of_a_parquet_file_ended_in_a_traceback(tmp_path):
    write_parquet(tmp_path, random_content(num_train=2000))
    path = tmp_path / "queries.parquet"
    data = bytearray(path.read_bytes())
    data[100:400] = bytes(300)
    path.write_bytes(data)
    with pytest.raises(CorpusError, match=r"queries\.parquet:\d+: "):
        read_queries(tmp_path)


def test_a_flipped_bit_in_a_parquet_footer_left_no_rows_without_a_word(tmp_path):
    """Arrow reads some of these files as 0 rows, or as more than they announce; no exception."""
    write_parquet(tmp_path, random_content())
    path = tmp_path / "queries.parquet"
    data = path.read_bytes()
    footer = int.from_bytes(data[-8:-4], "little")
    for at in range(len(data) - 8 - footer, len(data) - 8):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1 << at % 4]) + data[at + 1 :])
        try:
            assert len(read_queries(tmp_path)) == 40
        except CorpusError as error:
            assert re.search(r"queries\.parquet:\d+: ", str(error))  # noqa: PT017


def test_a_file_of_nothing_but_a_byte_order_mark_held_an_empty_label(tmp_path):
    write_renee(tmp_path, random_content())
    (tmp_path / "Y.txt").write_bytes(b"\xef\xbb\xbf")
    assert list(recognise(tmp_path).labels()) == []


def test_values_that_python_cannot_hold_ended_in_a_traceback(tmp_path):
    write_parquet(tmp_path, random_content())
    late = pa.array([2**62], pa.timestamp("ms"))
    table = pa.table({"id": late, "text": ["a"], "labels": [["1"]]})
    pa.parquet.write_table(table, tmp_path / "queries.parquet")
    with pytest.raises(CorpusError, match=r"queries\.parquet:1: "):
        read_queries(tmp_path)


def test_a_saved_dataset_could_read_files_outside_its_folder(tmp_path):
    write_dataset(tmp_path / "raw", random_content())
    state = tmp_path / "raw" / "queries" / "state.json"
    content = json.loads(state.read_text())
    (name,) = (part["filename"] for part in content["_data_files"])
    shutil.copy(tmp_path / "raw" / "queries" / name, tmp_path / "elsewhere.arrow")
    content["_data_files"] = [{"filename": "../../elsewhere.arrow"}]
    state.write_text(json.dumps(content))
    with pytest.raises(CorpusError, match=r"'\.\./\.\./elsewhere\.arrow', which is not in the fol"):
        read_queries(tmp_path / "raw")


def test_a_value_nested_deeply_could_not_be_named(tmp_path):
    value = []
    for _ in range(100_000):
        value = [value]
    assert shorten(value) == "a list"
    assert shorten(10**5000) == "a int"
    write_jsonl(tmp_path, random_content())
    deep = "[" * 900 + "]" * 900
    (tmp_path / "queries.jsonl").write_text('{"id": 1, "labels": [], "text": ' + deep + "}\n")
    with pytest.raises(CorpusError, match=r"queries\.jsonl:1: "):
        read_queries(tmp_path)


def test_a_file_that_cannot_be_opened_is_named(tmp_path):
    with pytest.raises(CorpusError, match=r"none\.txt:1: cannot be read"):
        list(read_lines(tmp_path / "none.txt"))


# ---------------------------------------------------------------------------- settings

BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{new}: &{new} [{','.join([f'*{old}'] * 9)}]\n"
    for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, r"line 2: the alias \*a; write the value out"),  # was written out: 9^9 values
        ("corpus: &a {path: *a}", r"the alias \*a"),
        ("a: &a {b: 1}\nc: {<<: *a}", r"the alias \*a"),
        ("a: " + "[" * 5000, "nested more than 16 deep"),
        ("train: {seed: " + "9" * 5000 + "}", "a value that cannot be read"),
        ("train: {seed: !!int x}", "a value that cannot be read"),
        ("train: {seed: !!timestamp 2001-99-99}", "a value that cannot be read|not plain data"),
        ("train: {seed: !!python/object:os.system x}", "could not determine a constructor"),
        ("#" + "x" * (1 << 18), "more than 262,144 bytes"),
    ],
)
def test_recipes_that_hung_or_ended_in_a_traceback(text, message, tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        load_recipe(str(path))


def test_an_override_that_ended_in_a_traceback(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(recipe_text(tmp_path))
    for value in ("!!int x", "[" * 5000, "9" * 5000):
        with pytest.raises(ConfigError, match="the value is not YAML"):
            load_recipe(str(path), [f"train.seed={value}"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "not a ds_config"),
        ('{"aio": ' + "[" * 50 + "]" * 50 + "}", "nested more than 16 deep"),
        ('{"gradient_clipping": ' + "9" * 5000 + "}", "not a ds_config"),
        ('{"zero_optimization": {"stage": 1, "offload_optimizer": "nvme"}}', "needs a section"),
        ('{"zero_optimization": {"stage": 1, "offload_optimizer": "cpu"}}', "needs a section"),
    ],
)
def test_ds_configs_that_ended_in_a_traceback(text, message, tmp_path):
    path = tmp_path / "d.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_ds_config(path, batch_size=4, world_size=1)


# ---------------------------------------------------------------------------- checkpoints


def digest(path):
    return sha256(path.read_bytes()).hexdigest()


def make_checkpoint(run, step=3):
    folder = run / "checkpoints" / f"step_{step:08d}"
    folder.mkdir(parents=True)
    files = {}
    for name in (ENCODER_FILE, rows_file(0, 1)):
        save_file({"rows": torch.ones(4, 2)}, folder / name)
        files[name] = {
            "bytes": (folder / name).stat().st_size,
            "sha256": digest(folder / name),
        }
    numbers = {"format_version": 1, "step": step, "world_size": 1, "num_labels": 4, "width": 2}
    (folder / "manifest.json").write_text(json.dumps({**numbers, "files": files}))
    return folder


@pytest.mark.parametrize("name", ["../../elsewhere", "/etc", "", ".", "step_x", "\0", "é" * 400])
def test_the_newest_checkpoint_could_lie_outside_its_run(name, tmp_path):
    folder = make_checkpoint(tmp_path / "run")
    shutil.copytree(folder, tmp_path / "elsewhere")
    (tmp_path / "run" / "checkpoints" / "step_9x9").mkdir()
    (tmp_path / "run" / "checkpoints" / "step_9x9" / "manifest.json").write_text("{}")
    (tmp_path / "run" / "checkpoints" / "latest").write_text(name)
    assert checkpoint.latest(tmp_path / "run") == folder


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("files", {"encoder.safetensors": 7}),
        ("files", {"encoder.safetensors": {"bytes": "7", "sha256": ""}}),
        ("files", []),
        ("files", {}),
        ("world_size", 10**18),
        ("world_size", 2),
        ("world_size", "1"),
        ("step", -1),
        ("num_labels", None),
        ("width", True),
        ("corpus_fingerprint", 7),
        ("total_steps", "9"),
    ],
)
def test_manifests_that_ended_in_a_traceback(key, value, tmp_path):
    folder = make_checkpoint(tmp_path)
    manifest = read_manifest(folder)
    (folder / "manifest.json").write_text(json.dumps({**manifest, key: value}))
    with pytest.raises(CheckpointError, match=r"manifest\.json is damaged"):
        read_manifest(folder)


def test_a_checkpoint_does_not_follow_links_out_of_its_folder(tmp_path):
    folder = make_checkpoint(tmp_path)
    path = folder / ENCODER_FILE
    path.rename(tmp_path / "secret")
    path.symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match="outside the checkpoint"):
        read_manifest(folder)


def test_a_file_that_is_no_safetensors_but_has_the_right_digest(tmp_path):
    folder = make_checkpoint(tmp_path)
    path, manifest = folder / ENCODER_FILE, read_manifest(folder)
    path.write_bytes(b"\xff" * manifest["files"][path.name]["bytes"])
    manifest["files"][path.name]["sha256"] = digest(path)
    with pytest.raises(CheckpointError, match="is no safetensors file"):
        load_tensors(folder, manifest, path.name)


@pytest.mark.parametrize("text", ["{", "[]", "\xff", "[" * 100_000])
def test_damaged_files_of_a_run_ended_in_a_traceback(text, tmp_path):
    (tmp_path / "evaluation.json").write_text(text, encoding="latin1")
    with pytest.raises(UserError, match=r"evaluation\.json"):
        read_json(tmp_path / "evaluation.json")


@pytest.mark.parametrize(
    "content", [b"", b"PK", b"\x93NUMPY", b"\x93NUMPY\x01\0\x04\0{'de", "float", "flat"]
)
def test_damaged_shortlists_ended_in_a_traceback(content, tmp_path):
    lists = np.zeros((3, 2), np.int32)
    seconds, texts = MiningSeconds(1.0, 1.0, 0.0), MiningTexts(3, 0)
    write_mined(tmp_path, 1, lists, None, seconds, texts, 1.0)
    assert open_mined(tmp_path, 1).recall == 1
    path = tmp_path / "epoch-0001" / "shortlists.npy"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.save(path, lists.astype(np.float32) if content == "float" else lists.ravel())
    with pytest.raises(CheckpointError, match="cannot open the shortlists"):
        open_mined(tmp_path, 1)


# ---------------------------------------------------------------------------- prepared corpora


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")
    encoder = save_tokenizer(folder / "encoder")
    write_xmc(folder / "raw", random_content())
    return prepare(
        folder / "raw", folder / "out", encoder=encoder, max_length=8, show_progress=False
    ).path


@pytest.fixture
def copy(prepared, tmp_path):
    return shutil.copytree(prepared, tmp_path / "corpus")


def change(folder, **changed):
    content = json.loads((folder / "corpus.json").read_text())
    (folder / "corpus.json").write_text(json.dumps({**content, **changed}))


@pytest.mark.parametrize(
    "changed",
    [
        {"files": []},
        {"files": {"train.positives.indptr.npy": "many"}},
        {"tables": {}},
        {"tables": {"labels": {"labels": 99}}},
        {"fingerprint": None},
        {"name": 7, "oddities": None},
        {"oddities": {}},
        {"token_lengths": {"labels": 3}},
        {"pad_token_id": "0"},
        {"pad_token_id": -1},
        {"put_aside": {"lines": "x"}},
        {"put_aside": []},
        {"layout": None, "max_length": None, "text": None, "tables": None},
    ],
    ids=str,
)
def test_corpus_manifests_that_ended_in_a_traceback(changed, copy):
    assert open_corpus(copy).num_labels == 23
    change(copy, **changed)
    with pytest.raises(CorpusError, match=r"corpus\.json:1: |needed many bytes"):
        open_corpus(copy)


@pytest.mark.parametrize("text", ["[]", "7", "[" * 100_000])
def test_corpus_manifests_that_are_no_objects(text, copy):
    (copy / "corpus.json").write_text(text)
    with pytest.raises(CorpusError, match=r"corpus\.json:1: "):
        open_corpus(copy)


def test_a_corpus_reads_nothing_outside_its_folder(copy, tmp_path):
    (tmp_path / "secret").write_bytes(b"x")
    change(copy, files={"../secret": 1})
    with pytest.raises(CorpusError, match=r"secret: a link to, or the name of, a file outside"):
        open_corpus(copy)


def test_a_corpus_follows_no_link_out_of_its_folder(copy, tmp_path):
    path = copy / "labels.has_text.npy"
    path.rename(tmp_path / "secret.npy")
    path.symlink_to(tmp_path / "secret.npy")
    with pytest.raises(CorpusError, match=r"has_text\.npy: a link to"):
        open_corpus(copy)


def test_arrays_of_the_right_size_and_the_wrong_content(copy):
    path = copy / "train.positives.indptr.npy"
    indptr = np.load(path)
    indptr[-1] += 1  # one pair more than there is
    np.save(path, indptr)
    with pytest.raises(CorpusError, match=r"corpus\.json:1: .* damaged"):
        open_corpus(copy)


def test_a_manifest_without_details_ended_in_a_traceback(tmp_path):
    inputs = make_inputs(tmp_path)
    run = save_run(inputs)
    path = checkpoint.latest(run) / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["corpus_fingerprint"], manifest["total_steps"]
    path.write_text(json.dumps(manifest))
    assert "step 1 of ?" in describe_run(run)
    with pytest.raises(UserError, match="corpus"):
        load_run(run, torch.device("cpu"))
