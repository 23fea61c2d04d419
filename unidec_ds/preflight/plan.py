"""The page that `unidec-ds plan` prints, and the JSON beside it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import mean
from typing import Any

from unidec_ds.preflight.fits import Need, Room, fitting_alternatives, needs
from unidec_ds.preflight.measure import Measured
from unidec_ds.preflight.memory import BASE_NAME, Part, greediest_stage, peak_bytes
from unidec_ds.preflight.prediction import Prediction, WorkloadOf
from unidec_ds.preflight.wording import PLACES, STAGES, in_words
from unidec_ds.preflight.work import (
    StepFlops,
    Traffic,
    evaluation_flops,
    mining_flops,
    step_flops,
    step_traffic,
)


@dataclass(frozen=True)
class Plan:
    """A prediction, whether it fits, and what was measured."""

    prediction: Prediction
    room: Room
    needs: list[Need]
    alternatives: list[str]
    """Settings that would fit, if it does not."""
    measured: Measured | None
    no_time_because: str
    """Why nothing was measured."""


def make_plan(
    prediction: Prediction,
    room: Room,
    workload_of: WorkloadOf,
    measured: Measured | None,
    no_time_because: str,
) -> Plan:
    """Returns the plan; what was measured of the base memory replaces what is known of it."""
    if measured is not None:
        memory = [
            replace(part, num_bytes=measured.base_bytes, origin="measured")
            if part.name == BASE_NAME
            else part
            for part in prediction.memory
        ]
        prediction = replace(prediction, memory=memory)
    found = needs(prediction, room)
    alternatives = []
    if not all(need.fits for need in found):
        alternatives = fitting_alternatives(prediction, room, workload_of)
    return Plan(prediction, room, found, alternatives, measured, no_time_because)


def hours(plan: Plan) -> dict[str, float]:
    """Returns hours by what they go to, from the measured speed; empty if none was measured."""
    measured, prediction = plan.measured, plan.prediction
    if measured is None:
        return {}
    workload, sizes = prediction.workload, prediction.workload.sizes
    step_h = measured.step_s / 3600
    found = {
        "steps_per_epoch": workload.steps_per_epoch * step_h,
        "all_steps": workload.total_steps * step_h,
    }
    per_text_h = 1 / measured.encoded_texts_per_s / 3600
    if workload.num_minings:
        texts = sizes.trained_queries + sizes.labels_with_text
        found["encoding_per_mining"] = texts * per_text_h
    queries = sizes.evaluated_queries(prediction.recipe)
    found["encoding_per_evaluation"] = (queries + sizes.labels_with_text) * per_text_h
    return found


def as_json(plan: Plan) -> dict[str, Any]:
    """Returns the plan as plain data; bytes, FLOPs, seconds and hours, units in the names."""
    prediction = plan.prediction
    flops, traffic = _step(prediction)
    return {
        "device": prediction.device_type,
        "world_size": prediction.workload.world_size,
        "sizes": asdict(prediction.workload.sizes),
        "steps_per_epoch": prediction.workload.steps_per_epoch,
        "total_steps": prediction.workload.total_steps,
        "step": [asdict(step) for step in prediction.workload.steps],
        "memory": {
            place: {
                "peak_bytes": peak_bytes(prediction.memory, place, with_reclaimable=False),
                "peak_resident_bytes": peak_bytes(prediction.memory, place, with_reclaimable=True),
                "greediest_stage": greediest_stage(prediction.memory, place),
                "parts": [asdict(part) for part in prediction.memory if part.place == place],
            }
            for place in PLACES
        },
        "disk": [asdict(part) for part in prediction.disk],
        "flops": {
            **{f"step_{name}": value for name, value in asdict(flops).items()},
            "step": flops.total,
            "epoch_of_a_rank": flops.total * prediction.workload.steps_per_epoch,
            "mining": mining_flops(prediction.workload, prediction.cost),
            "evaluation": evaluation_flops(prediction.recipe, prediction.workload, prediction.cost),
        },
        "traffic_bytes_per_step": [asdict(move) for move in traffic],
        "fits": [{**asdict(need), "fits": need.fits} for need in plan.needs],
        "alternatives": plan.alternatives,
        "measured": asdict(plan.measured) if plan.measured else None,
        "hours": hours(plan),
    }


def as_text(plan: Plan) -> str:
    """Returns the page for people."""
    return "\n".join(
        [
            *_sizes_lines(plan.prediction),
            *_memory_lines(plan.prediction),
            *_disk_lines(plan.prediction),
            *_work_lines(plan.prediction),
            *_time_lines(plan),
            *_verdict_lines(plan),
        ]
    )


def _sizes_lines(prediction: Prediction) -> Iterator[str]:
    workload, cost = prediction.workload, prediction.cost
    sizes, ranks = workload.sizes, workload.world_size
    yield f"sizes: {sizes.source}"
    yield (
        f"  {sizes.num_labels:,} labels; queries: {sizes.trained_queries:,} to train on, "
        f"{sizes.validation_queries:,} for validation, {sizes.test_queries:,} for test"
    )
    yield (
        f"  mean tokens: {sizes.query_tokens:.1f} a query, {sizes.label_tokens:.1f} a label; "
        f"encoder and heads: {cost.num_parameters / 1e6:.1f} M parameters, D = {cost.width}"
    )
    steps = workload.steps
    texts = mean(step.own_queries + step.own_label_texts for step in steps)
    padded = mean(step.num_padded_tokens for step in steps)
    share = 1 - mean(step.num_tokens for step in steps) / padded
    yield (
        f"  {workload.steps_per_epoch:,} steps an epoch, {workload.total_steps:,} in all, on "
        f"{ranks} rank{'s' if ranks > 1 else ''}, device {prediction.device_type}"
    )
    yield (
        f"  a step: {mean(step.batch_size for step in steps):,.0f} queries, pool "
        f"{mean(step.pool_size for step in steps):,.0f}; of one rank {texts:,.0f} texts in "
        f"{mean(len(step.chunks) for step in steps):.0f} chunks, {padded:,.0f} tokens, "
        f"{share:.0%} of them padding"
    )


def _memory_lines(prediction: Prediction) -> Iterator[str]:
    for place, name in PLACES.items():
        parts = [part for part in prediction.memory if part.place == place]
        if not parts:
            continue
        top = greediest_stage(parts, place)
        yield f"\n{name} of one rank"
        for stage, when in STAGES.items():
            of_stage = [part for part in parts if part.stage == stage]
            if not of_stage:
                continue
            total = sum(part.num_bytes for part in of_stage)
            note = "  <- the greediest stage" if stage == top and stage != "always" else ""
            title = when if stage == "always" else f"and {when}"
            yield f"  {title:<45}{in_words(total):>12}{note}"
            yield from (_part_line(part) for part in sorted(of_stage, key=lambda p: -p.num_bytes))
        peak = peak_bytes(parts, place, with_reclaimable=False)
        yield f"  {'at most at once, mapped files left out':<45}{in_words(peak):>12}"


def _part_line(part: Part) -> str:
    mapped = ", may be reclaimed" if part.reclaimable else ""
    return f"    {part.name:<43}{in_words(part.num_bytes):>12}  {part.origin}{mapped}"


def _disk_lines(prediction: Prediction) -> Iterator[str]:
    yield "\ndisk, all ranks together"
    for part in prediction.disk:
        where = "" if part.where == "run" else "  under nvme_path"
        yield f"    {part.name:<43}{in_words(part.num_bytes):>12}{where}"


def _work_lines(prediction: Prediction) -> Iterator[str]:
    flops, traffic = _step(prediction)
    workload, cost = prediction.workload, prediction.cost
    yield "\ncomputation of one rank (FLOPs of matrix products)"
    for name, value in (
        ("a step", flops.total),
        ("  encoder", flops.encoder),
        ("  heads", flops.heads),
        ("  losses", flops.loss),
        ("an epoch of steps", flops.total * workload.steps_per_epoch),
    ):
        yield f"    {name:<43}{_flops(value):>12}"
    ranks = workload.world_size
    shared = [("the final evaluation", evaluation_flops(prediction.recipe, workload, cost))]
    if workload.num_minings:
        shared.append(("a mining, exact search", mining_flops(workload, cost)))
    for name, value in shared:
        yield f"    {name:<43}{_flops(value // ranks):>12}"
    yield "\ntraffic of one rank in a step"
    for move in traffic:
        yield f"    {f'{move.link}: {move.name}':<56}{in_words(move.num_bytes):>12}"


def _time_lines(plan: Plan) -> Iterator[str]:
    yield ""
    if plan.measured is None:
        yield f"time: not measured ({plan.no_time_because})"
        return
    measured, found = plan.measured, hours(plan)
    yield (
        f"time on this machine: {measured.steps} steps of {measured.step_s:.3g} s (median), "
        f"{measured.tokens_per_s:,.0f} tokens/s; {measured.encoded_texts_per_s:,.0f} texts/s "
        "encoded without gradient"
    )
    yield f"    an epoch of steps {found['steps_per_epoch']:.3g} h, all {found['all_steps']:.3g} h"
    if "encoding_per_mining" in found:
        yield f"    a mining: {found['encoding_per_mining']:.3g} h to encode, and its search"
    yield f"    an evaluation: {found['encoding_per_evaluation']:.3g} h to encode, and its search"


def _verdict_lines(plan: Plan) -> Iterator[str]:
    yield "\nwill it fit"
    for need in plan.needs:
        name = "disk" if need.place == "disk" else PLACES[need.place]
        if need.place == "host" and plan.room.ranks > 1:
            name += f", {plan.room.ranks} ranks"
        if need.there_bytes is None:
            verdict = "room not known"
        else:
            answer = "no" if need.cannot_fit else "yes" if need.fits else "perhaps not"
            verdict = f"of {in_words(need.there_bytes)} there: {answer}"
        yield f"    {name:<30}{in_words(need.needed_bytes):>12} {verdict}"
    if plan.alternatives:
        yield "    what would fit: " + "; or ".join(plan.alternatives)
    elif not all(need.fits for need in plan.needs):
        yield "    no setting tried would make it fit: use a larger machine"


def _step(prediction: Prediction) -> tuple[StepFlops, list[Traffic]]:
    """Returns the mean FLOPs, and the traffic, of the sample steps."""
    steps, recipe, cost = prediction.workload.steps, prediction.recipe, prediction.cost
    flops = [step_flops(recipe, step, cost) for step in steps]
    traffic = [
        step_traffic(
            recipe,
            prediction.ds_config,
            step,
            cost,
            world_size=prediction.workload.world_size,
            device_type=prediction.device_type,
        )
        for step in steps
    ]
    return (
        StepFlops(
            encoder=_mean(f.encoder for f in flops),
            heads=_mean(f.heads for f in flops),
            loss=_mean(f.loss for f in flops),
        ),
        [
            replace(same[0], num_bytes=num_bytes)
            for same in zip(*traffic, strict=True)
            if (num_bytes := _mean(move.num_bytes for move in same))
        ],
    )


def _mean(values: Iterator[int] | Sequence[int]) -> int:
    return round(mean(values))


def _flops(value: float) -> str:
    for power, unit in ((15, "PFLOP"), (12, "TFLOP")):
        if value >= 10**power:
            return f"{value / 10**power:,.2f} {unit}"
    return f"{value / 1e9:,.2f} GFLOP"
