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
import json
import math
import multiprocessing
import random
import shutil
import socket
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from killed_run import PHASES, differences, live, make_inputs, open_phases

from unidec_ds.errors import UserError
from unidec_ds.exits import exit_with_message

TARGETS = ("start", "step", "save", "writing", "mining", "evaluation")
NOTICE_S = 30  # a rank left alone must notice within this time
LIFE_S = 240


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
