"""What a run leaves to read: JSON lines and TensorBoard agree, a resumed run has no duplicates."""

import json

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from unidec_ds.monitor import Monitor, StepTimer, host_memory_gib


def record(step):
    return {"step": step, "epoch": 0, "loss": 1.0 / (step + 1), "lr": 0.1, "time_s": {"loss": 0.5}}


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_json_lines_and_tensorboard_hold_the_same_scalars(tmp_path):
    monitor = Monitor(tmp_path, 0, 3)
    for step in range(3):
        monitor.log_step(record(step))
        monitor.advance(1.0, 100.0)
    monitor.log_evaluation(3, 0, "test", {"unified": {"P@1": 50.0}})
    monitor.log_text(3, "predictions", "some *text*")
    monitor.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    losses = [event.value for event in events.Scalars("loss/loss")]
    assert losses == pytest.approx([line["loss"] for line in lines(tmp_path)[:3]])
    assert events.Scalars("learning_rate/lr")[0].value == pytest.approx(0.1)
    assert events.Scalars("step_time/loss")[0].value == 0.5
    assert events.Scalars("test_unified/P@1")[0].value == 50.0
    assert lines(tmp_path)[3]["evaluation"] == {"unified": {"P@1": 50.0}}


def test_a_resumed_run_continues_without_gap_or_duplicate(tmp_path):
    monitor = Monitor(tmp_path, 0, 6)
    for step in range(5):
        monitor.log_step(record(step))
    monitor.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # killed while writing
    monitor = Monitor(tmp_path, 3, 6)
    for step in range(3, 6):
        monitor.log_step(record(step))
    monitor.close()
    assert [line["step"] for line in lines(tmp_path)] == list(range(6))
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in events.Scalars("loss/loss")] == list(range(6))


def test_a_run_killed_before_its_first_checkpoint_starts_over_cleanly(tmp_path):
    for _ in range(2):
        monitor = Monitor(tmp_path, 0, 3)
        for step in range(3):
            monitor.log_step(record(step))
        monitor.close()
    assert [line["step"] for line in lines(tmp_path)] == [0, 1, 2]
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in events.Scalars("loss/loss")] == [0, 1, 2]


def test_timer_adds_up_parts():
    timer = StepTimer(torch.device("cpu"), synchronize=True)
    for _ in range(2):
        with timer.part("a"):
            pass
    assert set(timer.seconds) == {"a"}
    assert timer.seconds["a"] >= 0
    assert 0.01 < host_memory_gib() < 100
