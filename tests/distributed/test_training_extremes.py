"""Training steps on a corpus at the edges, on a real engine."""

import json

import numpy as np
import pytest
from data.raw_corpora import write
from ranks import run_ranks
from tiny import make_inputs, write_recipe_file
from training import read_losses, train

pytestmark = [pytest.mark.slow, pytest.mark.kernel]

NUM_LABELS = 20_000


def test_one_query_has_every_label_one_label_every_query_and_one_text_a_million_letters(tmp_path):
    """Half of the labels have no text; one label's and one query's text is a million letters."""
    inputs = make_inputs(tmp_path)
    labels = ["red" if n % 2 else "" for n in range(NUM_LABELS)]
    labels[1] = "blue car " * 111_111
    texts = ["house " * 166_666, *["old tree"] * 39]
    rows = [range(NUM_LABELS), *([7, 100 + n] for n in range(39))]
    raw = inputs / "edges"
    write(raw / "Y.txt", labels, False)
    for split in ("trn", "tst"):
        write(raw / f"{split}_X.txt", texts, False)
        lines = (" ".join(f"{label}:1" for label in row) for row in rows)
        write(raw / f"{split}_X_Y.txt", [f"{len(texts)} {NUM_LABELS}", *lines], False)
    recipe = write_recipe_file(
        inputs, corpus={"path": str(raw)}, train={"epochs": 2}, pool={"num_positives": 3}
    )
    run = tmp_path / "run"
    (result,) = run_ranks(
        1, train, str(recipe), str(inputs / "ds_config.json"), str(run), [], None, None, join=False
    )
    losses = read_losses(run)
    assert len(losses) == result["step"] == 6  # 36 queries, 4 others for validation
    assert np.isfinite(list(losses.values())).all()
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(0 < step["pool_size"] <= 24 for step in steps if "loss" in step)
    scores = json.loads((run / "evaluation.json").read_text())["test"]["classifier"]
    assert 0 <= scores["P@1"] <= 100
