"""Makes an untrained two-layer BERT, with a WordPiece vocabulary of a raw corpus's labels.

    python scripts/make_tiny_encoder.py RAW_DIR --out DIR [--width 64] [--words 30000]

For measuring everything that is not the encoder, and for tests: it loads like any encoder
(`encoder.name: DIR`) and costs next to nothing. The vocabulary is the most frequent words of the
label texts, and single characters as pieces, so that other words are spelled, not lost.
"""

from __future__ import annotations

import argparse
import string
import sys
from collections import Counter
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from unidec_ds.data.formats import recognise
from unidec_ds.errors import UserError
from unidec_ds.exits import exit_with_message

SPECIAL = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
MAX_TOKENS = 128
HEAD_WIDTH = 32


def make_encoder(raw_dir: Path, folder: Path, *, width: int, num_words: int, seed: int = 0) -> None:
    """Saves the model and its tokenizer.

    Args:
        raw_dir: a raw corpus in any layout; its label texts are read once.
        folder: where; made if it is not there.
        width: of the hidden states, a multiple of 32; the model has two layers.
        num_words: words in the vocabulary, at most.
        seed: of the weights.

    Raises:
        CorpusError: `raw_dir` is no corpus.
        UserError: `folder` is not empty, or the width is no multiple of 32.
    """
    if width <= 0 or width % HEAD_WIDTH:
        raise UserError(f"--width: {width}, needed a multiple of {HEAD_WIDTH}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--out: {folder} is not empty; name a new or an empty folder")
    tokenizer = make_tokenizer(raw_dir, num_words)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        num_hidden_layers=2,
        num_attention_heads=width // HEAD_WIDTH,
        intermediate_size=2 * width,
        max_position_embeddings=MAX_TOKENS,
        pad_token_id=tokenizer.pad_token_id,
    )
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)


def make_tokenizer(raw_dir: Path, num_words: int) -> PreTrainedTokenizerFast:
    """Returns a lower-casing WordPiece tokenizer of the corpus's label texts."""
    normalizer = normalizers.BertNormalizer(lowercase=True)
    splitter = pre_tokenizers.BertPreTokenizer()
    counts: Counter[str] = Counter()
    for record in recognise(raw_dir).labels():
        text = normalizer.normalize_str(f"{record.title} {record.content}")
        if text.replace(" ", "").isalnum():  # nothing to split at but spaces
            counts.update(text.split())
        else:
            counts.update(word for word, _ in splitter.pre_tokenize_str(text))
    characters = sorted({*string.ascii_lowercase, *string.digits, *"".join(counts)})
    words = [word for word, _ in counts.most_common(num_words)]
    pieces = [*SPECIAL.values(), *words, *characters, *("##" + c for c in characters)]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}

    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token=SPECIAL["unk_token"]))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, splitter
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        special_tokens=[(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=MAX_TOKENS, **SPECIAL
    )


def main() -> None:
    """Makes the encoder that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("raw_dir", type=Path, help="a raw corpus")
    parser.add_argument("--out", required=True, type=Path, help="a new or an empty folder")
    parser.add_argument("--width", type=int, default=64, help="a multiple of 32 (default: 64)")
    parser.add_argument("--words", type=int, default=30_000, help="at most (default: 30,000)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    make_encoder(args.raw_dir, args.out, width=args.width, num_words=args.words, seed=args.seed)


if __name__ == "__main__":
    sys.exit(exit_with_message(main))
