"""One small corpus as plain Python, and its writers in every layout that is accepted."""

import gzip
import json
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import scipy.sparse
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

TEXT = "red green blue small large old new car boat house tree paper made of the café 東京"
WORDS = TEXT.split()


@dataclass
class Content:
    """What a raw corpus says: texts, target rows and filter pairs."""

    labels: list[str]
    queries: dict[str, list[str]]
    targets: dict[str, list[list[int]]]
    filters: dict[str, list[tuple[int, int]]] = field(default_factory=dict)


def random_content(seed: int = 0, num_train: int = 40, num_test: int = 11, num_labels: int = 23):
    """Texts of 1 to 9 words; some queries without targets, some labels without text."""
    rng = np.random.default_rng(seed)

    def texts(count):
        return [" ".join(rng.choice(WORDS, rng.integers(1, 10))) for _ in range(count)]

    def targets(count):
        return [
            rng.integers(0, num_labels, rng.integers(0 if i % 5 == 2 else 1, 5)).tolist()
            for i in range(count)
        ]

    labels = texts(num_labels)
    labels[3] = labels[11] = ""
    sizes = {"train": num_train, "test": num_test}
    return Content(
        labels,
        {split: texts(n) for split, n in sizes.items()},
        {split: targets(n) for split, n in sizes.items()},
        {
            split: [(int(q), int(rng.integers(num_labels))) for q in rng.integers(0, n, 6)]
            for split, n in sizes.items()
        },
    )


def write(path: Path, lines: list[str], gz: bool) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = "".join(line + "\n" for line in lines).encode()
    if gz:
        path = path.with_name(path.name + ".gz")
        data = gzip.compress(data)
    path.write_bytes(data)


def write_filters(folder: Path, content: Content, gz: bool, pattern: str) -> None:
    for split, pairs in content.filters.items():
        name = pattern.format(split=split, short=SHORT[split])
        write(folder / name, [f"{row} {column}" for row, column in pairs], gz)


SHORT = {"train": "trn", "test": "tst"}


def write_xmc(folder: Path, content: Content, gz: bool = False) -> None:
    """The first word is the title, the others are the content."""

    def record(uid, text, **more):
        title, _, rest = text.partition(" ")
        return json.dumps({"uid": uid, "title": title, "content": rest, **more})

    labels = [record(str(i), text) for i, text in enumerate(content.labels)]
    write(folder / "lbl.json", labels, gz)
    for split, texts in content.queries.items():
        rows = [
            record(str(i), text, target_ind=targets, target_rel=[1.0] * len(targets))
            for i, (text, targets) in enumerate(zip(texts, content.targets[split], strict=True))
        ]
        write(folder / f"{SHORT[split]}.json", rows, gz)
    write_filters(folder, content, False, "filter_labels_{split}.txt")


def write_renee(folder: Path, content: Content, gz: bool = False) -> None:
    write(folder / "Y.txt", content.labels, gz)
    for split, texts in content.queries.items():
        write(folder / f"{SHORT[split]}_X.txt", texts, gz)
        rows = [" ".join(f"{t}:1.0" for t in targets) for targets in content.targets[split]]
        header = f"{len(texts)} {len(content.labels)}"
        write(folder / f"{SHORT[split]}_X_Y.txt", [header, *rows], gz)
    write_filters(folder, content, gz, "{short}_filter_labels.txt")


def write_dexml(folder: Path, content: Content, gz: bool = False) -> None:
    write(folder / "raw" / "Y.txt", content.labels, gz)
    for split, texts in content.queries.items():
        write(folder / "raw" / f"{SHORT[split]}_X.txt", texts, gz)
        matrix = csr(content.targets[split], len(content.labels))
        scipy.sparse.save_npz(folder / f"Y.{SHORT[split]}.npz", matrix, compressed=gz)
    write_filters(folder, content, gz, "filter_labels_{split}.txt")


def csr(targets: list[list[int]], num_labels: int) -> scipy.sparse.csr_matrix:
    indptr = np.cumsum([0, *map(len, targets)])
    indices = np.array([t for row in targets for t in row], np.int32)
    shape = (len(targets), num_labels)
    return scipy.sparse.csr_matrix((np.ones(len(indices), np.float32), indices, indptr), shape)


def tables(content: Content, key=str) -> dict[str, list[dict]]:
    """The rows of the user's own tables; label ids are `key(row)`."""
    queries = {
        split: [
            {"id": str(i), "text": text, "labels": [key(t) for t in targets]}
            for i, (text, targets) in enumerate(zip(texts, content.targets[split], strict=True))
        ]
        for split, texts in content.queries.items()
    }
    return {
        "labels": [{"id": key(i), "text": t or None} for i, t in enumerate(content.labels)],
        "queries": queries["train"],
        "queries_test": queries["test"],
    }


def write_jsonl(folder: Path, content: Content, gz: bool = False) -> None:
    for name, rows in tables(content, key=int).items():
        write(folder / f"{name}.jsonl", [json.dumps(row) for row in rows], gz)
    write_filters(folder, content, False, "filter_labels_{split}.txt")


def write_parquet(folder: Path, content: Content, gz: bool = False) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in tables(content).items():
        pa.parquet.write_table(pa.Table.from_pylist(rows), folder / f"{name}.parquet")
    write_filters(folder, content, gz, "filter_labels_{split}.txt")


def write_dataset(folder: Path, content: Content, gz: bool = False) -> None:
    data = {name: datasets.Dataset.from_list(rows) for name, rows in tables(content).items()}
    datasets.DatasetDict(data).save_to_disk(str(folder))
    write_filters(folder, content, gz, "filter_labels_{split}.txt")


WRITERS = {
    "xmc": write_xmc,
    "renee": write_renee,
    "dexml": write_dexml,
    "jsonl": write_jsonl,
    "parquet": write_parquet,
    "dataset": write_dataset,
}


def save_tokenizer(folder: Path, words: list[str] = WORDS) -> str:
    """Saves a word-level tokenizer with [CLS] and [SEP]; returns its folder's name."""
    vocab = {w: i for i, w in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
    )
    fast.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "bert"}))
    return str(folder)


def oracle_tokens(text: str, max_length: int, words: list[str] = WORDS) -> list[int]:
    """The tokens of `save_tokenizer`'s tokenizer, the obvious way."""
    vocab = {w: i for i, w in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words])}
    words_in_text = text.lower().split()[: max_length - 2]
    return [2, *(vocab.get(word, 1) for word in words_in_text), 3]
