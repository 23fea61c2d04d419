"""Raw corpus -> prepared corpus: once, never half, whoever asks first.

    data.formats records -> data.build -> data.corpus

A corpus is built in a hidden folder beside its own and renamed when whole, under a file lock: a
killed run leaves nothing that could be taken for a corpus, and of several processes one builds
while the others wait. The fingerprint covers the sources, the tokenizer, the length and the text
option, so that a second call returns at once and a change is noticed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from contextlib import AbstractContextManager, nullcontext
from importlib import resources
from pathlib import Path
from typing import Any

from unidec_ds.data.build import build
from unidec_ds.data.corpus import (
    FORMAT_VERSION,
    MANIFEST,
    Corpus,
    CorpusConfig,
    describe_oddities,
    open_corpus,
)
from unidec_ds.data.files import LineError
from unidec_ds.data.formats import RawCorpus, recognise
from unidec_ds.data.quarantine import Quarantine
from unidec_ds.encoders import load_tokenizer
from unidec_ds.errors import CorpusError, UserError
from unidec_ds.stamp import locked

logger = logging.getLogger(__name__)

HASHED_WHOLE_BYTES = 1 << 28
"""Up to here a source file is known by its sha256; above, by size, time of change and its ends."""

_END_BYTES = 1 << 20


def prepare(
    raw_dir: Path,
    out_dir: Path | None = None,
    *,
    encoder: str,
    max_length: int,
    text: str = "title+content",
    prepared_dir: Path = Path("prepared"),
    quarantine: Path | None = None,
    show_progress: bool = True,
) -> Corpus:
    """Returns the prepared form of a raw corpus, building it if it is not there yet.

    Several processes may call this at once: one builds, the others wait. An `out_dir` prepared
    from other sources or settings is replaced. The fingerprint does not tell whether there was a
    quarantine: a source without bad lines gives the same corpus either way, one with bad lines is
    a corpus only with a quarantine.

    Args:
        raw_dir: a folder in one of the layouts of `data.formats`.
        out_dir: where the corpus goes. Default: `prepared_dir/NAME-FINGERPRINT`.
        encoder: whose tokenizer to use; a name or folder as in `encoder.name`.
        max_length: texts are cut to this many tokens, special tokens included.
        text: "title" or "title+content".
        prepared_dir: parent of the default `out_dir`.
        quarantine: file for bad lines, written over; the corpus is made without them. None: the
            first bad line is an error, also where a corpus was made without it before.
        show_progress: whether to draw progress bars on stderr.

    Raises:
        CorpusError: a fault in the source files, or an `out_dir` that holds something else.
        UserError: no such encoder, or no room for a text in `max_length`.
    """
    if (raw_dir / MANIFEST).is_file():
        raise CorpusError(
            f"{raw_dir}: already a prepared corpus ({MANIFEST} is there); the raw folder was "
            "needed. Use this folder as it is, as `corpus.path` or with `--corpus`."
        )
    raw = recognise(raw_dir)
    tokenizer = load_tokenizer(encoder)
    if max_length <= (special := tokenizer.num_special_tokens_to_add()):
        raise UserError(
            f"encoder.max_length: {max_length}, needed more than the {special} special tokens that "
            f"the tokenizer of {encoder} adds to every text."
        )
    settings = {
        "format_version": FORMAT_VERSION,
        "source": [_identity(file, raw_dir) for file in raw.source_files()],
        "tokenizer": tokenizer_hash(tokenizer),
        "max_length": max_length,
        "text": text,
    }
    fingerprint = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    if out_dir is None:
        out_dir = prepared_dir / f"{raw_dir.resolve().name}-{fingerprint[:8]}"
    if quarantine is not None and out_dir.resolve() in quarantine.resolve().parents:
        raise UserError(f"{quarantine}: in the corpus's own folder; name a file elsewhere.")
    if _holds(out_dir, fingerprint, quarantine):
        return open_corpus(out_dir)
    with locked(out_dir):
        if not _holds(out_dir, fingerprint, quarantine):
            manifest = {"name": raw_dir.resolve().name, "fingerprint": fingerprint, **settings}
            _build_beside(out_dir, raw, tokenizer, manifest, show_progress, quarantine)
            _say_what_was_found(raw, open_corpus(out_dir), quarantine)
    return open_corpus(out_dir)


def resolve_corpus(
    config: CorpusConfig, encoder: str, max_length: int, *, show_progress: bool = True
) -> Corpus:
    """Returns the corpus that a recipe names, prepared with the recipe's tokenizer.

    Args:
        config: the recipe's section; `path` is a folder (raw or prepared; looked for first) or the
            name of an embedded corpus in any case.
        encoder: `encoder.name`.
        max_length: `encoder.max_length`, in tokens.
        show_progress: whether to draw progress bars on stderr.

    Raises:
        CorpusError: no such corpus, a fault in it, or a prepared one that was made with another
            tokenizer, length or text option.
    """
    folder = Path(config.path)
    if not folder.is_dir():
        embedded = embedded_corpora()
        if config.path.lower() not in embedded:
            raise CorpusError(
                f"corpus.path: {config.path!r} is neither a folder (looked from {Path.cwd()}) nor "
                f"an embedded corpus ({', '.join(embedded)}). Name one of these."
            )
        folder = embedded[config.path.lower()]
    if not (folder / MANIFEST).is_file():
        return prepare(
            folder,
            encoder=encoder,
            max_length=max_length,
            text=config.text,
            prepared_dir=Path(config.prepared_dir),
            quarantine=Path(config.quarantine) if config.quarantine else None,
            show_progress=show_progress,
        )
    corpus = open_corpus(folder)
    wanted = {
        "corpus.text": ("text", config.text),
        "encoder.max_length": ("max_length", max_length),
        "the tokenizer of encoder.name": ("tokenizer", tokenizer_hash(load_tokenizer(encoder))),
    }
    faults = [
        f"{what}: prepared with {corpus.manifest[key]}, the recipe says {value}"
        for what, (key, value) in wanted.items()
        if corpus.manifest[key] != value
    ]
    if faults:
        raise CorpusError(
            f"{folder}: prepared for another recipe.\n  " + "\n  ".join(faults) + "\n  Set the "
            "recipe's values to the corpus's, or name the raw folder as corpus.path: it is then "
            "prepared as the recipe says."
        )
    return corpus


def embedded_corpora() -> dict[str, Path]:
    """Returns the raw folders of the corpora that ship with the package, by lower-case name."""
    folder = Path(str(resources.files("unidec_ds.corpora")))
    return {path.name.lower(): path for path in sorted(folder.iterdir()) if _is_corpus(path)}


def _is_corpus(path: Path) -> bool:
    return (path / "README.md").is_file()


def tokenizer_hash(tokenizer: Any) -> str:
    """Returns a hash of all that decides how a tokenizer of `transformers` splits a text."""
    if tokenizer.is_fast:
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        state["truncation"] = state["padding"] = None  # what the last call left there
    else:
        state = [
            type(tokenizer).__name__,
            sorted(tokenizer.get_vocab().items()),
            {key: str(value) for key, value in tokenizer.special_tokens_map.items()},
        ]
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _identity(file: Path, folder: Path) -> dict[str, str | int]:
    """Returns what tells a source file from a changed one."""
    status = file.stat()
    identity: dict[str, str | int] = {
        "name": file.relative_to(folder).as_posix(),
        "bytes": status.st_size,
    }
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        if status.st_size <= HASHED_WHOLE_BYTES:
            while block := stream.read(1 << 20):
                digest.update(block)
        else:
            digest.update(stream.read(_END_BYTES))
            stream.seek(-_END_BYTES, 2)
            digest.update(stream.read())
            identity["changed_ns"] = status.st_mtime_ns
    return {**identity, "sha256": digest.hexdigest()}


def _holds(out_dir: Path, fingerprint: str, quarantine: Path | None) -> bool:
    """Returns whether `out_dir` is the corpus of this fingerprint, complete.

    One that was made without bad lines is none for a caller who did not allow that.
    """
    if not (out_dir / MANIFEST).is_file():
        return False
    try:
        corpus = open_corpus(out_dir)
        allowed = quarantine is not None or corpus.num_lines_put_aside == 0
        return allowed and corpus.fingerprint == fingerprint
    except CorpusError as error:
        logger.warning("%s", error)
        return False


def _say_what_was_found(raw: RawCorpus, corpus: Corpus, quarantine: Path | None) -> None:
    """Logs, once per build, what the sources lack or hold that a user may not expect."""
    said = describe_oddities(corpus.manifest["oddities"])
    said += [f"  no filter file for {s}" for s in raw.splits if s not in raw.filter_files]
    if "test" not in raw.splits:
        said.append("  no test set")
    if corpus.manifest["text"] == "title" and not raw.has_content:
        said.append("  corpus.text: title has no effect, the source has one text per record")
    if corpus.num_lines_put_aside:
        said += [*corpus.describe_put_aside(), f"    they are in {quarantine}"]
    if said:
        logger.warning("%s:\n%s", corpus.name, "\n".join(said))


def _build_beside(
    out_dir: Path,
    raw: RawCorpus,
    tokenizer: Any,
    manifest: dict[str, Any],
    show_progress: bool,
    quarantine: Path | None,
) -> None:
    """Builds the corpus in a hidden sibling folder and renames it to `out_dir` when whole.

    Call it under the lock of `out_dir`: whatever lies in the sibling folder is a killed run's.
    """
    if out_dir.exists() and not (out_dir / MANIFEST).is_file() and any(out_dir.iterdir()):
        raise CorpusError(
            f"{out_dir}: holds files but no prepared corpus; an empty or new folder was needed. "
            "Name another one."
        )
    building, old = (out_dir.with_name(f".{out_dir.name}.{end}") for end in ("building", "old"))
    for leftover in (building, old):
        shutil.rmtree(leftover, ignore_errors=True)
    building.mkdir()
    try:
        opened: AbstractContextManager[Quarantine | None] = (
            nullcontext() if quarantine is None else Quarantine(quarantine)
        )
        with opened as lines:
            build(building, raw, tokenizer, manifest, show_progress, lines)
        if out_dir.exists():
            logger.warning("%s was prepared from other sources or settings; replaced", out_dir)
            out_dir.rename(old)
        building.rename(out_dir)
    except LineError as fault:
        raise CorpusError(
            f"{fault} To leave such lines out, name a file for them: `--quarantine FILE`, or "
            "corpus.quarantine in a recipe."
        ) from None
    finally:
        shutil.rmtree(building, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
