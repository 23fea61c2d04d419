"""Throws broken files at every parser until time is up.

    python scripts/fuzz.py [--target NAME ...] [--seconds N] [--json FILE]
    PYTHONPATH=/tmp/atheris python scripts/fuzz.py --seconds 20     after
                                          pip install --target /tmp/atheris atheris

What is fuzzed and what must hold is in `fuzz_targets.py`. With atheris (Google's coverage-guided
fuzzer for Python) inputs that reach new code are kept and mutated further, each target in a process
of its own; without it, whole files are damaged at random. Both know the damage of `damage`: cut,
flipped bits, lines swapped or doubled, odd numbers, marks, deep nesting, aliases. An input that
breaks a promise is written to --crashes; `--input FILE` with its `--target` runs it again.

Prints per target: executions, how many were accepted, crashes, and with atheris the code edges
reached ("cov" of libFuzzer). Exit codes: 0 no crash, 1 some.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import platform
import random
import re
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SLOW_S = 5.0
"""An input that takes longer is a crash."""

TOKENS = [
    b"-1", b"0", b"4", b"99", b"2147483648", b"9223372036854775808", b"1e400", b"-0.0", b"NaN",
    b"-Infinity", b"nan", b"inf", b"1_0", "１".encode(), b"true", b"null", b'""', b"[]", b"{}",
    b'"x"', b'"\\ud800"', b'"\\u0000"', b"\xef\xbb\xbf",
    b"\r\n", b"\n", b"\n\n", b"\x00", b"\xff\xfe",
    b"\xed\xa0\x80", b"\xc2\x85", b" ", b"\t", b":", b"1:1", b",", b'"', b"\\", b"../",
    b"/etc/passwd",
    b"[" * 2000, b'{"a":' * 1200, b"9" * 5000, b"&a [*a]", b"*a", b"<<: *a", b"!!int x",
    b"!!python/object:os.system", b"!!timestamp 2001-99-99", b"? [1]", b"%YAML 9.9\n---\n",
    b"---\n",
    b"a: &a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a]\nc: [*b,*b,*b,*b,*b,*b,*b]\n",
]  # fmt: skip


def damage(data: bytes, rng: random.Random) -> bytes:
    """Returns `data` with one to four faults of the kinds that real files have."""
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        data = rng.choice(_KINDS)(data, rng)
    return data


def _cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def _flip(data: bytes, rng: random.Random) -> bytes:
    if not data:
        return data
    at = rng.randrange(len(data))
    return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]


def _overwrite(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data) + 1)
    count = rng.randrange(1, 9)
    return data[:at] + rng.randbytes(count) + data[at + count :]


def _lines(data: bytes, rng: random.Random) -> bytes:
    """Swaps, doubles, removes or moves to the end a line."""
    lines = data.split(b"\n")
    i, j = rng.randrange(len(lines)), rng.randrange(len(lines))
    kind = rng.randrange(3)
    if kind == 0:
        lines[i], lines[j] = lines[j], lines[i]
    elif kind == 1:
        lines.insert(i, lines[j])
    else:
        del lines[i]
    return b"\n".join(lines)


def _insert(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + rng.choice(TOKENS) + data[at:]


def _replace_word(data: bytes, rng: random.Random) -> bytes:
    """Puts an odd value in the place of a number, a string or a word."""
    words = list(re.finditer(rb'"[^"\n]*"|-?[\w.]+|[\[\]{}:,]', data))
    if not words:
        return data
    begin, end = rng.choice(words).span()
    return data[:begin] + rng.choice(TOKENS) + data[end:]


def _line_ends(data: bytes, rng: random.Random) -> bytes:
    return data.replace(b"\n", b"\r\n")


def _mark(data: bytes, rng: random.Random) -> bytes:
    return b"\xef\xbb\xbf" + data


_KINDS = [_cut, _flip, _flip, _overwrite, _lines, _lines, _insert, _insert, _replace_word,
          _replace_word, _replace_word, _line_ends, _mark]  # fmt: skip


def run_one(target: Any, data: bytes, folder: Path) -> bool:
    """Returns whether an input was accepted; raises at a broken promise or after SLOW_S."""
    start_s = time.perf_counter()
    accepted = bool(target.check(data, folder))
    took_s = time.perf_counter() - start_s
    assert took_s < SLOW_S, f"{len(data)} bytes took {took_s:.1f} s"
    return accepted


def run_random(target: Any, seconds: float, seed: int, crashes: Path) -> dict[str, Any]:
    """Damages whole files, and what became of them, until time is up."""
    rng = random.Random(f"{seed} {target.name}")
    pool = target.seeds()
    seen = dict.fromkeys(("executions", "accepted", "crashes"), 0)
    messages: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        for data in pool:
            assert run_one(target, data, Path(folder)), f"{target.name}: a whole file was refused"
        end_s = time.perf_counter() + seconds
        while time.perf_counter() < end_s:
            data = damage(rng.choice(pool), rng)
            seen["executions"] += 1
            try:
                if run_one(target, data, Path(folder)):
                    seen["accepted"] += 1
                    if len(pool) < 64 and data not in pool and len(data) < 1 << 14:
                        pool.append(data)  # damaged and still accepted: damage it further
            except Exception as error:
                _note(target.name, data, error, crashes, messages)
    return {**seen, "crashes": len(messages), "messages": messages, "coverage": None}


def _note(
    name: str, data: bytes, error: Exception, crashes: Path, messages: dict[str, str]
) -> None:
    """Keeps the first input of each kind of crash."""
    where = traceback.extract_tb(error.__traceback__)[-1]
    kind = f"{type(error).__name__} at {Path(where.filename).name}:{where.lineno}"
    if kind in messages:
        return
    crashes.mkdir(parents=True, exist_ok=True)
    path = crashes / f"{name}-{hashlib.sha256(data).hexdigest()[:12]}"
    path.write_bytes(data)
    messages[kind] = f"{str(error)[:200]} ({path})"
    print(f"  {kind}: {messages[kind]}", file=sys.stderr)


def run_guided(target: Any, seconds: float, seed: int, crashes: Path) -> dict[str, Any]:
    """Lets atheris fuzz a target in a process of its own, which ends at the first crash."""
    crashes.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as work:
        corpus, tally = Path(work) / "corpus", Path(work) / "accepted"
        corpus.mkdir()
        for number, data in enumerate(target.seeds()):
            (corpus / f"seed-{number}").write_bytes(data)
        command = [sys.executable, __file__, "--target", target.name, "--guided-worker", work]
        command += [f"-max_total_time={max(1, round(seconds))}", f"-seed={seed + 1}"]
        command += [f"-artifact_prefix={crashes}/{target.name}-", f"-timeout={round(SLOW_S)}"]
        command += ["-max_len=16384", "-rss_limit_mb=0", "-print_final_stats=1"]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        accepted = tally.stat().st_size if tally.exists() else 0
    output = done.stderr
    found = re.findall(r"cov: (\d+)", output)
    runs = re.findall(r"number_of_executed_units: (\d+)", output)
    messages = {}
    if done.returncode:
        print(output[-3000:], file=sys.stderr)
        lines = [line for line in output.splitlines() if "Error" in line or "SUMMARY" in line]
        messages[lines[0] if lines else f"exit code {done.returncode}"] = output[-2000:]
    return {
        "executions": int(runs[-1]) if runs else 0,
        "accepted": accepted,
        "crashes": len(messages),
        "messages": messages,
        "coverage": int(found[-1]) if found else None,
    }


def guided_worker(name: str, work: str, options: list[str]) -> None:
    """Runs libFuzzer over one target; leaves the process, by the shortest way."""
    import atheris

    with atheris.instrument_imports(include=["unidec_ds"]):
        from fuzz_targets import TARGETS
    target, folder = TARGETS[name], Path(work) / "files"
    folder.mkdir()
    tally = os.open(Path(work) / "accepted", os.O_CREAT | os.O_WRONLY)

    def one_input(data: bytes) -> None:
        if target.check(data, folder):
            os.write(tally, b".")

    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        rng = random.Random(seed)
        if rng.random() < 0.5:
            return damage(bytes(data), rng)[:max_size]
        mutated: bytes = atheris.Mutate(data, max_size)
        return mutated

    options = [sys.argv[0], *options, str(Path(work) / "corpus")]
    atheris.Setup(options, one_input, custom_mutator=mutate)
    atheris.Fuzz()


def main() -> int:
    """Parses the command line and fuzzes."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--target", action="append", metavar="NAME", help="default: all")
    parser.add_argument("--seconds", type=float, default=10.0, help="per target")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engine", choices=["auto", "atheris", "random"], default="auto")
    parser.add_argument("--crashes", type=Path, default=Path(tempfile.gettempdir()) / "unidec-fuzz")
    parser.add_argument("--input", type=Path, help="run this one input of the one --target")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--guided-worker", metavar="DIR", help=argparse.SUPPRESS)
    args, options = parser.parse_known_args()
    if args.guided_worker:
        guided_worker(args.target[0], args.guided_worker, options)
    if options:
        parser.error(f"unknown: {' '.join(options)}")
    from fuzz_targets import TARGETS

    if unknown := set(args.target or ()) - set(TARGETS):
        parser.error(f"--target {unknown.pop()}: needs one of {', '.join(TARGETS)}")
    targets = [TARGETS[name] for name in args.target or TARGETS]
    if args.input and len(targets) != 1:
        parser.error("--input needs the one --target that it is an input of")
    if args.input:
        with tempfile.TemporaryDirectory() as folder:
            print("accepted" if run_one(targets[0], args.input.read_bytes(), Path(folder)) else
                  "refused")  # fmt: skip
        return 0
    has_atheris = importlib.util.find_spec("atheris") is not None
    engine = args.engine
    if engine == "auto":
        engine = "atheris" if has_atheris else "random"
    run = run_guided if engine == "atheris" else run_random
    print(f"{engine}, {args.seconds:g} s a target")
    print(f"{'target':<16}{'executions':>12}{'accepted':>10}{'crashes':>9}{'edges':>8}")
    results = {}
    for target in targets:
        result = results[target.name] = run(target, args.seconds, args.seed, args.crashes)
        edges = result["coverage"] if result["coverage"] is not None else "-"
        print(
            f"{target.name:<16}{result['executions']:>12,}{result['accepted']:>10,}"
            f"{result['crashes']:>9}{edges:>8}",
            flush=True,
        )
    if args.json:
        content = {
            "engine": engine,
            "seconds_a_target": args.seconds,
            "seed": args.seed,
            "python": platform.python_version(),
            "targets": results,
        }
        args.json.write_text(json.dumps(content, indent=2) + "\n")
    return int(any(result["crashes"] for result in results.values()))


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]
    sys.exit(main())
