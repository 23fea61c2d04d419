"""Recipes: what to train on, how, and with which settings.

A recipe is a YAML file whose sections are the components' own settings. It is loaded strictly:
unknown keys, wrong types, values out of range and settings that contradict each other are all
listed in one `ConfigError`, each with its dotted key. `--set section.key=value` overrides a value
before the check. YAML 1.2: `1e-4` is a number, `no` is a string, a key given twice is an error.
Aliases (`*name`) are refused: a recipe has no use for them, and a page of them can stand for more
values than any memory holds.
"""

from __future__ import annotations

import difflib
import json
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationError, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from ruamel.yaml.events import AliasEvent, CollectionEndEvent, CollectionStartEvent

from unidec_ds.checkpoint import CheckpointConfig
from unidec_ds.classifier.config import ClassifierConfig
from unidec_ds.data.corpus import CorpusConfig
from unidec_ds.data.pool import BatchesConfig, PoolConfig
from unidec_ds.encoders import EncoderConfig
from unidec_ds.errors import ConfigError, UserError
from unidec_ds.evaluation import EvaluationConfig
from unidec_ds.losses import ObjectiveConfig
from unidec_ds.mining.mine import MiningConfig
from unidec_ds.model import ModelConfig
from unidec_ds.optim import OptimizerConfig
from unidec_ds.settings import Settings

MAX_RECIPE_BYTES = 1 << 18
"""A larger file is refused; a recipe has some 5,000 bytes."""

_MAX_DEPTH = 16


class TrainConfig(Settings):
    """How long, in what batches, from which seed."""

    batch_size: Annotated[int, Field(ge=1)]
    """Queries per step, over all ranks together: the world size is not part of the method."""
    epochs: Annotated[int, Field(ge=1)]
    """Passes over the train queries."""
    max_steps: Annotated[int, Field(ge=0)] = 0
    """Stop after this many steps; 0 runs all epochs. The schedule shortens with it."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Of every random number."""
    encoder_chunk: Annotated[int, Field(ge=0)] = 0
    """Texts per encoder call; bounds the memory of activations, so any batch fits on one GPU.
    0 encodes all texts of a rank in one call."""
    recompute: bool = True
    """With `encoder_chunk`: keep only the chunks' embeddings and run each chunk again in the
    backward pass. Off, all activations are kept: faster by a quarter, if memory allows."""
    loss_block_bytes: Annotated[int, Field(ge=1 << 20)] = 256 << 20
    """Most bytes of one block of logits."""
    log_every_steps: Annotated[int, Field(ge=1)] = 1
    """Write the training scalars every n-th step."""
    deterministic: bool = False
    """Use torch's deterministic kernels only, and fail where there is none: two runs on the same
    kind of GPU then agree to the last bit. On CPUs they do in any case."""


class Recipe(Settings):
    """All settings of a run, one section per component."""

    corpus: CorpusConfig
    encoder: EncoderConfig = EncoderConfig()
    model: ModelConfig = ModelConfig()
    pool: PoolConfig
    batches: BatchesConfig = BatchesConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    classifier: ClassifierConfig = ClassifierConfig()
    mining: MiningConfig = MiningConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    train: TrainConfig

    @model_validator(mode="after")
    def _sections_agree(self) -> Recipe:
        faults = []
        if self.batches.kind == "clustered" and self.mining.every_epochs == 0:
            faults.append("batches.kind: clustered needs mining; set mining.every_epochs above 0")
        if self.objective.pool == "all" and self.mining.every_epochs:
            faults.append(
                "mining.every_epochs: with objective.pool all every label is a negative already; "
                "set it to 0"
            )
        if self.mining.every_epochs and self.objective.de == "none":
            faults.append(
                "mining.every_epochs: mining searches with the dual encoder, which objective.de "
                "none leaves untrained; set it to 0"
            )
        if self.checkpoint.keep_best and not (
            self.evaluation.every_epochs and self.corpus.validation_fraction
        ):
            faults.append(
                "checkpoint.keep_best: needs validation queries and their evaluation; set "
                "corpus.validation_fraction and evaluation.every_epochs above 0"
            )
        faults += self._faults_of_streaming()
        if faults:
            raise ValueError("\n".join(faults))
        return self

    def _faults_of_streaming(self) -> list[str]:
        if not self.classifier.streamed:
            return []
        faults = []
        if self.objective.classifier != "bce":
            faults.append(
                f"classifier.streamed: objective.classifier {self.objective.classifier} needs all "
                "labels of a step at once; set it to bce, or classifier.streamed to false"
            )
        if self.model.row_dropout:
            faults.append(
                "classifier.streamed: model.row_dropout draws one mask over the whole pool, which "
                "streaming is there to avoid; set it to 0"
            )
        return faults

    def as_yaml_object(self) -> dict[str, Any]:
        """Returns the resolved settings as plain data; `load_recipe` reads them back."""
        data: dict[str, Any] = json.loads(self.model_dump_json())
        return data


def recipe_names() -> list[str]:
    """Returns the names of the recipes that ship with the package."""
    folder = resources.files("unidec_ds.recipes")
    return sorted(p.name[: -len(".yaml")] for p in folder.iterdir() if p.name.endswith(".yaml"))


def load_recipe(name_or_file: str, overrides: list[str] | None = None) -> Recipe:
    """Returns the checked recipe.

    Args:
        name_or_file: one of `recipe_names()`, or the path of a YAML file.
        overrides: "section.key=value" each, the value in YAML.

    Raises:
        ConfigError: lists every fault.
        UserError: there is no such recipe.
    """
    source, text = _read(name_or_file)
    data = _parse(source, text)
    faults = [fault for item in overrides or [] if (fault := _override(data, item))]
    if faults:
        raise ConfigError("--set", faults)
    if overrides:
        source += f" with --set {' --set '.join(overrides)}"
    _use_cosine_where_rows_start_from_texts(data)
    try:
        # In JSON mode a list is accepted where a tuple is wanted; all else stays strict.
        return Recipe.model_validate_json(json.dumps(data))
    except ValidationError as error:
        raise ConfigError(source, _faults(error)) from error
    except (TypeError, ValueError) as error:
        raise ConfigError(source, [f"not plain data: {error}"]) from error


def write_recipe(recipe: Recipe, path: Path) -> None:
    """Writes the resolved recipe as YAML."""
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    with path.open("w", encoding="utf-8") as file:
        yaml.dump(recipe.as_yaml_object(), file)


def _read(name_or_file: str) -> tuple[str, str]:
    path = Path(name_or_file)
    looks_like_file = path.suffix in (".yaml", ".yml") or len(path.parts) > 1
    try:
        if looks_like_file or path.is_file():
            with path.open("rb") as file:
                content = file.read(MAX_RECIPE_BYTES + 1)
            if len(content) > MAX_RECIPE_BYTES:
                raise UserError(f"--recipe: {path} has more than {MAX_RECIPE_BYTES:,} bytes; is it "
                                "a recipe?")  # fmt: skip
            return str(path), content.decode("utf-8")
        if name_or_file in recipe_names():
            resource = resources.files("unidec_ds.recipes") / f"{name_or_file}.yaml"
            return f"recipe {name_or_file}", resource.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--recipe: {path} cannot be read: {error}") from error
    close = difflib.get_close_matches(name_or_file, recipe_names(), n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    raise UserError(
        f"--recipe: {name_or_file!r} is neither a file nor a recipe{hint} "
        f"Recipes: {', '.join(recipe_names())}"
    )


def _parse(source: str, text: str) -> dict[str, Any]:
    try:
        data = _load_yaml(text)
    except (YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1} column {mark.column + 1}: " if mark else ""
        problem = getattr(error, "problem", None) or str(error).split("\n")[0]
        raise ConfigError(source, [f"{where}{problem}"]) from error
    if not isinstance(data, dict):
        raise ConfigError(source, ["a recipe must be a mapping of sections"])
    return data


def _load_yaml(text: str) -> Any:
    """Returns the plain data of a YAML text.

    Raises:
        YAMLError: it is no YAML.
        ValueError: it cannot be a recipe's; the message says what.
    """
    depth = 0
    for event in YAML(typ="safe", pure=True).parse(text):
        depth += isinstance(event, CollectionStartEvent) - isinstance(event, CollectionEndEvent)
        if isinstance(event, AliasEvent) or depth > _MAX_DEPTH:
            what = f"nested more than {_MAX_DEPTH} deep"
            if isinstance(event, AliasEvent):
                what = f"the alias *{event.anchor}; write the value out instead"
            raise ValueError(f"line {event.start_mark.line + 1}: {what}")
    try:
        return YAML(typ="safe", pure=True).load(text)
    except YAMLError:
        raise
    except Exception as error:  # what ruamel makes of `!!int x`, a 13th month, 5,000 digits
        raise ValueError(f"a value that cannot be read: {error}") from error


def _override(data: dict[str, Any], item: str) -> str | None:
    """Sets one dotted key in place; returns the fault, if any."""
    key, equals, text = item.partition("=")
    path = key.strip().split(".")
    if not equals or len(path) != 2 or not all(path):
        return f"{item!r}: needs section.key=value"
    try:
        value = _load_yaml(text)
    except (YAMLError, ValueError):
        return f"{item!r}: the value is not YAML"
    section = data.setdefault(path[0], {})
    if not isinstance(section, dict):
        return f"{item!r}: {path[0]} is not a section"
    section[path[1]] = value
    return None


def _use_cosine_where_rows_start_from_texts(data: dict[str, Any]) -> None:
    """Sets the default of `objective.classifier_logits`, which depends on `classifier.init`."""
    rows, objective = data.get("classifier"), data.setdefault("objective", {})
    if isinstance(rows, dict) and isinstance(objective, dict) and rows.get("init") == "label_text":
        objective.setdefault("classifier_logits", "cosine")


def _faults(error: ValidationError) -> list[str]:
    faults = []
    for fault in error.errors():
        key = ".".join(map(str, fault["loc"]))
        if fault["type"] == "extra_forbidden":
            faults.append(f"{key}: unknown key{_nearest(fault['loc'])}")
        elif fault["type"] == "missing":
            faults.append(f"{key}: missing; it has no default")
        elif fault["type"] == "value_error" and not key:
            faults += str(fault["ctx"]["error"]).split("\n")
        elif fault["type"] == "value_error":
            faults.append(f"{key}: {fault['ctx']['error']}")
        else:
            faults.append(f"{key}: found {json.dumps(fault['input'])}; {fault['msg']}")
    return faults


def _nearest(location: tuple[int | str, ...]) -> str:
    known: list[str] = list(Recipe.model_fields)
    if len(location) > 1:
        section = Recipe.model_fields[str(location[0])].annotation
        assert isinstance(section, type)
        assert issubclass(section, BaseModel)
        known = list(section.model_fields)
    close = difflib.get_close_matches(str(location[-1]), known, n=1)
    return f"; did you mean {close[0]}?" if close else f"; known: {', '.join(known)}"
