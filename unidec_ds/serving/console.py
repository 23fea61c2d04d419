"""`unidec-ds predict`: answers the lines of a file, of standard input, or of a person.

Files of any length stream through in batches; answers go out batch by batch.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from tqdm import tqdm

from unidec_ds.data.files import count_records, read_lines
from unidec_ds.errors import UserError

if TYPE_CHECKING:  # torch is not needed to refuse a file
    from unidec_ds.serving.predict import Label, Predictor

STANDARD_INPUT = "-"


def check_files(source: str | None, output: Path | None, overwrite: bool) -> None:
    """Checks what can be known before a model is loaded.

    Raises:
        UserError: the input is not there, or the output is and may not be overwritten.
    """
    if source is None and not sys.stdin.isatty():
        raise UserError(
            "--input: missing, and standard input is no terminal to ask at; give a file, or - to "
            "read standard input"
        )
    if source not in (None, STANDARD_INPUT):
        try:
            with open(source, "rb"):
                pass
        except OSError as error:
            raise UserError(f"--input: {source} cannot be read: {error.strerror}") from error
    if output is None:
        return
    if source is None:
        raise UserError("--output: without --input there is a conversation, which is not saved")
    if not output.parent.is_dir():
        raise UserError(f"--output: there is no folder {output.parent}")
    if output.is_dir():
        raise UserError(f"--output: {output} is a folder; needs a file")
    if output.is_file() and not overwrite:
        raise UserError(f"--output: {output} is there already; add --overwrite to replace it")


def answer_lines(
    predictor: Predictor,
    source: str,
    output: Path | None,
    *,
    k: int,
    batch_size: int,
    as_json: bool,
) -> None:
    """Writes the labels of each line of a file or of standard input, in order.

    Memory: one batch. A file as output is there when it is whole, or not at all.

    Args:
        predictor: what answers.
        source: a UTF-8 file, gzipped if its name says so, or "-".
        output: a file, or None for standard output.
        k: labels per line.
        batch_size: lines answered at once; 1 answers each as it comes.
        as_json: one JSON object a line, instead of text for people.

    Raises:
        UserError: a line is not UTF-8.
        BrokenPipeError: the reader of standard output has gone.
    """
    path = Path("/dev/stdin" if source == STANDARD_INPUT else source)
    lines = (text for _, text in read_lines(path))
    total = count_records(path) if path.is_file() else None
    # A bar among the answers would spoil both.
    is_hidden = True if output is None and sys.stdout.isatty() else None
    with (
        _opened(output) as stream,
        tqdm(total=total, desc="predicting", unit=" texts", disable=is_hidden) as bar,
    ):
        while texts := list(itertools.islice(lines, batch_size)):
            for text, labels in zip(
                texts, predictor.predict(texts, k, batch_size=batch_size), strict=True
            ):
                stream.write(_as_json(text, labels) if as_json else f"{text}\n{_as_text(labels)}")
            stream.flush()
            bar.update(len(texts))


def converse(predictor: Predictor, *, k: int) -> None:
    """Asks for texts at the terminal and shows their labels, until Ctrl-D."""
    with contextlib.suppress(ImportError):  # a Python built without it
        import readline  # noqa: F401 - gives `input` its line editing
    print(predictor.describe())
    print("One text a line; Ctrl-D ends.")
    while True:
        try:
            text = input("> ")
        except EOFError:
            print()
            return
        try:
            (labels,) = predictor.predict([text], k)
        except UserError as error:
            print(error)
        else:
            print(_as_text(labels), end="")


def _as_json(text: str, labels: list[Label]) -> str:
    content = {"text": text, "labels": [label._asdict() for label in labels]}
    return json.dumps(content, ensure_ascii=False) + "\n"


def _as_text(labels: list[Label]) -> str:
    return "".join(f"  {label.score:6.3f}  {label.uid}  {label.text}\n" for label in labels)


@contextlib.contextmanager
def _opened(output: Path | None) -> Iterator[TextIO]:
    """Opens the output; a regular file is written beside and put in place when it is whole."""
    if output is None:
        yield sys.stdout
        return
    beside = output.with_name(output.name + ".new")
    if output.exists() and not output.is_file():  # a device or a pipe
        beside = output
    try:
        with beside.open("w", encoding="utf-8") as stream:
            yield stream
    except BaseException:
        if beside != output:
            beside.unlink(missing_ok=True)
        raise
    if beside != output:
        beside.replace(output)
