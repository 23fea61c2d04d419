"""Reads a DeepSpeed configuration file and checks it against what this system can do.

The ds_config owns precision, ZeRO, offload, communication and gradient clipping; the recipe owns
batch, optimizer and schedule. A key that would contradict the recipe, or that DeepSpeed would
silently ignore, is a fault; `load_ds_config` reports all faults at once, before any process group
exists.

Where the classifier table lives follows `zero_optimization.offload_optimizer.device`: `cpu` host
memory, `nvme` memory-mapped files under `nvme_path`, absent or `none` the accelerator's memory.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from unidec_ds.errors import ConfigError, UserError

_MAX_DEPTH = 16
_BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu")
_PASSED_ON = (
    "aio",
    "comms_logger",
    "communication_data_type",
    "flops_profiler",
    "gradient_clipping",
    "gradient_predivide_factor",
    "prescale_gradients",
    "wall_clock_breakdown",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
)
_KNOWN = (*_BATCH_KEYS, *_PASSED_ON, "gradient_accumulation_steps", "zero_optimization", "bf16",
          "fp16")  # fmt: skip
_OWNED_BY_RECIPE = {
    "optimizer": "optimizer.encoder_lr, optimizer.head_lr, optimizer.row_lr, ...",
    "scheduler": "optimizer.warmup_steps or optimizer.warmup_fraction, and train.epochs",
}
_REFUSED = {
    "amp": "use bf16",
    "sparse_gradients": "the classifier's rows are already updated sparsely, outside ZeRO",
    "steps_per_print": "use the recipe's train.log_every_steps",
    "tensorboard": "TensorBoard is always written, to the run directory",
    "zero_optimization.offload_param": "it needs ZeRO-3",
}


@dataclass(frozen=True)
class DsConfig:
    """A checked ds_config.

    Args:
        path: the file it was read from.
        content: its JSON object, as written.
    """

    path: Path
    content: dict[str, Any]

    @property
    def zero_stage(self) -> int:
        """ZeRO stage, 0 to 2."""
        return int(self.content["zero_optimization"]["stage"])

    @property
    def dtype(self) -> Literal["bf16", "fp32"]:
        """Precision of the encoder's weights and activations."""
        return "bf16" if self.content.get("bf16", {}).get("enabled") else "fp32"

    @property
    def offload(self) -> dict[str, Any]:
        """The `zero_optimization.offload_optimizer` section, empty when absent."""
        section = self.content["zero_optimization"].get("offload_optimizer")
        return dict(section) if section else {}

    @property
    def gradient_clipping(self) -> float:
        """Largest global norm of the engine's gradients; 0 is no clipping."""
        return float(self.content.get("gradient_clipping", 0.0))

    def for_engine(self, batch_size: int, world_size: int) -> dict[str, Any]:
        """Returns the copy that DeepSpeed gets, its batch keys filled with integers.

        DeepSpeed offloads optimizer state to NVMe only under ZeRO-3; here `nvme` places the
        classifier table, and the encoder's small optimizer state stays in host memory.
        """
        content: dict[str, Any] = json.loads(json.dumps(self.content))
        micro_batch_size = math.ceil(batch_size / world_size)
        content["train_micro_batch_size_per_gpu"] = micro_batch_size
        content["train_batch_size"] = micro_batch_size * world_size
        content["gradient_accumulation_steps"] = 1
        content.setdefault("gradient_clipping", 0.0)
        offload = content["zero_optimization"].get("offload_optimizer")
        if offload and offload.get("device") == "nvme":
            content["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
        return content


def load_ds_config(path: Path, *, batch_size: int, world_size: int) -> DsConfig:
    """Reads and checks the ds_config at `path`.

    Args:
        path: a JSON file.
        batch_size: the recipe's global `train.batch_size`.
        world_size: number of ranks.

    Raises:
        ConfigError: lists every fault with its dotted key.
        UserError: there is no such file.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unique_keys)
    except FileNotFoundError:
        raise UserError(f"--ds_config: there is no file {path}; ds_configs/README.md says which "
                        "one to take") from None  # fmt: skip
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--ds_config: {path} cannot be read: {error}") from error
    except json.JSONDecodeError as error:
        fault = f"line {error.lineno} column {error.colno}: not JSON ({error.msg})"
        raise ConfigError(str(path), [fault]) from error
    except _DuplicateKeyError as error:
        raise ConfigError(str(path), [f"{error}: given twice"]) from error
    except (ValueError, RecursionError) as error:  # more digits, or deeper, than Python reads
        raise ConfigError(str(path), [f"not a ds_config: {error}"]) from error
    if not isinstance(content, dict):
        raise ConfigError(str(path), ["the file must hold one JSON object"])
    if _is_deep(content):
        raise ConfigError(str(path), [f"nested more than {_MAX_DEPTH} deep"])
    faults = list(_faults(content, batch_size, world_size))
    if faults:
        raise ConfigError(str(path), faults)
    return DsConfig(path, content)


def _is_deep(content: Any) -> bool:
    """Returns whether JSON is nested more than _MAX_DEPTH deep; does not recurse itself."""
    level = [content]
    for _ in range(_MAX_DEPTH):
        parts = [value.values() if isinstance(value, dict) else value for value in level]
        level = [v for part in parts for v in part if isinstance(v, (dict, list))]
    return bool(level)


class _DuplicateKeyError(ValueError):
    pass


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _DuplicateKeyError(next(key for key in keys if keys.count(key) > 1))
    return content


def _faults(content: dict[str, Any], batch_size: int, world_size: int) -> Iterator[str]:
    for key in content:
        if key in _OWNED_BY_RECIPE:
            yield f"{key}: the recipe owns it; remove the block and set {_OWNED_BY_RECIPE[key]}"
        elif key in _REFUSED:
            yield f"{key}: not supported: {_REFUSED[key]}"
        elif key not in _KNOWN:
            yield f"{key}: unknown key{_nearest(key, _KNOWN)}"
    yield from _batch_faults(content, batch_size, world_size)
    for precision in ("bf16", "fp16"):
        section = content.get(precision, {})
        enabled = section.get("enabled", False) if isinstance(section, dict) else None
        if not isinstance(enabled, bool):
            yield (
                f"{precision}.enabled: found {json.dumps(section)}; "
                'needs {"enabled": true} or {"enabled": false}'
            )
        elif enabled and precision == "fp16":
            yield (
                "fp16.enabled: fp16 is refused: its loss scaling would corrupt the gradients of "
                'the classifier rows, which live outside the engine; use "bf16": {"enabled": true}'
            )
    clipping = content.get("gradient_clipping", 0.0)
    if not _is_number(clipping) or clipping < 0:
        yield f"gradient_clipping: found {json.dumps(clipping)}; needs a number >= 0 (0: none)"
    yield from _zero_faults(content.get("zero_optimization"))


def _batch_faults(content: dict[str, Any], batch_size: int, world_size: int) -> Iterator[str]:
    steps = content.get("gradient_accumulation_steps", 1)
    if steps not in (1, "auto") or isinstance(steps, bool):
        yield (
            f"gradient_accumulation_steps: found {json.dumps(steps)}; only 1 is possible, because "
            "every query of the batch is scored against one label pool; to fit a large batch into "
            "memory set the recipe's train.encoder_chunk"
        )
    micro_batch_size = math.ceil(batch_size / world_size)
    fitting = {_BATCH_KEYS[0]: (batch_size, micro_batch_size * world_size),
               _BATCH_KEYS[1]: (micro_batch_size,)}  # fmt: skip
    for key, accepted in fitting.items():
        value = content.get(key, "auto")
        if value != "auto" and value not in accepted:
            yield (
                f"{key}: found {json.dumps(value)}, but the recipe's train.batch_size {batch_size} "
                f'on {world_size} rank(s) needs {accepted[0]}; remove the key or write "auto"'
            )


def _zero_faults(zero: Any) -> Iterator[str]:
    if not isinstance(zero, dict):
        yield 'zero_optimization: needs a section, for example {"stage": 2}'
        return
    stage = zero.get("stage")
    if stage == 3:
        yield (
            "zero_optimization.stage: 3 is refused: it would gather every encoder layer again for "
            "each chunk of texts, and the classifier, the large part, is sharded over the ranks "
            "anyway; use 1 or 2"
        )
    elif stage not in (0, 1, 2) or isinstance(stage, bool):
        yield f"zero_optimization.stage: found {json.dumps(stage)}; needs 0, 1 or 2"
    if "offload_param" in zero:
        yield (
            "zero_optimization.offload_param: not supported: "
            + _REFUSED["zero_optimization.offload_param"]
        )
    offload = zero.get("offload_optimizer")
    if offload is None:
        return
    if not isinstance(offload, dict):
        yield (
            f"zero_optimization.offload_optimizer: found {json.dumps(offload)}; needs a section, "
            'for example {"device": "cpu"}'
        )
        return
    device = offload.get("device", "none")
    if device not in ("none", "cpu", "nvme"):
        yield (
            f"zero_optimization.offload_optimizer.device: found {json.dumps(device)}; "
            "needs cpu, nvme or none"
        )
    elif device != "none" and stage == 0:
        yield "zero_optimization.offload_optimizer.device: offloading needs stage 1 or 2"
    elif device == "nvme" and not isinstance(offload.get("nvme_path"), str):
        yield "zero_optimization.offload_optimizer.nvme_path: needed when device is nvme"


def _nearest(key: str, known: tuple[str, ...]) -> str:
    close = difflib.get_close_matches(key, known, n=1)
    return f"; did you mean {close[0]}?" if close else f"; known: {', '.join(sorted(known))}"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
