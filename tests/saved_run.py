"""A run directory as training leaves it, with fresh weights: real files, no steps."""

from __future__ import annotations

from pathlib import Path

import torch
from tiny import write_recipe_file

from unidec_ds import checkpoint
from unidec_ds.assembly import build_model
from unidec_ds.classifier.storage import Placement
from unidec_ds.classifier.table import ClassifierTable
from unidec_ds.config import load_recipe
from unidec_ds.data.prepare import resolve_corpus
from unidec_ds.ds_config import load_ds_config
from unidec_ds.run import write_run


def save_run(inputs: Path, name: str = "run", *, step: int = 1, seed: int = 0, **sections) -> Path:
    """Writes a run over `tiny.make_inputs(inputs)` with a checkpoint at `step`; returns its folder.

    `seed` keys the weights. A second call with the same name adds a checkpoint.
    """
    run = inputs / name
    sections = {"classifier": {"kernel": "torch"}, **sections}
    sections["train"] = {"seed": seed, **sections.get("train", {})}
    recipe = load_recipe(str(write_recipe_file(inputs, f"{name}.yaml", **sections)))
    corpus = resolve_corpus(
        recipe.corpus, recipe.encoder.name, recipe.encoder.max_length, show_progress=False
    )
    model = build_model(recipe, torch.device("cpu"))
    table = ClassifierTable(
        num_labels=corpus.num_labels,
        width=model.width,
        rank=0,
        world_size=1,
        config=recipe.classifier,
        placement=Placement(kind="cpu"),
        device=torch.device("cpu"),
        seed=seed,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.0,
    )
    write_run(run, recipe, load_ds_config(inputs / "ds_config.json", batch_size=12, world_size=1))
    details = {"corpus_fingerprint": corpus.fingerprint, "total_steps": 21}
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    checkpoint.Save(run, step, tensors, table, keep=2, details=details).finish()
    return run
