"""Refuses a run that will not fit, with what would; before anything is allocated.

`classifier.capacity` says it of the table, whose bytes are exact; here it is said of the whole run
(`memory`) and of its disk (`disk`). Predicted memory is good to a tolerance: a run is refused when
even that much less would not fit, and warned about when it may not.

What would fit is found by trying: each alternative is predicted in turn, then all at once.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from unidec_ds import comm
from unidec_ds.assembly import model_shapes, table_placement
from unidec_ds.classifier.capacity import check_fits, host_free_bytes
from unidec_ds.classifier.row_formats import formats_of
from unidec_ds.config import Recipe
from unidec_ds.data.corpus import Corpus
from unidec_ds.ds_config import DsConfig
from unidec_ds.engine import launched_rank, launched_world_size
from unidec_ds.errors import UserError
from unidec_ds.monitor import host_memory_gib
from unidec_ds.preflight.disk import folder_bytes
from unidec_ds.preflight.memory import CUDA_CONTEXT_BYTES, greediest_stage, peak_bytes
from unidec_ds.preflight.prediction import Prediction, WorkloadOf, predict
from unidec_ds.preflight.tracing import UntraceableError
from unidec_ds.preflight.wording import PLACES, STAGES, in_words
from unidec_ds.preflight.workload import Workload, corpus_workload

logger = logging.getLogger(__name__)

TOLERANCES = {"host": 0.1, "device": 0.3, "disk": 0.0}
"""By how much a prediction may be off. Host memory was compared with real runs
(`scripts/bench/results/preflight.md`), an accelerator's was not."""

_SMALLEST_CHUNK = 16
_SMALL_LOSS_BLOCK = 32 << 20
_MAX_WORLD_SIZE = 256


@dataclass(frozen=True)
class Room:
    """What a machine has for the ranks on it; None where that is not known."""

    host_bytes: int | None
    """Free memory and what this process holds already, for all ranks of the machine together."""
    device_bytes: int | None
    """Of one accelerator, for a process that has yet to begin with it."""
    run_disk_bytes: int | None
    """On the disk of the run directory, what an earlier part of the run takes there included."""
    ranks: int = 1
    """Ranks that share the machine."""


@dataclass(frozen=True)
class Need:
    """What a run needs of one place, and what is there."""

    place: Literal["host", "device", "disk"]
    needed_bytes: int
    there_bytes: int | None
    """None where that is not known."""

    @property
    def fits(self) -> bool:
        """Whether it fits even if the prediction is too low by its tolerance."""
        most_bytes = self.needed_bytes * (1 + TOLERANCES[self.place])
        return self.there_bytes is None or most_bytes <= self.there_bytes

    @property
    def cannot_fit(self) -> bool:
        """Whether it does not fit even if the prediction is too high by its tolerance."""
        least_bytes = self.needed_bytes * (1 - TOLERANCES[self.place])
        return self.there_bytes is not None and least_bytes > self.there_bytes


def room_here(run: Path, ranks: int, num_running: int) -> Room:
    """Returns what this machine has now for a run's ranks.

    Args:
        run: the run directory, which need not be there yet.
        ranks: on this machine.
        num_running: how many processes like this one are there now; what they hold is there for
            the ranks, which they become or make room for.
    """
    held_bytes = int(host_memory_gib() * 2**30)
    device = None
    if torch.cuda.is_available():
        # Asking makes this process's context, which is not free then but part of the prediction.
        device = int(torch.cuda.mem_get_info(_own_device())[0]) + CUDA_CONTEXT_BYTES
    folder = run.absolute()
    while not folder.is_dir():
        folder = folder.parent
    disk = os.statvfs(folder)
    return Room(
        host_bytes=host_free_bytes() + num_running * held_bytes,
        device_bytes=device,
        run_disk_bytes=disk.f_bavail * disk.f_frsize + folder_bytes(run),
        ranks=ranks,
    )


def needs(prediction: Prediction, room: Room) -> list[Need]:
    """Returns what the run needs of each place."""
    host = room.ranks * peak_bytes(prediction.memory, "host", with_reclaimable=False)
    found = [Need("host", host, room.host_bytes)]
    if prediction.device_type != "cpu":
        device = peak_bytes(prediction.memory, "device", with_reclaimable=False)
        found.append(Need("device", device, room.device_bytes))
    disk = sum(part.num_bytes for part in prediction.disk if part.where == "run")
    found.append(Need("disk", disk, room.run_disk_bytes))
    return found


def check_run_fits(recipe: Recipe, ds_config: DsConfig, corpus: Corpus, run: Path) -> None:
    """Refuses a run that this machine has no room for; every rank must call, before allocating.

    Ranks meet when the process group forms, so none has taken anything while another still asks.

    Raises:
        UserError: bytes needed, bytes there, and settings that would fit.
    """
    world_size, ranks = launched_world_size(), comm.local_world_size()
    device = _own_device() if torch.cuda.is_available() else torch.device("cpu")

    def workload_of(recipe: Recipe, world_size: int) -> Workload:
        return corpus_workload(corpus, recipe, world_size)

    check_fits(
        corpus.num_labels,
        model_shapes(recipe)["classifier_head.weight"][0],
        world_size,
        recipe.classifier.format,
        recipe.classifier.bias_correction,
        table_placement(ds_config),
        device,
        ranks,
        recipe.classifier.optimizer,
    )
    try:
        prediction = predict(
            recipe, ds_config, workload_of, world_size=world_size, device_type=device.type
        )
    except UntraceableError as error:
        if launched_rank() == 0:
            logger.warning("%s. Only the classifier table was checked to fit.", error)
        return
    room = room_here(run, ranks, num_running=ranks)
    for need in needs(prediction, room):
        if need.cannot_fit:
            raise UserError(describe_shortfall(prediction, need, room, run, workload_of))
        if not need.fits and launched_rank() == 0:
            logger.warning(
                "this run may not fit: %s of %s is predicted, and %s there",
                in_words(need.needed_bytes), _place_name(need.place, run),
                in_words(need.there_bytes or 0),
            )  # fmt: skip


def describe_shortfall(
    prediction: Prediction, need: Need, room: Room, run: Path, workload_of: WorkloadOf
) -> str:
    """Returns what is needed, what for, what is there, and what would fit.

    Args:
        prediction: of a run that does not fit.
        need: what does not.
        room: what there is.
        run: the run directory.
        workload_of: makes the workload of an alternative.
    """
    if need.place == "disk":
        parts = [(p.name, p.num_bytes) for p in prediction.disk if p.where == "run"]
        when, who = "at its fullest", "it"
    else:
        stage = greediest_stage(prediction.memory, need.place)
        parts = [
            (p.name, p.num_bytes)
            for p in prediction.memory
            if p.place == need.place and p.stage in ("always", stage) and not p.reclaimable
        ]
        when = STAGES[stage]
        who = f"{room.ranks} ranks" if room.ranks > 1 and need.place == "host" else "one rank"
    largest = sorted(parts, key=lambda part: -part[1])[:4]
    listed = "; ".join(f"{name} {in_words(size)}" for name, size in largest)
    fitting = fitting_alternatives(prediction, room, workload_of)
    advice = (
        f"What would fit: {'; or '.join(fitting)}."
        if fitting
        else "No single setting helps, nor all of them together: use a larger machine."
    )
    return (
        f"this run does not fit into {_place_name(need.place, run)}: {when} {who} will need "
        f"{in_words(need.needed_bytes)} ({need.needed_bytes:,} bytes), and "
        f"{in_words(need.there_bytes or 0)} ({need.there_bytes:,} bytes) are there. "
        f"Largest parts: {listed}. {advice}"
    )


def fitting_alternatives(prediction: Prediction, room: Room, workload_of: WorkloadOf) -> list[str]:
    """Returns settings, in words, with which the run would fit.

    Each on its own; where none is enough, all of them together that make nothing worse.
    """
    recipe, ds_config = prediction.recipe, prediction.ds_config
    world_size = prediction.workload.world_size

    def needs_with(recipe: Recipe, ds_config: DsConfig, ranks: int) -> list[Need]:
        now = prediction.recipe.train.encoder_chunk, world_size
        is_same_work = (recipe.train.encoder_chunk, ranks) == now
        made = predict(
            recipe,
            ds_config,
            (lambda *_: prediction.workload) if is_same_work else workload_of,
            world_size=ranks,
            device_type=prediction.device_type,
            cost=prediction.cost,  # no alternative changes the model
        )
        return needs(made, room)

    before = needs(prediction, room)
    fitting: list[str] = []
    together: dict[str, str] = {}  # of each key the last and smallest
    for text, changed, other_ds_config, ranks in _alternatives(prediction, room):
        found = needs_with(changed, other_ds_config, ranks)
        if all(need.fits for need in found):
            fitting.append(text)
        elif ranks == world_size and not _is_worse(found, before):
            recipe = _merge(recipe, prediction.recipe, changed)
            if other_ds_config is not prediction.ds_config:
                ds_config = other_ds_config
            together[text.split(":")[0]] = text
    if fitting or not together:
        return fitting
    found = needs_with(recipe, ds_config, world_size)
    return [" together with ".join(together.values())] if all(n.fits for n in found) else []


def _is_worse(found: list[Need], before: list[Need]) -> bool:
    """Returns whether a place is asked for more than before."""
    pairs = zip(found, before, strict=True)
    return any(after.needed_bytes > now.needed_bytes for after, now in pairs)


def _alternatives(
    prediction: Prediction, room: Room
) -> Iterator[tuple[str, Recipe, DsConfig, int]]:
    """Yields (words, recipe, ds_config, world size) that take less of something."""
    recipe, ds_config = prediction.recipe, prediction.ds_config
    world_size = prediction.workload.world_size
    here = (ds_config, world_size)
    now = recipe.classifier.bytes_per_label(prediction.cost.width)
    for name in formats_of(recipe.classifier.optimizer):
        other = _set(recipe, "classifier", format=name)
        if other.classifier.bytes_per_label(prediction.cost.width) < now:
            yield f"classifier.format: {name}", other, *here
    if recipe.objective.classifier == "bce" and not (
        recipe.classifier.streamed or recipe.model.row_dropout
    ):
        yield "classifier.streamed: true", _set(recipe, "classifier", streamed=True), *here
    kind = table_placement(ds_config).kind
    for device in ("cpu", "nvme", "none") if ds_config.zero_stage else ():
        unlike = device != {"device": "none"}.get(kind, kind)
        if unlike and (device != "none" or prediction.device_type != "cpu"):
            text = f"offload_optimizer.device: {device} in the ds_config"
            yield text, recipe, _placed(ds_config, device), world_size
    texts = max(sum(n for n, _ in step.chunks) for step in prediction.workload.steps)
    if recipe.train.encoder_chunk and not recipe.train.recompute:
        yield "train.recompute: true", _set(recipe, "train", recompute=True), *here
    chunk = (recipe.train.encoder_chunk or texts) // 2
    while chunk >= _SMALLEST_CHUNK:
        smaller = _set(recipe, "train", encoder_chunk=chunk, recompute=True)
        text = f"train.encoder_chunk: {chunk}" + (
            "" if recipe.train.recompute else " with recompute"
        )
        yield text, smaller, *here
        chunk //= 4
    if recipe.train.loss_block_bytes > _SMALL_LOSS_BLOCK:
        smaller = _set(recipe, "train", loss_block_bytes=_SMALL_LOSS_BLOCK)
        yield f"train.loss_block_bytes: {_SMALL_LOSS_BLOCK}", smaller, *here
    if not 0 < recipe.evaluation.max_queries <= 10_000:
        fewer = _set(recipe, "evaluation", max_queries=10_000)
        yield "evaluation.max_queries: 10000", fewer, *here
    if recipe.checkpoint.every_steps and recipe.checkpoint.keep > 1:
        yield "checkpoint.keep: 1", _set(recipe, "checkpoint", keep=1), *here
    if recipe.checkpoint.every_steps:
        text = "checkpoint.every_steps: 0 (one at the end)"
        yield text, _set(recipe, "checkpoint", every_steps=0), *here
    more = world_size * 2
    while more <= min(_MAX_WORLD_SIZE, recipe.train.batch_size):
        yield f"a world size of {more}, {room.ranks} a machine", recipe, ds_config, more
        more *= 4


def _set(recipe: Recipe, section: str, **values: object) -> Recipe:
    changed = getattr(recipe, section).model_copy(update=values)
    return recipe.model_copy(update={section: changed})


def _merge(into: Recipe, base: Recipe, changed: Recipe) -> Recipe:
    """Returns `into` with what `changed` has other than `base`."""
    for section in Recipe.model_fields:
        before, after = getattr(base, section), getattr(changed, section)
        target = getattr(into, section)
        new = {
            key: getattr(after, key)
            for key in type(after).model_fields
            if getattr(after, key) != getattr(before, key)
        }
        if new:
            into = into.model_copy(update={section: target.model_copy(update=new)})
    return into


def _placed(ds_config: DsConfig, device: str) -> DsConfig:
    content = json.loads(json.dumps(ds_config.content))
    content["zero_optimization"]["offload_optimizer"] = {"device": device}
    return replace(ds_config, content=content)


def _place_name(place: Literal["host", "device", "disk"], run: Path) -> str:
    return f"the disk of {run}" if place == "disk" else PLACES[place]


def _own_device() -> torch.device:
    """Returns the accelerator that this process will use."""
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
