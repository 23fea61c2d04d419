"""What a run tells people: TensorBoard, `metrics.jsonl`, a progress bar, and step timers.

Only rank 0 writes. `metrics.jsonl` and TensorBoard hold the same scalars; the JSON names are the
contract other programs rely on, the TensorBoard tags group them.

A resumed run continues both without a gap or a duplicate. With s steps taken, the steps from s on
will run again: their lines are cut off, and TensorBoard is told to purge everything from s on. What
was logged at s before the kill but is not of a step (the evaluation or the mining between two
epochs) stays in the file and is drawn again for TensorBoard, and is not logged a second time.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from unidec_ds import comm
from unidec_ds.durable import write_text
from unidec_ds.metrics import FrequencyBin
from unidec_ds.report.charts import frequency_image

_GROUPS = {
    "loss": ("loss", "loss_de", "loss_classifier", "loss_de_q2l", "loss_de_l2q",
             "loss_classifier_q2l", "loss_classifier_l2q", "grad_norm"),
    "learning_rate": ("lr", "lr_head", "lr_row"),
    "pool": ("pool_size", "hard_negatives", "dropped_queries", "positives_per_query",
             "in_batch_positive_share"),
    "speed": ("texts_per_s", "tokens_per_s", "padding_share", "step_s"),
    "memory": ("host_memory_gib", "device_memory_gib"),
}  # fmt: skip
_TAGS = {name: f"{group}/{name}" for group, names in _GROUPS.items() for name in names}


class Monitor:
    """Writes a run's records; a no-op on every rank but 0.

    Args:
        folder: the run directory.
        first_step: the step the run starts or resumes at.
        total_steps: of the whole run.
    """

    def __init__(self, folder: Path, first_step: int, total_steps: int) -> None:
        self._writer: Any = None
        self._bar: Any = None
        self._kept: list[dict[str, Any]] = []  # records at `first_step` of before a resume
        if not comm.is_main():
            return
        from torch.utils.tensorboard import SummaryWriter

        self._folder = folder
        self._jsonl = folder / "metrics.jsonl"
        self._kept = _keep_steps_before(self._jsonl, first_step)
        self._writer = SummaryWriter(str(folder), purge_step=first_step)
        for record in self._kept:
            self._draw(record)
        self._bar = tqdm(
            total=total_steps, initial=first_step, desc="training", unit=" steps", smoothing=0.05
        )

    def log_step(self, record: dict[str, Any]) -> None:
        """Writes one training step's scalars; `record` has at least step, epoch and loss."""
        self._log(record)

    def log_evaluation(
        self,
        step: int,
        epoch: int,
        split: str,
        metrics: dict[str, dict[str, float]],
        breakdown: Mapping[str, Sequence[FrequencyBin]] | None = None,
    ) -> None:
        """Writes an evaluation's metrics, by view, and draws its parts by label frequency."""
        record = {"step": step, "epoch": epoch, "split": split, "evaluation": metrics}
        if breakdown:
            record["breakdown"] = {v: [asdict(part) for part in b] for v, b in breakdown.items()}
        self._log(record)

    def has_evaluation(self, step: int, epoch: int, split: str) -> bool:
        """Returns, on every rank alike, whether an evaluation was logged before a resume."""
        wanted = (step, epoch, split)
        return comm.broadcast_object(
            any((r["step"], r.get("epoch"), r.get("split")) == wanted for r in self._kept)
        )

    def log_scalars(self, step: int, group: str, values: dict[str, float]) -> None:
        """Writes other scalars, such as what a mining refresh took. `group` is one word."""
        self._log({"step": step, **{f"{group}_{name}": v for name, v in values.items()}})

    def log_text(self, step: int, tag: str, text: str) -> None:
        """Writes Markdown, for TensorBoard's text page."""
        if self._writer is not None:
            self._writer.add_text(tag, text, step)
            self._writer.flush()

    def log_label_vectors(
        self, step: int, vectors_nD: torch.Tensor, rows: list[tuple[str, int]]
    ) -> None:
        """Writes label vectors for TensorBoard's projector, again if the step has some already.

        Args:
            step: the training step.
            vectors_nD: one vector per label; kept to four decimals.
            rows: text and train positives of each label.
        """
        if self._writer is None or not rows:
            return
        shutil.rmtree(self._folder / f"{step:05d}" / "labels", ignore_errors=True)
        self._writer.add_embedding(
            vectors_nD.double().round(decimals=4),
            metadata=[[" ".join(text.split()), count] for text, count in rows],
            metadata_header=["label", "train_positives"],
            tag="labels",
            global_step=step,
        )

    def advance(self, loss: float, texts_per_s: float) -> None:
        """Moves the progress bar by one step."""
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {loss:.4f}, {texts_per_s:,.0f} texts/s", refresh=False)
            self._bar.update()

    def say(self, message: str) -> None:
        """Prints a line above the progress bar."""
        if self._bar is not None:
            self._bar.write(message)

    def flush(self) -> None:
        """Makes what was logged durable; before a checkpoint, after which no step runs again."""
        if self._writer is not None:
            self._writer.flush()
            with self._jsonl.open("a") as file:
                os.fsync(file.fileno())

    def close(self) -> None:
        """Ends the bar and flushes the files."""
        writer, self._writer = self._writer, None
        if writer is not None:
            self._bar.close()
            writer.close()

    def _log(self, record: dict[str, Any]) -> None:
        if self._writer is None or any(_is_same(record, kept) for kept in self._kept):
            return
        with self._jsonl.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        self._draw(record)

    def _draw(self, record: dict[str, Any]) -> None:
        """Gives TensorBoard what a record says."""
        step = record["step"]
        if "loss" in record:
            scalars = {_TAGS[name]: value for name, value in record.items() if name in _TAGS}
            scalars.update({f"step_time/{k}": v for k, v in record.get("time_s", {}).items()})
        elif "evaluation" in record:
            scalars = {
                f"{record['split']}_{view}/{name}": value
                for view, metrics in record["evaluation"].items()
                for name, value in metrics.items()
            }
        else:
            scalars = {name.replace("_", "/", 1): v for name, v in record.items() if name != "step"}
        for tag, value in scalars.items():
            self._writer.add_scalar(tag, value, step)
        if "breakdown" in record:
            bins = {v: [FrequencyBin(**b) for b in c] for v, c in record["breakdown"].items()}
            image = frequency_image(bins, title=f"{record['split']}, step {step:,}")
            tag = f"{record['split']}/precision_by_label_frequency"
            self._writer.add_image(tag, image, step, dataformats="HWC")
        if "evaluation" in record:
            self._writer.flush()


class StepTimer:
    """Adds up where a step's time goes.

    On an accelerator work is asynchronous: pass `synchronize` to charge each part its own time, at
    the price of waiting for the device between parts.
    """

    def __init__(self, device: torch.device, synchronize: bool) -> None:
        self._device = device
        self._synchronize = synchronize and device.type != "cpu"
        self.seconds: dict[str, float] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Charges the time inside to `name`."""
        start = time.perf_counter()
        yield
        if self._synchronize:
            torch.accelerator.synchronize(self._device)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def host_memory_gib() -> float:
    """Returns this process's resident memory in GiB."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**30
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def device_memory_gib(device: torch.device) -> float:
    """Returns the most accelerator memory this process has held, in GiB; 0 on a CPU."""
    return torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else 0.0


def _is_same(record: dict[str, Any], kept: dict[str, Any]) -> bool:
    """Returns whether a record says anew what was said before a resume."""
    about = ("step", "epoch", "split")
    return record.keys() == kept.keys() and all(record.get(k) == kept.get(k) for k in about)


def _keep_steps_before(path: Path, first_step: int) -> list[dict[str, Any]]:
    """Drops the records of steps that will run again, and a last line cut short by a kill.

    Returns:
        The records left that were logged at `first_step`, between two steps. A run that starts
        over keeps none.
    """
    kept: list[dict[str, Any]] = []
    if not path.exists():
        return kept
    for line in path.read_text(encoding="utf-8").splitlines() if first_step else []:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            break
        if record["step"] < first_step or (record["step"] == first_step and "loss" not in record):
            kept.append(record)
    write_text(path, "".join(json.dumps(record) + "\n" for record in kept))
    return [record for record in kept if record["step"] == first_step]
