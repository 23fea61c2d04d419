"""What a run leaves to read: JSON lines and TensorBoard agree, a resumed run has no duplicates."""

import io
import json
import time

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from unidec_ds.metrics import FrequencyBin
from unidec_ds.monitor import Monitor, StepTimer, host_memory_gib


def record(step):
    return {"step": step, "epoch": 0, "loss": 1.0 / (step + 1), "lr": 0.1, "time_s": {"loss": 0.5}}


def resumed(folder, first_step, total_steps):
    """A monitor begun in a later second: TensorBoard reads event files by the second in their name,
    and those of one second and one process in no useful order (the 10th before the 9th)."""
    time.sleep(1.0 - time.time() % 1.0)
    return Monitor(folder, first_step, total_steps)


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


def test_label_vectors_are_written_once_a_step_with_clean_metadata(tmp_path, capsys):
    vectors = torch.tensor([[0.6, 0.8], [1.0, 0.0], [1 / 3, -1e-9]])
    rows = [("a\tb\nc", 3), ("plain", 0), ("line\u2028end\r", 7)]
    for _ in range(2):  # evaluated again after a kill
        monitor = Monitor(tmp_path, 0, 3)
        monitor.log_label_vectors(3, vectors, rows)
        monitor.close()
    folder = tmp_path / "00003" / "labels"
    found = [line.split("\t") for line in (folder / "tensors.tsv").read_text().splitlines()]
    torch.testing.assert_close(
        torch.tensor([[float(x) for x in row] for row in found]), vectors, atol=1e-4, rtol=0
    )
    assert (folder / "metadata.tsv").read_text() == (
        "label\ttrain_positives\na b c\t3\nplain\t0\nline end\t7\n"
    )
    assert (tmp_path / "projector_config.pbtxt").read_text().count("embeddings") == 1
    assert "warning" not in capsys.readouterr().out


def test_precision_by_label_frequency_is_drawn(tmp_path):
    scores = [{"P@1": 10.0, "P@5": 4.0}, {"P@1": 5.0, "P@5": 2.0}, {"P@1": 0.0, "P@5": 1.0}]
    bins = [
        FrequencyBin(name, 0, 9, 5, 8, values)
        for name, values in zip(("head", "torso", "tail"), scores, strict=True)
    ]
    monitor = Monitor(tmp_path, 0, 3)
    monitor.log_evaluation(3, 0, "validation", {"de": {"P@1": 15.0}}, {"de": bins})
    monitor.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    (image,) = events.Images("validation/precision_by_label_frequency")
    pixels = np.asarray(Image.open(io.BytesIO(image.encoded_image_string)).convert("RGB"))
    assert pixels.shape == (image.height, image.width, 3)
    # The parts of the bars are as wide as their scores: P@1 above, P@5 below.
    colours = ("#1f5fbf", "#c2540a", "#1a7f4e")
    rgb = np.array([[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in colours])
    widths = (pixels[:, :, None] == rgb).all(-1).sum(1)  # of each colour in each row
    bars = np.flatnonzero(widths[:, 0] > 50)
    above, below = widths[bars[0] + 2], widths[bars[-1] - 2]
    assert above / above[0] == pytest.approx([1, 5 / 10, 0], abs=0.03)
    assert below / below[0] == pytest.approx([1, 2 / 4, 1 / 4], abs=0.03)


def test_a_resumed_run_continues_without_gap_or_duplicate(tmp_path):
    monitor = Monitor(tmp_path, 0, 6)
    for step in range(5):
        monitor.log_step(record(step))
    monitor.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # killed while writing
    monitor = resumed(tmp_path, 3, 6)
    for step in range(3, 6):
        monitor.log_step(record(step))
    monitor.close()
    assert [line["step"] for line in lines(tmp_path)] == list(range(6))
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in events.Scalars("loss/loss")] == list(range(6))


def test_what_was_logged_between_two_steps_survives_a_resume_and_is_not_logged_twice(tmp_path):
    """Evaluated and mined after three steps, saved there, killed two steps later."""
    bins = [FrequencyBin(name, 0, 9, 5, 8, {"P@1": 5.0, "P@5": 1.0}) for name in ("head", "tail")]

    def between(monitor, score):
        monitor.log_scalars(3, "mining", {"share_of_epoch": 0.25, "total_s": score})
        metrics = {"de": {"P@1": score}}
        monitor.log_evaluation(3, 0, "validation", metrics, {"de": bins})

    monitor = Monitor(tmp_path, 0, 6)
    for step in range(3):
        monitor.log_step(record(step))
    assert not monitor.has_evaluation(3, 0, "validation")
    between(monitor, 10.0)
    monitor.flush()
    for step in (3, 4):
        monitor.log_step(record(step))
    monitor.close()
    monitor = resumed(tmp_path, 3, 6)
    assert monitor.has_evaluation(3, 0, "validation")
    assert not monitor.has_evaluation(3, 1, "validation")
    between(monitor, 11.0)
    for step in range(3, 6):
        monitor.log_step(record(step))
    monitor.close()
    assert [line["step"] for line in lines(tmp_path)] == [0, 1, 2, 3, 3, 3, 4, 5]
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in events.Scalars("loss/loss")] == list(range(6))
    for tag, value in (("validation_de/P@1", 10.0), ("mining/total_s", 10.0)):
        assert [(event.step, event.value) for event in events.Scalars(tag)] == [(3, value)]
    assert [e.step for e in events.Images("validation/precision_by_label_frequency")] == [3]


def test_a_run_killed_before_its_first_checkpoint_starts_over_cleanly(tmp_path):
    for _ in range(2):
        monitor = resumed(tmp_path, 0, 3)
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
