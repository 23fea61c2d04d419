"""Whether the ranks of a job were started alike and see what they have to see together.

Called by `job` once each rank has passed its own checks, before there is a process group. A fault
here would otherwise come out as a hang, as a file that is missing after hours, or not at all:
ranks that train on different data.

Needed on storage that every node sees, under the same path or another:

- the run directory: every rank writes its rows of a checkpoint and opens the shortlists that rank 0
  has mined. A file with a name that never was before, written by rank 0, has to be found by all.

Needed alike on every node, shared or as copies: the corpus (its fingerprint is compared), recipe,
ds_config and versions. Folders of `nvme_path` belong to their node; nothing is shared there.
"""

from __future__ import annotations

import secrets
import socket
from importlib import metadata
from pathlib import Path
from typing import Any

from unidec_ds.config import Recipe
from unidec_ds.data.corpus import Corpus
from unidec_ds.ds_config import DsConfig
from unidec_ds.errors import UserError
from unidec_ds.lifeline import Lifeline
from unidec_ds.manifest import manifest_digest, read_manifest
from unidec_ds.shared_storage import appears

_PACKAGES = ("unidec_ds", "torch", "deepspeed", "accelerate", "transformers")
_OWN_KEYS = ("corpus.path", "corpus.prepared_dir")  # a node may keep its copy elsewhere


def check_agreement(
    lifeline: Lifeline,
    run: Path,
    recipe: Recipe,
    ds_config: DsConfig,
    corpus: Corpus,
    resume_from: Path | None,
    begin_from: Path | None,
) -> None:
    """Compares what the ranks have found; leaves no run directory behind.

    Args:
        lifeline: to the other ranks.
        run: the run directory.
        recipe: what is to be trained.
        ds_config: how.
        corpus: on what.
        resume_from: the checkpoint of this run to go on from.
        begin_from: the checkpoint of another run to begin with.

    Raises:
        UserError: on every rank alike, with all differences, where they are and what to do.
        PeerFailedError: another rank has failed its own checks.
    """
    if lifeline.world_size == 1:
        return
    ranks = lifeline.exchange(
        "job",
        {
            "host": socket.gethostname(),
            "recipe": _flat(recipe.as_yaml_object()),
            "ds_config": ds_config.content,
            "versions": _versions(),
            "corpus": corpus.fingerprint,
            "corpus_folder": str(corpus.path.resolve()),
            "run": str(run.resolve()),
            "step": _step(resume_from),
            "begin_from": _checkpoint(begin_from),
        },
    )
    hosts = [str(found["host"]) for found in ranks]
    faults = [*_setting_faults(ranks, hosts), *_corpus_faults(ranks, hosts)]
    blind = _ranks_that_do_not_see(run, lifeline)
    if blind:
        faults.append(
            f"--output: {_name(blind, hosts)} did not find in {ranks[blind[0]]['run']} what "
            f"{_name([0], hosts)} has written to {ranks[0]['run']}. All ranks read and write "
            "there: name a folder on storage that every node mounts (NFS, Lustre, ...)."
        )
    else:
        faults += _step_faults(ranks, hosts) or _warm_start_faults(ranks, hosts)
    if faults:
        raise UserError("the ranks cannot train together:\n  " + "\n  ".join(faults))


def _setting_faults(ranks: list[dict[str, Any]], hosts: list[str]) -> list[str]:
    faults = []
    for what in ("recipe", "ds_config", "versions"):
        first = ranks[0][what]
        others = [rank for rank, found in enumerate(ranks) if found[what] != first]
        if others:
            other = ranks[others[0]][what]
            keys = [key for key in {**first, **other} if first.get(key) != other.get(key)]
            found = "; ".join(f"{key}: {other.get(key)}, not {first.get(key)}" for key in keys)
            faults.append(
                f"{what}: {_name(others, hosts)} has {found} as {_name([0], hosts)} has. Start "
                "every rank with the same command, files and environment."
            )
    return faults


def _corpus_faults(ranks: list[dict[str, Any]], hosts: list[str]) -> list[str]:
    others = [rank for rank, found in enumerate(ranks) if found["corpus"] != ranks[0]["corpus"]]
    if not others:
        return []
    other, first = ranks[others[0]], ranks[0]
    return [
        f"corpus: {_name(others, hosts)} has {other['corpus_folder']} with fingerprint "
        f"{other['corpus'][:8]}, {_name([0], hosts)} has {first['corpus_folder']} with "
        f"{first['corpus'][:8]}. Every node needs the same corpus: prepare it once and name that "
        "folder on storage that every node mounts, or copy it to every node (rsync -a)."
    ]


def _step_faults(ranks: list[dict[str, Any]], hosts: list[str]) -> list[str]:
    others = [rank for rank, found in enumerate(ranks) if found["step"] != ranks[0]["step"]]
    if not others:
        return []
    return [
        f"--resume: {_name(others, hosts)} would go on from {ranks[others[0]]['step']}, "
        f"{_name([0], hosts)} from {ranks[0]['step']}. Start again once every node sees the newest "
        "checkpoint, or name one with --resume."
    ]


def _warm_start_faults(ranks: list[dict[str, Any]], hosts: list[str]) -> list[str]:
    first = ranks[0]["begin_from"]
    others = [
        rank for rank, found in enumerate(ranks) if found["begin_from"][:2] != first[:2]
    ]  # its folder may have another name on another node
    if not others:
        return []
    other = ranks[others[0]]["begin_from"]
    return [
        f"--init_from: {_name(others, hosts)} would begin {_describe(other)}, "
        f"{_name([0], hosts)} {_describe(first)}. Start every rank with the same command, once "
        "every node sees that run's newest checkpoint."
    ]


def _ranks_that_do_not_see(run: Path, lifeline: Lifeline) -> list[int]:
    """Returns the ranks that do not find in the run directory what rank 0 writes there."""
    nonce = ""
    if lifeline.rank == 0:
        nonce = secrets.token_hex(16)
        run.mkdir(parents=True, exist_ok=True)
        _mark(run, nonce).write_text(nonce, encoding="ascii")
    nonce = lifeline.exchange("run directory", nonce)[0]
    seen = lifeline.exchange("run directory seen", _finds(run, nonce))
    if lifeline.rank == 0:
        _mark(run, nonce).unlink()
        if not any(run.iterdir()):
            run.rmdir()
    return [rank for rank, finds in enumerate(seen) if not finds]


def _mark(run: Path, nonce: str) -> Path:
    return run / f".shared-{nonce}"


def _finds(run: Path, nonce: str) -> bool:
    mark = _mark(run, nonce)
    return appears(lambda: mark.read_text(encoding="ascii") == nonce, run.parent, run)


def _step(resume_from: Path | None) -> str:
    if resume_from is None:
        return "step 0"
    return f"step {read_manifest(resume_from)['step']}"


def _checkpoint(folder: Path | None) -> tuple[int, str, str]:
    """Returns a checkpoint's step, what tells it from others, and where it is."""
    if folder is None:
        return 0, "", ""
    return int(read_manifest(folder)["step"]), manifest_digest(folder), str(folder)


def _describe(checkpoint: list[Any]) -> str:
    step, digest, folder = checkpoint
    return f"with {folder} (step {step}, manifest {digest[:8]})" if folder else "anew"


def _versions() -> dict[str, str]:
    return {name: metadata.version(name) for name in _PACKAGES}


def _flat(recipe: dict[str, Any]) -> dict[str, Any]:
    keys = {
        f"{section}.{key}": v for section, values in recipe.items() for key, v in values.items()
    }
    return {key: value for key, value in keys.items() if key not in _OWN_KEYS}


def _name(ranks: list[int], hosts: list[str]) -> str:
    """Returns "rank 3 (host b)" or "ranks 8, 9, 10 (host b), 16 (host c)"."""
    by_host: dict[str, list[str]] = {}
    for rank in ranks:
        by_host.setdefault(hosts[rank], []).append(str(rank))
    named = ", ".join(f"{', '.join(some)} (host {host})" for host, some in by_host.items())
    return f"rank{'s' if len(ranks) > 1 else ''} {named}"
