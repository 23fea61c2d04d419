"""From settings to objects: the model and views a recipe stands for, and a saved run read back.

Shared by the trainer and by everything that uses a trained run (evaluate, predict). No training.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from unidec_ds import checkpoint
from unidec_ds.classifier import partition
from unidec_ds.classifier.storage import Placement
from unidec_ds.config import Recipe, load_recipe
from unidec_ds.data.corpus import Corpus, split_validation
from unidec_ds.data.keyed import seed_of
from unidec_ds.data.pairs import Ids
from unidec_ds.data.prepare import resolve_corpus
from unidec_ds.ds_config import DsConfig
from unidec_ds.encoders import load_encoder
from unidec_ds.errors import CheckpointError, UserError
from unidec_ds.evaluation import Evaluation, RowSource, SearchView, evaluate, sample_queries
from unidec_ds.model import UniDEC


def build_model(recipe: Recipe, device: torch.device) -> UniDEC:
    """Returns encoder and heads on `device`, the heads initialised from the seed.

    A head that the objective does not train is frozen.
    """
    encoder = load_encoder(recipe.encoder, device)
    hidden_size = int(encoder.config.hidden_size)  # type: ignore[union-attr, arg-type]
    if recipe.model.head_init == "identity" and recipe.model.width not in (0, hidden_size):
        raise UserError(
            f"model.width: {recipe.model.width} with head_init identity; the encoder is "
            f"{hidden_size} wide: use that width, 0, or head_init xavier"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(recipe.train.seed, "heads"))
        model = UniDEC(encoder, hidden_size, recipe.model)
    model.de_head.requires_grad_(recipe.objective.de != "none")
    model.classifier_head.requires_grad_(recipe.objective.classifier != "none")
    return model.to(device)


def table_placement(ds_config: DsConfig) -> Placement:
    """Returns where the ds_config puts the classifier table."""
    offload = ds_config.offload
    device, nvme_path = offload.get("device", "none"), offload.get("nvme_path")
    return Placement(
        kind="device" if device == "none" else device,
        nvme_path=Path(nvme_path) if device == "nvme" and nvme_path else None,
        pin_memory=bool(offload.get("pin_memory", False)),
    )


def trained_views(recipe: Recipe) -> tuple[SearchView, ...]:
    """Returns the views that the objective trains, the best to use last."""
    views: list[SearchView] = []
    if recipe.objective.de != "none":
        views.append("de")
    if recipe.objective.classifier != "none":
        views.append("classifier")
    return (*views, "unified") if len(views) == 2 else tuple(views)


def evaluate_split(
    model: UniDEC,
    rows: RowSource | None,
    corpus: Corpus,
    recipe: Recipe,
    split: str,
    views: tuple[SearchView, ...],
    title: str = "evaluating",
) -> Evaluation:
    """Evaluates `views` on the "test" or the "validation" queries; every rank must call.

    Raises:
        UserError: the corpus has no test set, or the recipe keeps no validation queries.
    """
    if split == "test":
        if "test" not in corpus.queries:
            raise UserError(f"{corpus.path}: the corpus has no test set; use --split validation")
        query_ids = np.arange(len(corpus.queries["test"]))
    else:
        _, query_ids = split_validation(
            corpus, recipe.corpus.validation_fraction, recipe.train.seed
        )
        if not len(query_ids):
            raise UserError(
                "corpus.validation_fraction: the run kept no validation queries; evaluate on test"
            )
    return evaluate(
        model,
        rows,
        corpus,
        sample_queries(query_ids, recipe.evaluation.max_queries, recipe.train.seed),
        split="test" if split == "test" else "train",
        views=views,
        cosine_classifier=recipe.objective.classifier_logits == "cosine",
        propensity=recipe.evaluation.propensity,
        title=title,
    )


class SavedRows:
    """The classifier rows of a checkpoint, memory-mapped; for use without a process group.

    Args:
        folder: a complete checkpoint, written at any world size.
    """

    def __init__(self, folder: Path) -> None:
        manifest = checkpoint.read_manifest(folder)
        self._world_size = int(manifest["world_size"])
        self._shards = [
            checkpoint.load_tensors(folder, manifest, checkpoint.rows_file(rank, self._world_size))
            for rank in range(self._world_size)
        ]
        self._width = int(manifest["width"])

    def read(self, label_ids: Ids) -> Tensor:
        """Returns the labels' rows, fp32 [n, D]."""
        rows = torch.empty(len(label_ids), self._width)
        owners = partition.owner(label_ids, self._world_size)
        for rank, shard in enumerate(self._shards):
            own = owners == rank
            local = torch.from_numpy(partition.local_row(label_ids[own], self._world_size))
            rows[torch.from_numpy(own)] = shard["rows"][local].float()
        return rows


@dataclass(frozen=True)
class LoadedRun:
    """A trained run, ready to be used."""

    folder: Path
    checkpoint: Path
    recipe: Recipe
    corpus: Corpus
    model: UniDEC
    rows: SavedRows


def load_run(folder: Path, device: torch.device, corpus: Path | None = None) -> LoadedRun:
    """Reads back the newest checkpoint of a run directory.

    Args:
        folder: the run directory.
        device: where the model goes.
        corpus: where the corpus is now; default: where the recipe says.

    Raises:
        CheckpointError: no run, no complete checkpoint, or it belongs to another corpus.
    """
    if not (folder / "config.yaml").is_file():
        raise CheckpointError(
            f"{folder} is not a run directory: it has no config.yaml; give the --output of train.py"
        )
    newest = checkpoint.latest(folder)
    if newest is None:
        raise CheckpointError(f"{folder} has no complete checkpoint yet")
    overrides = [f"corpus.path={corpus}"] if corpus else None
    recipe = load_recipe(str(folder / "config.yaml"), overrides)
    opened = resolve_corpus(recipe.corpus, recipe.encoder.name, recipe.encoder.max_length)
    manifest = checkpoint.read_manifest(newest)
    if manifest["corpus_fingerprint"] != opened.fingerprint:
        raise CheckpointError(
            f"{newest} was trained on the corpus {manifest['corpus_fingerprint'][:16]}, but "
            f"{opened.path} is {opened.fingerprint[:16]}: its files, tokenizer or text option "
            "have changed since; give the corpus of the run with --corpus"
        )
    model = build_model(recipe, device)
    tensors = checkpoint.load_tensors(newest, manifest, checkpoint.ENCODER_FILE)
    model.load_state_dict({name: tensors[name] for name, _ in model.named_parameters()},
                          strict=False)  # fmt: skip
    return LoadedRun(folder, newest, recipe, opened, model.eval(), SavedRows(newest))
