"""Writes a run's encoder with its heads as a folder that sentence-transformers loads.

    FOLDER/
        config.json  model*.safetensors        the encoder, as `transformers` saves it
        tokenizer.json ...                     its tokenizer, likewise
        sentence_bert_config.json              where texts are cut
        modules.json                           the modules below, in their order
        config_sentence_transformers.json      how vectors are compared
        1_Pooling/config.json                  mean over the tokens
        2_Dense/{config.json,model.safetensors}    the head or heads, in fp32; left out where it is
                                               exactly the identity

The modules in their order: encoder, pooling, head, division by the length.

    de          g1, with its tanh if it has one; unit vectors
    classifier  g2; unit vectors
    unified     the outputs [g1; g2] as the linear layers leave them. Each half has a norm of its
                own, for which sentence-transformers has no module: `evaluation`'s query vector is
                made of them outside (tanh of the first half if g1 has one; both to unit length)

The few files that sentence-transformers adds are written here and not by it. They have the same
content since its version 2, under class paths that every version since resolves; a newer release
writes paths that older ones do not know. Nobody who exports has to install it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from unidec_ds.encoders import EncoderConfig, load_tokenizer, load_unused_pooler
from unidec_ds.evaluation import SearchView
from unidec_ds.model import UniDEC

_ACTIVATIONS = {
    "tanh": "torch.nn.modules.activation.Tanh",
    "none": "torch.nn.modules.linear.Identity",
}


def write_sentence_encoder(
    model: UniDEC, config: EncoderConfig, folder: Path, view: SearchView
) -> None:
    """Writes encoder, pooling and the head or heads of `view` into `folder`.

    Args:
        model: as loaded from a run.
        config: its encoder, whose tokenizer and length go along.
        folder: made if it is not there; should hold nothing.
        view: which vectors the folder is to yield; see the module's docstring.
    """
    activation = model.config.de_activation if view == "de" else "none"
    weight, bias = _heads(model, view)
    modules = ["Transformer", "Pooling", "Dense", "Normalize"]
    if activation == "none" and _is_identity(weight, bias):
        modules.remove("Dense")
    if view == "unified":
        modules.remove("Normalize")
    paths = {name: f"{number}_{name}" if number else "" for number, name in enumerate(modules)}

    folder.mkdir(exist_ok=True)
    _write_encoder(model.encoder, config, folder)
    (folder / paths["Pooling"]).mkdir()
    _write_json(folder / paths["Pooling"] / "config.json", _pooling(weight.shape[1]))
    if "Dense" in modules:
        (folder / paths["Dense"]).mkdir()
        _write_dense(folder / paths["Dense"], weight, bias, activation)
    types = {name: f"sentence_transformers.models.{name}" for name in modules}
    listed = [
        {"idx": number, "name": str(number), "path": paths[name], "type": types[name]}
        for number, name in enumerate(modules)
    ]
    _write_json(folder / "modules.json", listed)
    length = {"max_seq_length": config.max_length, "do_lower_case": False}
    _write_json(folder / "sentence_bert_config.json", length)
    similarity = "dot" if view == "unified" else "cosine"
    compared: dict[str, object] = {
        "prompts": {},
        "default_prompt_name": None,
        "similarity_fn_name": similarity,
    }
    _write_json(folder / "config_sentence_transformers.json", compared)


def _write_encoder(encoder: Any, config: EncoderConfig, folder: Path) -> None:
    tensors = {**encoder.state_dict(), **load_unused_pooler(config.name)}
    tokenizer = load_tokenizer(config.name)
    tokenizer.padding_side = "right"  # as in training
    with _quiet_transformers():
        encoder.save_pretrained(folder, state_dict=tensors)
        tokenizer.save_pretrained(folder)


def _heads(model: UniDEC, view: SearchView) -> tuple[Tensor, Tensor]:
    """Returns weight and bias of the linear layer whose output `view` needs, fp32 on the host."""
    heads: list[nn.Linear] = []
    if view != "classifier":
        heads.append(model.de_head)
    if view != "de":
        heads.append(model.classifier_head)
    weight = torch.cat([head.weight.detach().float().cpu() for head in heads])
    return weight, torch.cat([head.bias.detach().float().cpu() for head in heads])


def _is_identity(weight: Tensor, bias: Tensor) -> bool:
    out_features, in_features = weight.shape
    square = out_features == in_features
    return square and torch.equal(weight, torch.eye(in_features)) and not bool(bias.any())


def _pooling(width: int) -> dict[str, object]:
    modes = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens")
    chosen = {f"pooling_mode_{mode}": mode == "mean_tokens" for mode in modes}
    return {"word_embedding_dimension": width, **chosen}


def _write_dense(folder: Path, weight: Tensor, bias: Tensor, activation: str) -> None:
    config = {
        "in_features": weight.shape[1],
        "out_features": weight.shape[0],
        "bias": True,
        "activation_function": _ACTIVATIONS[activation],
    }
    _write_json(folder / "config.json", config)
    save_file({"linear.weight": weight, "linear.bias": bias}, folder / "model.safetensors")


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Keeps a bar for one small file off the screen."""
    from transformers.utils import logging

    had_bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if had_bars:
            logging.enable_progress_bar()
