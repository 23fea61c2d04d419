"""Kills a training with SIGKILL at random moments, resumes it, and compares what it ends with.

    python scripts/kill_test.py [--kills 50] [--seconds S] [--ranks 1] [--json FILE] [--quick]

A tiny run (two-layer encoder, made-up corpus; mining, evaluation, checkpoints between its steps) is
trained once undisturbed. Then it is trained again and again with `--resume auto`, and each time
killed in a phase drawn by chance: while it starts, in a step, while it saves, mines or evaluates.
With several ranks either all of them are killed or one alone; the others then have to notice. Each
time the run comes to its end it must equal the undisturbed one: every byte of the final checkpoint,
the losses and validation figures in metrics.jsonl and in TensorBoard, each step once, and the final
evaluation. Then the next round begins in a new folder, until the kills are used up.

The trainings are forked from one server process that has imported everything; a life costs about as
much as its steps. Which phase a rank was in when it died is what it last wrote to shared memory.
Exit code 0: every kill was survived and every round ended equal; 1: not.
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import math
import mmap
import multiprocessing
import os
import random
import shutil
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from make_synthetic import SHAPES, Synthetic, write
from make_tiny_encoder import make_encoder

from unidec_ds import checkpoint
from unidec_ds.errors import UserError
from unidec_ds.exits import exit_with_message
from unidec_ds.manifest import read_manifest

PHASES = ("start", "step", "save", "mining", "evaluation", "between")
TARGETS = ("start", "step", "save", "writing", "mining", "evaluation")
NOTICE_S = 30  # a rank left alone must notice within this time
LIFE_S = 240
DS_CONFIG = {
    "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
    "gradient_clipping": 1.0,
}


@dataclass
class Outcome:
    """What the kills did."""

    kills: Counter[str] = field(default_factory=Counter)
    """By the phase of the first rank killed."""
    while_writing: int = 0
    """Kills while checkpoint files were being written, in whatever phase."""
    single: int = 0
    """Kills of one rank among several."""
    noticed: int = 0
    """Of these, those after which all other ranks ended by themselves in time."""
    lives: int = 0
    rounds: int = 0
    """Runs that came to their end."""
    faults: list[str] = field(default_factory=list)
    """Lives that failed without being killed, and rounds that ended with something else."""


def make_inputs(folder: Path) -> None:
    """Writes corpus, encoder, recipe and ds_config."""
    sizes = SHAPES["131k"]._replace(train_queries=300, test_queries=40, labels=200)
    write(Synthetic(sizes, 100, 0), folder / "raw", filter_share=0.2, show_progress=False)
    make_encoder(folder / "raw", folder / "encoder", width=32, num_words=200)
    recipe = {
        "corpus": {
            "path": str(folder / "raw"),
            "prepared_dir": str(folder / "prepared"),
            "validation_fraction": 0.1,
        },
        "encoder": {"name": str(folder / "encoder"), "max_length": 12},
        "pool": {"size": 64, "num_positives": 2, "num_hard_negatives": 2},
        "batches": {"kind": "clustered"},
        "mining": {
            "start_epoch": 1, "every_epochs": 1, "shortlist_size": 8, "source": "cached",
        },
        "checkpoint": {"every_steps": 3, "keep": 2, "keep_best": True},
        "train": {"batch_size": 32, "epochs": 4, "encoder_chunk": 32},
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(json.dumps(recipe))  # JSON is YAML
    (folder / "ds_config.json").write_text(json.dumps(DS_CONFIG))


def live(rank: int, world_size: int, port: int, inputs: Path, run: Path, life: Path) -> None:
    """One rank of one life of a run, as `train.py --resume auto`; notes its phase on the way."""
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size), OMP_NUM_THREADS="1",
    )  # fmt: skip
    log = os.open(life / f"{rank}.log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    import torch

    from unidec_ds import job
    from unidec_ds.config import load_recipe
    from unidec_ds.lifeline import Lifeline
    from unidec_ds.mining.miner import Miner
    from unidec_ds.saver import Saver
    from unidec_ds.trainer import Trainer

    torch.set_num_threads(1)
    phases, seconds = open_phases(life), Counter[str]()

    def mark(owner: type, name: str, phase: str) -> None:
        plain: Callable[..., Any] = getattr(owner, name)
        place = rank if phase in PHASES else world_size + rank

        @functools.wraps(plain)
        def marked(*args: Any, **kwargs: Any) -> Any:
            before, start = phases[place], time.perf_counter()
            phases[place] = PHASES.index(phase) if phase in PHASES else 1
            try:
                return plain(*args, **kwargs)
            finally:
                phases[place] = before
                seconds[phase] += time.perf_counter() - start
                seconds[f"{phase} calls"] += 1

        setattr(owner, name, marked)

    mark(Trainer, "train_step", "step")
    mark(Saver, "begin", "save")
    mark(Saver, "finish", "save")
    mark(checkpoint.Save, "_write_files", "writing")  # in a thread of its own
    mark(Miner, "refresh", "mining")
    mark(Trainer, "evaluate", "evaluation")
    plain_fit = Trainer.fit

    def fit(self: Trainer) -> None:
        phases[rank] = PHASES.index("between")
        plain_fit(self)

    Trainer.fit = fit  # type: ignore[method-assign]

    lifeline = Lifeline.of_launch()

    def main() -> None:
        recipe = load_recipe(str(inputs / "recipe.yaml"))
        lifeline.open()
        ds_config = inputs / "ds_config.json"
        job.run_job(job.prepare_job(recipe, ds_config, run, "auto", lifeline=lifeline), lifeline)

    begin = time.perf_counter()
    code = exit_with_message(main, lifeline)
    if rank == 0:
        seconds["start"], seconds["start calls"] = time.perf_counter() - begin, 10
        (life / "seconds.json").write_text(json.dumps(seconds))
    sys.exit(code)


def open_phases(life: Path) -> mmap.mmap:
    """Returns shared memory: a byte for each rank's phase, then one for whether it is writing."""
    with (life / "phases").open("r+b") as file:
        return mmap.mmap(file.fileno(), 0)


class Arena:
    """Starts lives and kills them."""

    def __init__(self, folder: Path, world_size: int, seed: int) -> None:
        self._folder, self._world_size = folder, world_size
        self._random = random.Random(seed)
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(
            ["deepspeed", "accelerate", "transformers", "tensorboard", "unidec_ds.job",
             "torch.utils.tensorboard", "unidec_ds.mining.clustering"]
        )  # fmt: skip
        self._seconds: dict[str, float] = {}
        self.outcome = Outcome()

    def train(self, run: Path) -> None:
        """Trains undisturbed and measures how long each phase takes."""
        life, ranks = self._start(run)
        codes = _join(ranks, LIFE_S)
        if codes != [0] * self._world_size:
            raise RuntimeError(f"the undisturbed run failed:\n{_tail(life)}")
        seconds = json.loads((life / "seconds.json").read_text())
        self._seconds = {t: seconds[t] / seconds[f"{t} calls"] for t in TARGETS}

    def kill_once(self, run: Path) -> bool:
        """Lives once, until a kill or the end; returns whether the run came to its end."""
        target = self._random.choice(TARGETS)
        skip = self._random.randrange(4) if target in ("step", "save", "writing") else 0
        delay_s = self._random.uniform(0, 1.2 * self._seconds[target])
        victims = list(range(self._world_size))
        if self._world_size > 1 and self._random.random() < 0.5:
            victims = [self._random.randrange(self._world_size)]
        life, ranks = self._start(run)
        phases = open_phases(life)
        place, wanted = victims[0], PHASES.index(target) if target in PHASES else 1
        if target == "writing":
            place += self._world_size
        seen, was_there = 0, False
        deadline = time.monotonic() + LIFE_S
        while all(process.is_alive() for process in ranks) and time.monotonic() < deadline:
            is_there = phases[place] == wanted
            seen += is_there and not was_there
            was_there = is_there
            if is_there and seen > skip:
                time.sleep(delay_s)
                break
            time.sleep(0.0005)
        else:
            return self._ended(ranks, life)
        if not all(process.is_alive() for process in ranks):
            return self._ended(ranks, life)
        for victim in victims:
            ranks[victim].kill()
        for victim in victims:
            ranks[victim].join()
        self.outcome.kills[PHASES[phases[victims[0]]]] += 1
        self.outcome.while_writing += phases[self._world_size + victims[0]]
        if len(victims) < self._world_size:
            self.outcome.single += 1
            codes = _join(ranks, NOTICE_S)
            if None in codes or 0 in codes:
                self.outcome.faults.append(
                    f"{life.name}: one rank was killed, all left with {codes}"
                )
            else:
                self.outcome.noticed += 1
        for process in ranks:
            process.kill()
            process.join()
        return False

    def finish(self, run: Path) -> None:
        """Lives to the end."""
        life, ranks = self._start(run)
        self._ended(ranks, life)

    def _start(self, run: Path) -> tuple[Path, list[Any]]:
        self.outcome.lives += 1
        life = self._folder / f"life-{self.outcome.lives:04d}"
        life.mkdir()
        (life / "phases").write_bytes(bytes(2 * self._world_size))
        port = _free_port()
        arguments = (self._world_size, port, self._folder, run, life)
        ranks = [
            self._context.Process(target=live, args=(rank, *arguments), daemon=True)
            for rank in range(self._world_size)
        ]
        for process in ranks:
            process.start()
        return life, ranks

    def _ended(self, ranks: list[Any], life: Path) -> bool:
        """Returns True if the ranks ended well; else notes the fault."""
        codes = _join(ranks, LIFE_S)
        for process in ranks:
            process.kill()
        if codes == [0] * self._world_size:
            return True
        self.outcome.faults.append(f"{life.name} left with {codes}:\n{_tail(life)}")
        return False


def differences(run: Path, undisturbed: Path) -> list[str]:
    """Returns in what a finished run differs from the undisturbed one."""
    found = []
    ours, theirs = _read(run), _read(undisturbed)
    for name, value in theirs.items():
        if ours[name] != value:
            found.append(f"{name}: {ours[name]!s:.300} instead of {value!s:.300}")
    return found


def _read(run: Path) -> dict[str, Any]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # purging is what is wanted
    newest = checkpoint.latest(run)
    assert newest is not None
    damage = checkpoint.find_damage(newest)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    events = EventAccumulator(str(run), {"scalars": 0}).Reload()
    best = checkpoint.best(run)
    noted = ("checkpoint", "unified_tuned")
    evaluation = json.loads((run / "evaluation.json").read_text())
    return {
        "damage": damage,
        "files": read_manifest(newest)["files"],
        "folders": sorted(path.name for path in newest.parent.iterdir()),
        "best": best,
        "losses": [(r["step"], r["loss"]) for r in records if "loss" in r],
        "evaluations": [
            (r["step"], r["split"], r["evaluation"]) for r in records if "evaluation" in r
        ],
        "mining steps": [r["step"] for r in records if "mining_total_s" in r],
        "TensorBoard losses": [(e.step, e.value) for e in events.Scalars("loss/loss")],
        "TensorBoard validation": [
            (e.step, e.value) for e in events.Scalars("validation_unified/P@1")
        ],
        "final evaluation": {k: v for k, v in evaluation.items() if k != "details"},
        "details": {k: v for k, v in evaluation["details"].items() if k not in noted},
    }


def _join(ranks: list[Any], seconds: float) -> list[int | None]:
    """Returns the exit codes, None for a rank that is still alive after that time."""
    deadline = time.monotonic() + seconds
    for process in ranks:
        process.join(max(0.0, deadline - time.monotonic()))
    return [process.exitcode for process in ranks]


def _tail(life: Path) -> str:
    return "\n".join(log.read_text(errors="replace")[-2000:] for log in sorted(life.glob("*.log")))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_all(folder: Path, kills: int, world_size: int, seed: int, seconds: float) -> Outcome:
    """Kills `kills` times, or for that long; returns what came of it."""
    deadline = time.monotonic() + seconds
    make_inputs(folder)
    arena = Arena(folder, world_size, seed)
    undisturbed = folder / "undisturbed"
    arena.train(undisturbed)
    outcome = arena.outcome

    def goes_on() -> bool:
        total = sum(outcome.kills.values())
        print(f"\r{total} kills, {outcome.rounds} rounds", end="", file=sys.stderr, flush=True)
        return total < kills and not outcome.faults and time.monotonic() < deadline

    while goes_on():
        run = folder / f"round-{outcome.rounds + 1:02d}"
        while goes_on():
            if arena.kill_once(run):
                break
        else:
            if not outcome.faults:
                arena.finish(run)
        if not outcome.faults:
            outcome.rounds += 1
            outcome.faults += differences(run, undisturbed)
            shutil.rmtree(run)
    print(file=sys.stderr)
    return outcome


def describe(outcome: Outcome, world_size: int, seconds: float) -> str:
    """Returns the table."""
    total = sum(outcome.kills.values())
    lines = [
        f"{total} kills at {world_size} rank{'s' if world_size > 1 else ''}, "
        f"{outcome.lives} lives, {outcome.rounds} rounds, {seconds:.0f} s",
        "",
        "| killed in | kills |",
        "|---|---|",
        *(f"| {phase} | {outcome.kills[phase]} |" for phase in PHASES if outcome.kills[phase]),
        "",
        f"{outcome.while_writing} of them while checkpoint files were being written",
        f"survived {total if not outcome.faults else 'not all'} of {total}; final state bitwise "
        f"equal in {outcome.rounds if not outcome.faults else 'not all'} of {outcome.rounds}",
    ]
    if world_size > 1:
        lines.append(
            f"one rank alone killed {outcome.single} times; the others ended by themselves "
            f"{outcome.noticed} times"
        )
    return "\n".join([*lines, *(f"FAULT {fault}" for fault in outcome.faults)])


def main() -> None:
    """Runs the test and prints its table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50, help="default: 50")
    parser.add_argument(
        "--seconds", type=float, default=math.inf, help="begin no other life after this time"
    )
    parser.add_argument("--ranks", type=int, default=1, help="default: 1")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--quick", action="store_true", help="5 kills")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    if args.kills < 1 or args.ranks < 1:
        raise UserError("--kills and --ranks: needs at least 1")
    kills, start = 5 if args.quick else args.kills, time.monotonic()
    with tempfile.TemporaryDirectory(prefix="kill_test-") as name:
        outcome = run_all(Path(name), kills, args.ranks, args.seed, args.seconds)
    seconds = time.monotonic() - start
    print(describe(outcome, args.ranks, seconds))
    if args.json:
        figures = {
            "ranks": args.ranks,
            "seed": args.seed,
            "kills": dict(outcome.kills),
            "while_writing": outcome.while_writing,
            "single": outcome.single,
            "noticed": outcome.noticed,
            "lives": outcome.lives,
            "rounds": outcome.rounds,
            "seconds": round(seconds, 1),
            "faults": outcome.faults,
        }
        args.json.write_text(json.dumps(figures, indent=2) + "\n")
    if outcome.faults:
        sys.exit(1)


if __name__ == "__main__":
    sys.exit(exit_with_message(main))
