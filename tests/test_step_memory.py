"""What a training step holds at most grows with (B + P)·D, never with B·P.

Memory is counted where it is allocated, while the trainer takes real steps: torch's allocator
reports every block to its profiler, NumPy every array to tracemalloc. Beside those a step allocates
nothing that grows. The loss of one head is a log-sum-exp, of the other a cross-entropy, so that
both ways of walking over blocks of logits are in it.
"""

from __future__ import annotations

import gc
import itertools
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from ranks import run_ranks
from tiny import DS_CONFIG, make_inputs, make_raw_corpus, write_recipe_file
from torch.profiler import ProfilerActivity, profile
from training import make_trainer

pytestmark = [pytest.mark.slow, pytest.mark.kernel]

WIDTH, FLOAT_BYTES, BLOCK_BYTES = 16, 4, 1 << 20
BATCH_SIZES = (512, 1024, 2048)
EVERY_POSITIVE = {"size": 0, "num_positives": 0, "num_hard_negatives": 0}
MOST_VECTORS = 16
"""Vectors of width 16 that a step may hold for each query and each label: its embeddings, rows,
moments and their gradients, and its text, ids and positives in the batch."""

CHUNKED = {"encoder_chunk": 64, "recompute": True, "loss_block_bytes": BLOCK_BYTES}
CASES: dict[str, dict[str, Any]] = {
    **{f"batch_{size}": {"batch_size": size, **CHUNKED} for size in BATCH_SIZES},
    "one_block": {"batch_size": BATCH_SIZES[-1], **CHUNKED, "loss_block_bytes": 1 << 28},
    "whole": {"batch_size": BATCH_SIZES[0], "encoder_chunk": 0, "loss_block_bytes": 1 << 28},
}


class Measured(NamedTuple):
    """One case: its second step's sizes and memory, its first step's loss and gradients."""

    num_queries: int
    num_labels: int
    batch_bytes: int
    step_bytes: int
    loss: float
    first_moments: dict[str, torch.Tensor]

    @property
    def side_bytes(self) -> int:
        """Of one vector for each query and each label."""
        return (self.num_queries + self.num_labels) * WIDTH * FLOAT_BYTES

    @property
    def square_bytes(self) -> int:
        """Of one number for each pair of a query and a label."""
        return self.num_queries * self.num_labels * FLOAT_BYTES


def measure_cases(folder: str) -> dict[str, Measured]:
    """Takes two steps of each case and measures the second: the first makes lasting buffers."""
    from unidec_ds.monitor import StepTimer

    measured, inputs = {}, Path(folder)
    for name in CASES:
        trainer = make_trainer(inputs / f"{name}.yaml", inputs / "ds_config.json", inputs / name)
        timer = StepTimer(trainer.device, synchronize=False)
        loss = trainer.train_step(trainer.make_batch(0), timer).losses["loss"]
        trainer.step = 1
        state, rows = trainer.engine.state(), trainer.table.state()
        moments = {key: value for key, value in state.items() if key.endswith("exp_avg")}
        moments["rows"] = rows["exp_avg"].clone()
        del state, rows
        gc.collect()
        tracemalloc.start()
        batch = trainer.make_batch(1)
        batch_bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        step_bytes = most_allocated_bytes(
            lambda trainer=trainer, batch=batch, timer=timer: trainer.train_step(batch, timer),
            inputs / f"{name}.trace.json",
        )
        sizes = len(batch.plan.query_ids), len(batch.plan.label_ids)
        measured[name] = Measured(*sizes, batch_bytes, step_bytes, loss, moments)
        trainer.monitor.close()
    trainer.engine.close()
    return measured


def most_allocated_bytes(work: Callable[[], Any], trace_file: Path) -> int:
    """Returns the most bytes of torch's that were allocated at once, from where `work` began."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    profiler.export_chrome_trace(str(trace_file))
    events = json.loads(trace_file.read_text())["traceEvents"]
    changes = [(e["ts"], e["args"]["Bytes"]) for e in events if e["name"] == "[memory]"]
    most_bytes = live_bytes = 0
    for _, change in sorted(changes, key=lambda event: event[0]):
        live_bytes += change
        most_bytes = max(most_bytes, live_bytes)
    return most_bytes


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = make_inputs(tmp_path_factory.mktemp("inputs"))
    # DeepSpeed's buffer of gradients on their way takes 2 GB in the backward pass if not told
    # otherwise, and would hide all else.
    zero = {**DS_CONFIG["zero_optimization"], "reduce_bucket_size": 100_000}
    (folder / "ds_config.json").write_text(json.dumps({"zero_optimization": zero}))
    make_raw_corpus(folder / "large", num_train=2100, num_labels=8000)
    for name, train in CASES.items():
        write_recipe_file(
            folder,
            f"{name}.yaml",
            corpus={"path": str(folder / "large"), "validation_fraction": 0.0},
            pool=EVERY_POSITIVE,
            objective={"de": "softmax", "classifier": "bce"},
            train=train,
        )
    (result,) = run_ranks(1, measure_cases, str(folder), join=False)
    return result


def grown(less: Measured, more: Measured) -> tuple[int, int, int]:
    """Returns by how much memory, the bound on it, and one byte for each pair have grown."""
    memory = more.batch_bytes + more.step_bytes - less.batch_bytes - less.step_bytes
    bound = MOST_VECTORS * (more.side_bytes - less.side_bytes)
    return memory, bound, (more.square_bytes - less.square_bytes) // FLOAT_BYTES


def test_memory_grows_with_queries_and_labels_and_not_with_their_pairs(measured):
    for less, more in itertools.pairwise(measured[f"batch_{size}"] for size in BATCH_SIZES):
        assert less.square_bytes > 2 * BLOCK_BYTES  # as many blocks of logits are alive in both
        memory, bound, pairs_bytes = grown(less, more)
        assert 0 < memory <= bound
        assert memory + pairs_bytes > bound  # a byte a pair, such as a mask, would be noticed


def test_the_count_sees_logits_where_they_exist_as_a_whole(measured):
    small, large = (measured[f"batch_{size}"] for size in (BATCH_SIZES[0], BATCH_SIZES[-1]))
    one_block = measured["one_block"]
    assert one_block.step_bytes - large.step_bytes > 2 * large.square_bytes
    memory, bound, _ = grown(small, one_block)
    assert memory > 10 * bound
    assert measured["whole"].step_bytes > 4 * small.step_bytes  # the encoder's activations


def test_chunks_and_blocks_change_neither_the_loss_nor_a_gradient(measured):
    """The first moments of the first step are its gradients, times a constant."""
    ours, whole = measured[f"batch_{BATCH_SIZES[0]}"], measured["whole"]
    assert ours.loss == pytest.approx(whole.loss, rel=1e-6)
    assert ours.first_moments.keys() == whole.first_moments.keys()
    for name, expected in whole.first_moments.items():
        if "key.bias" in name:  # zero but for rounding
            continue
        largest = float(expected.abs().max())
        assert largest > 0, name
        torch.testing.assert_close(
            ours.first_moments[name], expected, rtol=1e-4, atol=1e-5 * largest
        )
