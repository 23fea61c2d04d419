"""Texts per second of the packaged encoder, forward and backward, by how it runs.

    python scripts/bench/encoder.py [--quick] [--json FILE] [--results DIR]

Label texts of LF-WordNet-84K, sorted by length and cut into chunks as the trainer cuts them. Per
attention (`encoder.attention`), dtype and chunk (`train.encoder_chunk`): forward, mean pooling and
backward of every chunk, one after the other, so that the activations of one chunk are alive.

- fp32: weights and arithmetic; what `ds_configs/cpu.json` gives.
- bf16: weights and arithmetic; what `ds_configs/cpu_bf16.json` gives.
- autocast: fp32 weights, matrix products in bf16 (no ds_config gives this).

All ways take turns on the same texts, in a new order every round; the table has each way's median.
"""

from __future__ import annotations

import itertools
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import results
import torch

from unidec_ds.batch import make_chunks
from unidec_ds.data.corpus import RaggedTokens
from unidec_ds.data.prepare import embedded_corpora, prepare
from unidec_ds.encoders import PACKAGED_ENCODER, EncoderConfig, load_encoder
from unidec_ds.model import ModelConfig, UniDEC

CORPUS, MAX_LENGTH = "lf-wordnet-84k", 32
ATTENTIONS, DTYPES, CHUNKS = ("eager", "sdpa"), ("fp32", "bf16", "autocast"), (32, 64, 128, 256)
CPU = torch.device("cpu")


def label_tokens(count: int, work: Path) -> tuple[RaggedTokens, int]:
    """Returns the tokens of `count` random label texts, and the padding's token."""
    corpus = prepare(
        embedded_corpora()[CORPUS],
        encoder=PACKAGED_ENCODER,
        max_length=MAX_LENGTH,
        prepared_dir=work,
        show_progress=False,
    )
    chosen = np.random.default_rng(0).choice(corpus.num_labels, count, replace=False)
    return corpus.labels.tokens(chosen), corpus.pad_token_id


def new_model(attention: str, dtype: str) -> UniDEC:
    """Returns the encoder in one attention and the dtype of its weights."""
    config = EncoderConfig.model_validate({"attention": attention})
    encoder = load_encoder(config, CPU)
    model = UniDEC(encoder, int(encoder.config.hidden_size), ModelConfig())  # type: ignore[union-attr, arg-type]
    return model.to(torch.bfloat16) if dtype == "bf16" else model


def one_turn(
    model: UniDEC, texts: RaggedTokens, pad_token_id: int, dtype: str, chunk: int
) -> float:
    """Returns the seconds that all texts take."""
    chunks, _ = make_chunks(texts, chunk, pad_token_id)
    model.zero_grad(set_to_none=True)
    start = time.perf_counter()
    for part in chunks:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "autocast"):
            pooled = model.pool(part)
        pooled.backward(torch.full_like(pooled, 1e-3))
    return time.perf_counter() - start


def main() -> None:
    """Takes the turns and writes what was asked for."""
    parser = results.parser(__doc__, quick="128 texts, chunks of 64 and 128, one round")
    parser.add_argument("--texts", type=int, default=1024, help="a turn (default: 1,024)")
    parser.add_argument("--rounds", type=int, default=4, help="default: 4")
    parser.add_argument("--attention", nargs="+", choices=ATTENTIONS, default=ATTENTIONS)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--chunk", type=int, nargs="+", default=CHUNKS)
    parser.add_argument("--work", type=Path, help="keep the prepared corpus here")
    args = parser.parse_args()
    num_texts, rounds = (128, 1) if args.quick else (args.texts, args.rounds)
    chunks = (64, 128) if args.quick else args.chunk
    with tempfile.TemporaryDirectory(prefix="encoder_") as temporary:
        texts, pad_token_id = label_tokens(num_texts, args.work or Path(temporary))
    models = {key: new_model(*key) for key in itertools.product(args.attention, args.dtype)}
    ways = [(*key, chunk) for key in models for chunk in chunks]
    seconds: dict[tuple[str, str, int], list[float]] = {way: [] for way in ways}
    rng = np.random.default_rng(0)
    for number in range(rounds + 1):  # the first counts not: kernels choose their ways
        for place in rng.permutation(len(ways)):
            attention, dtype, chunk = way = ways[place]
            taken = one_turn(models[attention, dtype], texts, pad_token_id, dtype, chunk)
            if number:
                seconds[way].append(taken)
        print(f"round {number} of {rounds}", file=sys.stderr, flush=True)
    figures: list[dict[str, Any]] = [
        {
            "attention": attention,
            "dtype": dtype,
            "chunk": chunk,
            "texts": num_texts,
            "texts_per_s": num_texts / median(taken),
            "most_texts_per_s": num_texts / min(taken),
        }
        for (attention, dtype, chunk), taken in seconds.items()
    ]
    of = {(f["attention"], f["dtype"], f["chunk"]): f for f in figures}
    rows = [
        [*key, *(f"{of[(*key, chunk)]['texts_per_s']:,.0f}" for chunk in chunks)] for key in models
    ]
    columns = ["attention", "dtype", *(f"chunk {chunk}" for chunk in chunks)]
    mean_tokens = float(np.diff(texts.offsets).mean())
    body = "\n".join(
        [
            f"Texts a second, forward and backward; {num_texts:,} label texts of {mean_tokens:.1f} "
            "tokens. What the ways are: `scripts/bench/encoder.py`.",
            "",
            results.table(columns, rows, texts=2),
        ]
    )
    results.publish("encoder", args, figures, title="The packaged encoder's speed", body=body)


if __name__ == "__main__":
    main()
