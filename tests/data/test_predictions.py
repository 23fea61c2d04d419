import gzip

import numpy as np
import pytest
import scipy.sparse as sp

from unidec_ds.data.pairs import Pairs
from unidec_ds.data.predictions import read_positives, read_predictions, score_files
from unidec_ds.errors import UserError
from unidec_ds.metrics import inverse_propensity

TRUTH = "3 4\n0:1 3:1\n\n2:1 1:0\n"
PREDICTIONS = "3 4\n3:0.9 1:0.5 0:0.1\n0:1 1:1 2:0\n2:0.25 1:7.5e-1\n"
TRAIN = "5 4\n0:1\n1:1 2:1\n1:1\n1:1 3:1\n3:1\n"


def write(folder, **texts):
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text)
    return {name: folder / f"{name}.txt" for name in texts}


def read(path, k=3, **options):
    return read_predictions(path, k, num_queries=3, num_labels=4, **options)


def test_predictions_are_ranked_by_score_then_id_in_text_gzip_and_npz(tmp_path):
    path = write(tmp_path, p=PREDICTIONS)["p"]
    packed = tmp_path / "p.txt.gz"
    packed.write_bytes(gzip.compress(PREDICTIONS.encode()))
    rows, columns = [0, 0, 0, 1, 1, 1, 2, 2], [0, 1, 3, 2, 1, 0, 2, 1]
    scores = [0.1, 0.5, 0.9, 0.0, 1.0, 1.0, 0.25, 0.75]
    matrix = sp.csr_matrix((np.array(scores, np.float32), (rows, columns)), shape=(3, 4))
    sp.save_npz(tmp_path / "p.npz", matrix)
    for source in (path, packed, tmp_path / "p.npz"):
        assert read(source).tolist() == [[3, 1, 0], [0, 1, 2], [1, 2, -1]]
        assert read(source, 1).tolist() == [[3], [0], [1]]


def test_filter_pairs_are_removed_before_the_best_are_taken(tmp_path):
    path = write(tmp_path, p=PREDICTIONS)["p"]
    exclude = Pairs.from_pairs([0, 0, 1, 2], [3, 2, 0, 1], 3, 4)
    assert read(path, 2, exclude=exclude).tolist() == [[1, 0], [1, 2], [2, -1]]


def test_an_explicit_zero_is_no_positive(tmp_path):
    truth = read_positives(write(tmp_path, t=TRUTH)["t"])
    assert [truth.row(i).tolist() for i in range(3)] == [[0, 3], [], [2]]


def test_score_files(tmp_path):
    files = write(tmp_path, truth=TRUTH, predictions=PREDICTIONS, train=TRAIN, filter="2 1\n")
    filter_pairs = files.pop("filter")
    scores = score_files(**files, propensity=(0.55, 1.5), ks=(1, 3))
    assert scores["P@1"] == pytest.approx(100 / 3)
    assert scores["P@3"] == pytest.approx(100 / 3)
    assert (scores["propensity_a"], scores["propensity_b"]) == (0.55, 1.5)
    assert (scores["num_train_queries"], scores["num_queries"], scores["num_labels"]) == (5, 3, 4)
    filtered = score_files(**files, filter_pairs=filter_pairs, propensity=(0.55, 1.5), ks=(1, 3))
    assert filtered["P@1"] == pytest.approx(200 / 3)
    weight = inverse_propensity(read_positives(files["train"]), 0.55, 1.5)
    # Found 3 (seen twice in train) and 2; the best first places are 0 (seen once) and 2.
    assert filtered["PSP@1"] == pytest.approx(
        100 * (weight[3] + weight[2]) / (weight[0] + weight[2])
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("3 4\n3:0.9\n0:nan 1:2\n\n", r"p\.txt:3: label 0 has the value NaN"),
        ("3 4\n3:0.9\n0:1\n4:1\n", r"p\.txt:4: .* 4 is out of range"),
        ("3 4\n3:0.9\n0:1\n-1:1\n", r"p\.txt:4: .* -1 is out of range"),
        ("3 4\n3:0.9\n0:1 2:1 0:3\n\n", r"p\.txt:3: label 0 is predicted more than once"),
        ("3 4\n3:0.9\n0 1\n\n", r"p\.txt:3: "),
        ("3 4\n3:0.9\n0:1\n", r"p\.txt:1: .*announces 3 rows"),
        ("2 4\n3:0.9\n0:1\n", r"p\.txt:1: 2 rows and 4 columns, but the truth has 3 queries"),
        ("3 5\n\n\n\n", r"p\.txt:1: 3 rows and 5 columns"),
        ("", r"p\.txt:1: "),
    ],
)
def test_bad_predictions_are_refused_with_file_and_line(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        read(write(tmp_path, p=text)["p"])


def test_infinite_scores_are_numbers(tmp_path):
    path = write(tmp_path, p="3 4\n0:-inf 1:inf 2:0\n\n\n")["p"]
    assert read(path).tolist()[0] == [1, 2, 0]


def test_nan_in_npz_names_the_row(tmp_path):
    matrix = sp.csr_matrix((np.array([np.nan]), ([1], [2])), shape=(3, 4))
    sp.save_npz(tmp_path / "p.npz", matrix)
    with pytest.raises(UserError, match=r"p\.npz:2: label 2 has the value NaN"):
        read(tmp_path / "p.npz")


def test_bad_requests_are_refused(tmp_path):
    files = write(tmp_path, truth=TRUTH, predictions=PREDICTIONS, train=TRAIN, filter="9 1\n")
    filter_pairs = files.pop("filter")
    with pytest.raises(UserError, match=r"filter\.txt:1: "):
        score_files(**files, filter_pairs=filter_pairs, propensity=(0.55, 1.5))
    with pytest.raises(UserError, match=r"propensity 0\.55,0: "):
        score_files(**files, propensity=(0.55, 0))
    with pytest.raises(UserError, match=r"none\.txt: no such file"):
        score_files(**files | {"truth": tmp_path / "none.txt"}, propensity=(0.55, 1.5))
    other = write(tmp_path, other="1 9\n0:1\n")["other"]
    with pytest.raises(UserError, match=r"other\.txt: 9 labels, but .*truth\.txt has 4"):
        score_files(**files | {"train": other}, propensity=(0.55, 1.5))
    empty = write(tmp_path, empty="0 4\n")["empty"]
    with pytest.raises(UserError, match=r"empty\.txt: no rows"):
        score_files(**files | {"train": empty}, propensity=(0.55, 1.5))
