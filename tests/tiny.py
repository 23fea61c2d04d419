"""A tiny encoder and corpus on disk, and recipes over them; nothing is downloaded."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from data.raw_corpora import WORDS, random_content, save_tokenizer, write_renee
from transformers import BertConfig, BertModel

DS_CONFIG = {
    "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
    "gradient_clipping": 1.0,
}


def bert_config(**settings: float) -> BertConfig:
    """Returns a BERT of width 16 over `WORDS`, of two layers unless `settings` say otherwise."""
    return BertConfig(
        vocab_size=len(WORDS) + 4,
        hidden_size=16,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        pad_token_id=0,
        **{"num_hidden_layers": 2, **settings},
    )


def make_encoder(folder: Path, **settings: float) -> str:
    """Saves the BERT of `bert_config` with its tokenizer; returns its folder."""
    save_tokenizer(folder)
    torch.manual_seed(0)
    BertModel(bert_config(**settings), add_pooling_layer=False).save_pretrained(folder)
    return str(folder)


def make_raw_corpus(folder: Path, **sizes: int) -> str:
    """Writes a raw corpus with a few text-less labels and filter pairs; returns its folder."""
    write_renee(folder, random_content(**{"num_train": 90, "num_labels": 60, **sizes}))
    return str(folder)


def make_inputs(folder: Path, **encoder: float) -> Path:
    """Makes encoder, corpus and ds_config under `folder`; returns `folder`."""
    make_encoder(folder / "encoder", **encoder)
    make_raw_corpus(folder / "raw")
    (folder / "ds_config.json").write_text(json.dumps(DS_CONFIG))
    return folder


def recipe_text(folder: Path, **sections: dict) -> str:
    """Returns a recipe (JSON is YAML) over `make_inputs(folder)`; `sections` override keys."""
    content = {
        "corpus": {
            "path": str(folder / "raw"),
            "prepared_dir": str(folder / "prepared"),
            "validation_fraction": 0.1,
        },
        "encoder": {"name": str(folder / "encoder"), "max_length": 8},
        "model": {"head_dropout": 0.0, "row_dropout": 0.0},
        "pool": {"size": 24, "num_positives": 2, "num_hard_negatives": 2},
        "classifier": {"format": "fp32"},  # what agrees to rounding, stochastic rounding need not
        "optimizer": {"encoder_lr": 1e-3, "head_lr": 2e-3, "row_lr": 1e-2},
        "mining": {"every_epochs": 0, "shortlist_size": 6},
        "train": {"batch_size": 12, "epochs": 3, "encoder_chunk": 8},
    }
    for section, values in sections.items():
        content[section] = {**content.get(section, {}), **values}
    return json.dumps(content)


def write_recipe_file(folder: Path, name: str = "recipe.yaml", **sections: dict) -> Path:
    """Writes `recipe_text` to a file."""
    path = folder / name
    path.write_text(recipe_text(folder, **sections))
    return path
