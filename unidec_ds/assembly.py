"""From settings to objects: the model and views a recipe stands for, and a saved run read back.

Shared by the trainer and by everything that uses a trained run (evaluate, predict). No training.
"""

from __future__ import annotations

from collections.abc import Mapping
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
from unidec_ds.data.pool import Planner
from unidec_ds.data.prepare import resolve_corpus
from unidec_ds.ds_config import DsConfig
from unidec_ds.encoders import empty_encoder, load_encoder
from unidec_ds.errors import CheckpointError, UserError
from unidec_ds.evaluation import Evaluation, RowSource, SearchView, evaluate, sample_queries
from unidec_ds.manifest import ENCODER_FILE, load_tensors, read_manifest, rows_file
from unidec_ds.model import UniDEC
from unidec_ds.unified import GRID, UnifiedWeight, choose_weight


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


def model_shapes(recipe: Recipe) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every parameter of `build_model(recipe)`; loads no weights."""
    encoder = empty_encoder(recipe.encoder.name)
    with torch.device("meta"):
        hidden_size = int(encoder.config.hidden_size)  # type: ignore[union-attr, arg-type]
        model = UniDEC(encoder, hidden_size, recipe.model)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def table_placement(ds_config: DsConfig) -> Placement:
    """Returns where the ds_config puts the classifier table."""
    offload = ds_config.offload
    device, nvme_path = offload.get("device", "none"), offload.get("nvme_path")
    return Placement(
        kind="device" if device == "none" else device,
        nvme_path=Path(nvme_path) if device == "nvme" and nvme_path else None,
        pin_memory=bool(offload.get("pin_memory", False)),
    )


def split_train_queries(corpus: Corpus, recipe: Recipe) -> tuple[Ids, Ids]:
    """Returns the train queries to train on (those with a positive) and those to validate on."""
    train_ids, validation_ids = split_validation(
        corpus, recipe.corpus.validation_fraction, recipe.train.seed
    )
    if recipe.pool.mask_filter_pairs:
        counts = corpus.positives["train"].row_counts_without(corpus.filter_pairs["train"])
        train_ids = train_ids[counts[train_ids] > 0]
    return train_ids, validation_ids


def make_planner(corpus: Corpus, recipe: Recipe, train_ids: Ids) -> Planner:
    """Returns the planner of a run's steps, before any mining."""
    return Planner(
        query_ids=train_ids,
        positives=corpus.positives["train"],
        filter_pairs=corpus.filter_pairs["train"],
        pool=recipe.pool,
        batch_size=recipe.train.batch_size,
        seed=recipe.train.seed,
        all_labels=recipe.objective.pool == "all",
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
    unified_weights: Mapping[str, float] | None = None,
) -> Evaluation:
    """Evaluates `views` on the "test" or the "validation" queries; every rank must call.

    `unified_weights` names further rankings, see `evaluate`.

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
        unified_weights=unified_weights,
        num_all_queries=len(query_ids),
        title=title,
    )


def tune_unified(
    model: UniDEC, rows: RowSource, corpus: Corpus, recipe: Recipe
) -> UnifiedWeight | None:
    """Chooses the dual encoder's weight in the unified view; every rank must call.

    Returns:
        The same on every rank; None where the recipe does not ask for it, trains one head only or
        keeps no validation queries.

    Collectives: those of an evaluation of the validation queries.
    """
    _, query_ids = split_validation(corpus, recipe.corpus.validation_fraction, recipe.train.seed)
    is_wanted = recipe.evaluation.tune_unified and "unified" in trained_views(recipe)
    if not is_wanted or not len(query_ids):
        return None
    names = {f"{weight:g}": weight for weight in GRID}
    result = evaluate_split(
        model, rows, corpus, recipe, "validation", (), "weighing the views", names
    )
    metrics = {weight: result.metrics[name] for name, weight in names.items()}
    return UnifiedWeight(choose_weight(metrics), len(result.query_ids), metrics)


class SavedRows:
    """The classifier rows of a checkpoint, memory-mapped; for use without a process group.

    Args:
        folder: a complete checkpoint, written at any world size.
        verify: read its files through and compare their checksums first.
    """

    def __init__(self, folder: Path, *, verify: bool = True) -> None:
        manifest = read_manifest(folder)
        self._world_size = int(manifest["world_size"])
        self._shards = [
            load_tensors(folder, manifest, rows_file(rank, self._world_size), verify=verify)
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


def load_run(
    folder: Path, device: torch.device, corpus: Path | None = None, which: str = "latest"
) -> LoadedRun:
    """Reads back a checkpoint of a run directory.

    Args:
        folder: the run directory.
        device: where the model goes.
        corpus: where the corpus is now; default: where the recipe says.
        which: "latest", "best" or the checkpoint's folder, see `checkpoint.choose`.

    Raises:
        CheckpointError: no run, no such checkpoint, or it belongs to another corpus.
    """
    if not (folder / "config.yaml").is_file():
        raise CheckpointError(
            f"{folder} is not a run directory: it has no config.yaml; give the --output of train.py"
        )
    chosen = checkpoint.choose(folder, which)
    overrides = [f"corpus.path={corpus}"] if corpus else None
    recipe = load_recipe(str(folder / "config.yaml"), overrides)
    opened = resolve_corpus(recipe.corpus, recipe.encoder.name, recipe.encoder.max_length)
    manifest = read_manifest(chosen)
    trained_on = manifest.get("corpus_fingerprint", "(unknown)")
    if trained_on != opened.fingerprint:
        raise CheckpointError(
            f"{chosen} was trained on the corpus {trained_on[:16]}, but "
            f"{opened.path} is {opened.fingerprint[:16]}: its files, tokenizer or text option "
            "have changed since; give the corpus of the run with --corpus"
        )
    model = build_model(recipe, device)
    tensors = load_tensors(chosen, manifest, ENCODER_FILE)
    model.load_state_dict({name: tensors[name] for name, _ in model.named_parameters()},
                          strict=False)  # fmt: skip
    return LoadedRun(folder, chosen, recipe, opened, model.eval(), SavedRows(chosen))
