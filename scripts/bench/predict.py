"""Times answering queries: exact search, IVF and HNSW over many labels, and texts end to end.

    python scripts/bench/predict.py [--quick] [--json FILE]

Search: L unit vectors of width 384 around 4,096 centres, queries alike. Ways: `exact`, this
package's `exact_search`; `flat`, FAISS's own exact index; `ivf` and `hnsw` with their default
settings. HNSW is left out above 200,000 labels, where building takes too long for a benchmark.
Every round times one batch of 256 queries of each way, one after the other, then single queries;
medians are reported, so only ratios within a line's L count. Recall is of exact search's 10 best.
How good it is depends on the vectors: a run measures it for its own when it builds an index.

End to end: texts of the packaged corpus of 9,412 labels through the packaged encoder of 22M
parameters, with fresh heads and rows, by `Predictor.predict`: tokens, encoder, search, names.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import faiss
import numpy as np
import results
import torch
from torch import Tensor
from torch.nn.functional import normalize

import unidec_ds
from unidec_ds import checkpoint
from unidec_ds.assembly import build_model
from unidec_ds.classifier.storage import Placement
from unidec_ds.classifier.table import ClassifierTable
from unidec_ds.config import load_recipe, write_recipe
from unidec_ds.data.prepare import resolve_corpus
from unidec_ds.index import IndexConfig, build_index, recall
from unidec_ds.search import exact_search

WIDTH, K, BATCH = 384, 10, 256
HNSW_UP_TO = 200_000
ANSWERS = Callable[[Tensor], Tensor]


def clustered(num_vectors: int, seed: int) -> Tensor:
    """Returns unit vectors around 4,096 shared centres."""
    centres = normalize(torch.randn(4096, WIDTH, generator=torch.Generator().manual_seed(0)))
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.empty(num_vectors, WIDTH)
    for block in vectors.split(65_536):
        which = torch.randint(len(centres), (len(block),), generator=generator)
        spread = normalize(torch.randn(len(block), WIDTH, generator=generator))
        torch.add(centres[which], spread, out=block)
        torch.nn.functional.normalize(block, out=block)
    return vectors


def time_search(num_labels: int, rounds: int, singles: int) -> list[dict[str, float | str]]:
    """Returns one row per way of searching `num_labels` labels."""
    labels_LV = clustered(num_labels, seed=1)
    queries_QV = clustered(BATCH * rounds, seed=2)
    vectors = labels_LV.numpy()
    flat = faiss.IndexFlatIP(WIDTH)
    flat.add(vectors)
    ways: dict[str, ANSWERS] = {
        "exact": lambda queries: exact_search(queries, labels_LV, K)[1],
        "flat": lambda queries: torch.from_numpy(flat.search(queries.numpy(), K)[1]),
    }
    build_s = dict.fromkeys(ways, 0.0)
    for kind in ("ivf", "hnsw"):
        if kind == "hnsw" and num_labels > HNSW_UP_TO:
            continue
        start_s = time.perf_counter()
        index = build_index(vectors, kind, IndexConfig(), show_progress=False)
        build_s[kind] = time.perf_counter() - start_s
        ways[kind] = lambda queries, index=index: index.search(queries, K, vectors)[1]
    found, batch_s, single_s = time_ways(ways, queries_QV, rounds, singles)
    exact_ids = torch.cat(found["exact"])
    return [
        {
            "labels": num_labels,
            "way": way,
            "build_s": build_s[way],
            "queries_per_s": BATCH / statistics.median(batch_s[way]),
            "p50_ms": 1e3 * float(np.percentile(single_s[way], 50)),
            "p95_ms": 1e3 * float(np.percentile(single_s[way], 95)),
            "batch / exact": statistics.median(batch_s["exact"]) / statistics.median(batch_s[way]),
            f"recall@{K}": recall(torch.cat(found[way]), exact_ids),
        }
        for way in ways
    ]


def time_ways(
    ways: dict[str, ANSWERS], queries_QV: Tensor, rounds: int, singles: int
) -> tuple[dict[str, list[Tensor]], dict[str, list[float]], dict[str, list[float]]]:
    """Returns what each way found, its seconds per batch and its seconds per single query."""
    found: dict[str, list[Tensor]] = {way: [] for way in ways}
    batch_s: dict[str, list[float]] = {way: [] for way in ways}
    single_s: dict[str, list[float]] = {way: [] for way in ways}
    for batch in queries_QV.split(BATCH)[:rounds]:
        for way, answer in ways.items():
            start_s = time.perf_counter()
            found[way].append(answer(batch))
            batch_s[way].append(time.perf_counter() - start_s)
    for query in queries_QV[:singles].split(1):
        for way, answer in ways.items():
            start_s = time.perf_counter()
            answer(query)
            single_s[way].append(time.perf_counter() - start_s)
    return found, batch_s, single_s


def save_fresh_run(folder: Path) -> Path:
    """Writes a run of the quick start's settings with the weights that training starts from."""
    recipe = load_recipe("quickstart", [f"corpus.prepared_dir={folder / 'prepared'}"])
    corpus = resolve_corpus(recipe.corpus, recipe.encoder.name, recipe.encoder.max_length)
    model = build_model(recipe, torch.device("cpu"))
    table = ClassifierTable(
        num_labels=corpus.num_labels,
        width=model.width,
        rank=0,
        world_size=1,
        config=recipe.classifier.model_copy(update={"kernel": "torch"}),
        placement=Placement(kind="cpu"),
        device=torch.device("cpu"),
        seed=0,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.0,
    )
    run = folder / "run"
    run.mkdir()
    write_recipe(recipe, run / "config.yaml")
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    details = {"corpus_fingerprint": corpus.fingerprint, "total_steps": 1}
    checkpoint.Save(run, 0, tensors, table, keep=1, details=details).finish()
    return run


def time_texts(run: Path, num_texts: int, singles: int) -> list[dict[str, float | str]]:
    """Returns one row per index: texts a second in batches, milliseconds of single texts."""
    start_s = time.perf_counter()
    predictors = {"exact": unidec_ds.load(run, index=IndexConfig(kind="exact"))}
    labels_s = time.perf_counter() - start_s
    for kind in ("ivf", "hnsw"):
        predictors[kind] = unidec_ds.load(run, index=IndexConfig(kind=kind))
    recipe = load_recipe(str(run / "config.yaml"))
    corpus = resolve_corpus(recipe.corpus, recipe.encoder.name, recipe.encoder.max_length)
    texts = corpus.queries["test"].texts(np.arange(num_texts))
    batch_s: dict[str, float] = dict.fromkeys(predictors, 0.0)
    single_s: dict[str, list[float]] = {kind: [] for kind in predictors}
    for first in range(0, num_texts, BATCH):
        for kind, predictor in predictors.items():
            start_s = time.perf_counter()
            predictor.predict(texts[first : first + BATCH], K, batch_size=BATCH)
            batch_s[kind] += time.perf_counter() - start_s
    for text in texts[:singles]:
        for kind, predictor in predictors.items():
            start_s = time.perf_counter()
            predictor.predict([text], K)
            single_s[kind].append(time.perf_counter() - start_s)
    return [
        {
            "index": kind,
            "texts_per_s": num_texts / batch_s[kind],
            "p50_ms": 1e3 * float(np.percentile(single_s[kind], 50)),
            "p95_ms": 1e3 * float(np.percentile(single_s[kind], 95)),
            "first_load_s": labels_s if kind == "exact" else 0.0,
        }
        for kind in predictors
    ]


def rows_table(rows: list[dict[str, float | str]]) -> str:
    """Returns a Markdown table."""
    cells = [
        [f"{x:,.0f}" if isinstance(x, int) else f"{x:.4g}" if isinstance(x, float) else x
         for x in row.values()]
        for row in rows
    ]  # fmt: skip
    return results.table(list(rows[0]), cells)


def main() -> None:
    """Measures both and writes what was asked for."""
    parser = results.parser(__doc__, quick="10,000 and 30,000 labels only")
    parser.add_argument("--labels", type=int, nargs="+", help="numbers of labels to search")
    args = parser.parse_args()
    default = [10_000, 30_000] if args.quick else [10_000, 131_073, 1_305_265]
    searches = []
    for num_labels in args.labels or default:
        rows = time_search(num_labels, rounds=3, singles=50)
        print(rows_table(rows), flush=True)
        searches += rows
    with tempfile.TemporaryDirectory() as folder:
        run = save_fresh_run(Path(folder))
        texts = time_texts(run, 512 if args.quick else 2322, singles=50)
    body = [
        f"What is measured: `scripts/bench/predict.py`. FAISS {faiss.__version__}.",
        "",
        f"## Searching labels, width {WIDTH}, batches of {BATCH} queries, k = {K}",
        "",
        rows_table(searches),
        "",
        "## Texts, from characters to label names, 9,412 labels",
        "",
        rows_table(texts),
    ]
    results.publish(
        "predict",
        args,
        {"searches": searches, "texts": texts},
        title="Answering queries",
        body="\n".join(body),
    )


if __name__ == "__main__":
    main()
