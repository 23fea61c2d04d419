"""What the model computes and keeps, traced on the meta device: every shape, not one number.

An encoder is run forward and backward without weights or data, so that what it says holds for any
architecture, attention and dtype; a trace takes some hundred milliseconds and next to no memory.
FLOPs of a text and the bytes kept for its backward pass are polynomials of second degree in its
length, exactly, so three traced lengths give all others.

What a trace cannot see: workspaces inside kernels, what an allocator rounds up, and that fused
attention on an accelerator never keeps the [t, t] matrix (`fused_attention` leaves it out).

Shape legend: n texts of a chunk, t its longest.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from unidec_ds.config import Recipe
from unidec_ds.ds_config import DsConfig
from unidec_ds.encoders import traceable_encoder
from unidec_ds.errors import UserError
from unidec_ds.model import Chunk, Masks, UniDEC

_ITEM = torch.ops.aten._local_scalar_dense.default


@dataclass(frozen=True)
class PerText:
    """A quantity of one text as a function of its length t: a + b·t + c·t²."""

    by_length: Mapping[int, int]
    """The quantity at three lengths."""

    def at(self, length: int, without_square: bool = False) -> int:
        """Returns the quantity of a text of this length.

        Args:
            length: t, padding counted.
            without_square: leave out the part that grows with t².
        """
        points = list(self.by_length.items())
        total = Fraction(0)
        for i, (x, y) in enumerate(points):
            term = Fraction(y)
            for j, (other, _) in enumerate(points):
                if i != j:
                    term *= Fraction(length - other, x - other)
            total += term
        if without_square:
            total -= self._square() * length * length
        return round(total)

    def _square(self) -> Fraction:
        (x, a), (y, b), (z, c) = self.by_length.items()
        return (
            Fraction(a, (x - y) * (x - z))
            + Fraction(b, (y - x) * (y - z))
            + Fraction(c, (z - x) * (z - y))
        )


@dataclass(frozen=True)
class ModelCost:
    """What the traces of one model say."""

    model: UniDEC
    """It, on the meta device, as the engine holds it."""
    num_parameters: int
    """Of encoder and heads."""
    num_trainable: int
    """Those that have a gradient: without a head that the objective does not train."""
    largest_parameter: int
    """Elements of the largest trainable one."""
    hidden_size: int
    """Width of the encoder."""
    width: int
    """Width D of the heads and of the classifier rows."""
    forward_flops: PerText
    """Of the encoder and the pooling."""
    kept_bytes: PerText
    """Kept for the backward pass, in the engine's dtype."""
    fused_attention: bool
    """Whether attention runs in one kernel that keeps no [t, t] matrix."""
    weight_bytes: int
    """Bytes of a weight in the engine: 2 with bf16, 4 with fp32."""

    def kept(self, num_texts: int, length: int) -> int:
        """Returns the bytes that a chunk keeps for its backward pass."""
        return num_texts * self.kept_bytes.at(length, without_square=self.fused_attention)

    def encoder_flops(self, num_texts: int, length: int) -> int:
        """Returns the FLOPs of one forward pass of a chunk."""
        return num_texts * self.forward_flops.at(length)


class UntraceableError(UserError):
    """The encoder's forward pass needs numbers, not only shapes."""


def trace_model(recipe: Recipe, ds_config: DsConfig, device_type: str) -> ModelCost:
    """Returns what the recipe's model computes and keeps on a device of this type.

    Raises:
        UserError: the encoder's configuration cannot be loaded.
        UntraceableError: it can, but does not run on the meta device.
    """
    model = _meta_model(recipe, ds_config, device_type)
    _try_out(model, recipe.encoder.name)
    longest = recipe.encoder.max_length
    flops, kept = {}, {}
    for length in (1, max(longest // 2, 2), longest):
        counter = FlopCounterMode(display=False)
        with counter, Tally(model) as tally:
            pooled = model.pool(_chunk(1, length))
            kept[length] = tally.live_bytes
        flops[length] = counter.get_total_flops()
        del pooled
    parameters = dict(model.named_parameters())
    trainable = [p.numel() for p in parameters.values() if p.requires_grad]
    return ModelCost(
        model=model,
        num_parameters=sum(p.numel() for p in parameters.values()),
        num_trainable=sum(trainable),
        largest_parameter=max(trainable),
        hidden_size=model.de_head.in_features,
        width=model.width,
        forward_flops=PerText(flops),
        kept_bytes=PerText(kept),
        fused_attention=device_type != "cpu" and recipe.encoder.attention != "eager",
        weight_bytes=parameters["de_head.weight"].element_size(),
    )


@lru_cache(maxsize=32)
def chunk_working_bytes(model: UniDEC, num_texts: int, length: int) -> tuple[int, int]:
    """Returns what a chunk takes beside what it keeps: when training, and without gradient.

    Args:
        model: on the meta device.
        num_texts: n.
        length: t.

    Returns:
        The most bytes at once in forward and backward, beyond those kept for the backward pass and
        the finished gradients; the most bytes at once of a forward pass without gradient.
    """
    chunk = _chunk(num_texts, length)
    with Tally(model) as tally:
        pooled = model.pool(chunk)
        kept = tally.live_bytes
        with _gradients_dropped(model):
            pooled.sum().backward()
        trained = tally.most_bytes - kept
    del pooled
    with torch.no_grad(), Tally(model) as tally:
        model.pool(chunk)
    return trained, tally.most_bytes


@lru_cache(maxsize=32)
def heads_bytes(model: UniDEC, num_queries: int, num_labels: int) -> int:
    """Returns the most bytes of a step's pooled texts, heads, and their gradients.

    Args:
        model: on the meta device.
        num_queries: of this rank.
        num_labels: of this rank, with a text.
    """

    def run() -> None:
        hidden_size = model.de_head.in_features
        pooled = torch.empty(num_queries + num_labels, hidden_size, device="meta")
        pooled = torch.cat([pooled]).requires_grad_()
        queries, labels = pooled.index_select(
            0, torch.empty(len(pooled), dtype=torch.int64, device="meta")
        ).split([num_queries, num_labels])
        masks = None
        if model.config.head_dropout:
            masks = Masks(*(torch.empty(n, model.width, device="meta")
                            for n in (num_queries, num_queries, num_labels)))  # fmt: skip
        outputs = [
            model.embed(queries, masks.query_de_BD if masks else None),
            model.classify(queries, masks.query_classifier_BD if masks else None),
            model.embed(labels, masks.label_de_PD if masks else None),
        ]
        wanted = [output for output in outputs if output.requires_grad]
        torch.autograd.backward(wanted, [torch.empty_like(output) for output in wanted])

    tally = Tally(model)
    with tally, _gradients_dropped(model):
        run()
    return tally.most_bytes


class Tally(TorchDispatchMode):
    """Adds up the bytes of the tensors made inside it, as long as they live.

    Args:
        model: whose parameters are not counted.

    Attributes:
        live_bytes: now.
        most_bytes: the most there were at once.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live_bytes: int = 0
        self.most_bytes: int = 0
        self._known = {p.untyped_storage()._cdata for p in model.parameters()}
        self._known |= {b.untyped_storage()._cdata for b in model.buffers()}

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Runs one operation and notes the memory it made."""
        if func is _ITEM and args[0].is_meta and args[0].dtype == torch.bool:
            return False  # "is every position a token?": there is padding
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._known:
            self._known.add(key)
            self.live_bytes += storage.nbytes()
            self.most_bytes = max(self.most_bytes, self.live_bytes)
            weakref.finalize(storage, self._forget, key, storage.nbytes())

    def _forget(self, key: int, num_bytes: int) -> None:
        self._known.discard(key)
        self.live_bytes -= num_bytes


def _meta_model(recipe: Recipe, ds_config: DsConfig, device_type: str) -> UniDEC:
    """Returns the model as the engine holds it, without weights."""
    encoder = traceable_encoder(recipe.encoder, torch.device(device_type))
    with torch.device("meta"):
        model = UniDEC(encoder, int(encoder.config.hidden_size), recipe.model)  # type: ignore[union-attr, arg-type]
    model.de_head.requires_grad_(recipe.objective.de != "none")
    model.classifier_head.requires_grad_(recipe.objective.classifier != "none")
    return model.to(torch.bfloat16 if ds_config.dtype == "bf16" else torch.float32).train()


def _try_out(model: UniDEC, name: str) -> None:
    """Raises UntraceableError if the encoder does not run; all that may go wrong is its own."""
    try:
        with Tally(model):
            model.pool(_chunk(2, 2)).sum().backward()
    except (RuntimeError, TypeError, ValueError, AttributeError, LookupError) as error:
        first_line = str(error).strip().split("\n")[0]
        raise UntraceableError(
            f"encoder.name: {name!r} cannot be run on torch's meta device "
            f"({type(error).__name__}: {first_line}), so what it computes and keeps cannot be "
            "predicted; train.py trains it all the same"
        ) from error
    model.zero_grad(set_to_none=True)


@contextmanager
def _gradients_dropped(model: nn.Module) -> Iterator[None]:
    """Drops each gradient as soon as it is whole: the engine's are counted where they are kept."""
    hooks = [
        parameter.register_post_accumulate_grad_hook(_drop)
        for parameter in model.parameters()
        if parameter.requires_grad
    ]
    yield
    for hook in hooks:
        hook.remove()


def _drop(parameter: Tensor) -> None:
    parameter.grad = None


def _chunk(num_texts: int, length: int) -> Chunk:
    ids = torch.ones(num_texts, length, dtype=torch.int64, device="meta")
    return Chunk(ids, torch.ones_like(ids))
