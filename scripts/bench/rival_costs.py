"""FLOPs of a step of UniDEC and its rivals, by formula, and what an epoch on the public sets takes.

Counted are matrix products; a multiply and an add are two FLOPs. `scripts/bench/rivals.py` prints
the formulas beside what torch counted. With F the encoder's forward pass of one text, B queries, P
pool labels, L labels and D the width:

- UniDEC: 4F·(B + P) with recompute, the heads, 3 products of 2·B·P·D FLOPs in each head's loss;
- DEXML: 4F·(B + L), its head, 4 products of 2·B·L·D (blocks of logits are computed twice);
- Renee: 3F·B (nothing is recomputed), its head, 3 products of 2·B·L·D.

UniDEC's epoch holds its share of mining as well: every fifth epoch all labels and train queries are
embedded, and searched exhaustively (an upper bound: the default is an approximate index).

What is no product is left out of all: the heads' norms, exp, Adam. For Renee's rows it is memory
traffic, 20·L·D bytes a step.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from unidec_ds.config import Recipe, load_recipe
from unidec_ds.interruption import SIGNALS

MINING_EVERY_EPOCHS = 5
GPUS = (1, 16)


class Encoder(NamedTuple):
    """A Transformer's sizes."""

    width: int
    layers: int
    feed_forward: int


class PublicSet(NamedTuple):
    """A set of the Extreme Classification Repository; its recipe has batch, pool and length."""

    name: str
    queries: int
    labels: int


DISTILBERT, DISTILBERT_PARAMETERS = Encoder(768, 6, 3072), 66_362_880
SETS = (
    PublicSet("LF-AmazonTitles-131K", 294_805, 131_073),
    # Train queries: those of LF-WikiSeeAlso-320K, its full-text twin.
    PublicSet("LF-WikiSeeAlsoTitles-320K", 693_082, 312_330),
    PublicSet("LF-AmazonTitles-1.3M", 2_248_619, 1_305_265),
)


def forward_flops(encoder: Encoder, chunks: Iterable[tuple[int, int]]) -> int:
    """Returns the FLOPs of encoding chunks of (texts, padded tokens of each)."""
    width, layers, feed_forward = encoder
    weights = 4 * width * width + 2 * width * feed_forward
    return sum(
        layers * texts * (2 * tokens * weights + 4 * tokens * tokens * width)
        for texts, tokens in chunks
    )


def step_flops(
    recipe: Recipe,
    encoded: int,
    width: int,
    *,
    queries: int,
    own_queries: int,
    labels: int,
    text_labels: int,
    blocks: tuple[int, int] = (1, 1),
) -> int:
    """Returns the FLOPs of a step on one rank.

    Args:
        recipe: its objective and whether chunks are recomputed.
        encoded: `forward_flops` of the rank's texts.
        width: of encoder and heads.
        queries: of the global batch.
        own_queries: those that this rank encodes.
        labels: scored by the classifier on this rank.
        text_labels: encoded and scored by the dual encoder on this rank.
        blocks: blocks of logits of the dual encoder's and the classifier's loss.
    """
    recompute = recipe.train.recompute and recipe.train.encoder_chunk > 0
    total = (4 if recompute else 3) * encoded
    objective = recipe.objective
    heads = {"de": (own_queries + text_labels, text_labels), "classifier": (own_queries, labels)}
    for head, num_blocks in zip(heads, blocks, strict=True):
        texts, scored = heads[head]
        kind = getattr(objective, head)
        if kind == "none":
            total += 2 * texts * width * width  # the frozen head still runs forward
            continue
        total += 6 * texts * width * width
        products = 4 if num_blocks > 1 and kind != "bce" else 3
        total += products * 2 * queries * scored * width
    return total


def epoch_rows(rates: dict[str, float]) -> list[dict[str, Any]]:
    """Returns UniDEC's, DEXML's and Renee's cost of an epoch on each set, on 1 and 16 GPUs.

    All with UniDEC's batch, encoder and text length, every text as long as that: FLOPs on one GPU.

    Args:
        rates: FLOPs a second of "psl", "dexml" and "renee", as measured somewhere.
    """
    made = []
    for public in SETS:
        recipe = load_recipe(public.name.lower())
        batch, pool, width = recipe.train.batch_size, recipe.pool.size, DISTILBERT.width
        one_text = text_flops(recipe)
        steps = -(-public.queries // batch)
        mining = (public.queries + public.labels) * (one_text + 2 * width * width)
        mining += 2 * public.queries * public.labels * width
        per_label_bytes = {"psl": 16 * pool, "dexml": 8 * public.labels, "renee": 8 * public.labels}
        ours = {}
        for gpus in GPUS:
            for system, rate in rates.items():
                step = epoch_step_flops(system, public, recipe)
                extra = mining // MINING_EVERY_EPOCHS if system == "psl" else 0
                epoch = (steps * step + extra) / gpus
                sent = comm_bytes(batch, width, system) + engine_comm_bytes(width)
                ours.setdefault(gpus, (epoch, epoch / rate))
                made.append(
                    {
                        "system": f"epoch:{system}",
                        "set": public.name,
                        "labels": public.labels,
                        "world_size": gpus,
                        "step_s": step / gpus / rate,
                        "peak_bytes": per_label_bytes[system] * width // gpus,
                        "flops": step / gpus,
                        "comm_bytes": sent if gpus > 1 else 0,
                        "epoch_flops": epoch,
                        "epoch_s": epoch / rate,
                        "times_unidec_flops": epoch / ours[gpus][0],
                        "times_unidec_s": epoch / rate / ours[gpus][1],
                        "times_unidec_on_one_s": epoch / rate / ours[1][1],
                    }
                )
    return made


def epoch_step_flops(system: str, public: PublicSet, recipe: Recipe) -> int:
    """Returns the FLOPs of a step of "psl", "dexml" or "renee", all GPUs together.

    Args:
        system: which.
        public: the set.
        recipe: UniDEC's of the set: batch, pool and text length of all.
    """
    batch = recipe.train.batch_size
    scored = recipe.pool.size if system == "psl" else public.labels
    encoded = 0 if system == "renee" else scored
    return step_flops(
        variant_of(system),
        (batch + encoded) * text_flops(recipe),
        DISTILBERT.width,
        queries=batch,
        own_queries=batch,
        labels=scored,
        text_labels=encoded,
        blocks=(2, 2) if system == "dexml" else (1, 1),
    )


def text_flops(recipe: Recipe) -> int:
    """Returns the FLOPs of encoding one text of the recipe's length."""
    return forward_flops(DISTILBERT, [(1, recipe.encoder.max_length)])


def comm_bytes(queries: int, width: int, system: str) -> int:
    """Returns what `unidec_ds.comm` hands over in a step: a test counts it to the byte."""
    heads = 2 if system == "psl" else 1
    logsumexps = 0 if system == "renee" else heads
    l2q = 1 if system == "psl" else 0
    flags = 2 + len(SIGNALS)  # a gradient that is not finite, a save under way, a request to stop
    floats = 4 * queries * width + 3 * queries * logsumexps + 1 + (2 + l2q) * heads + flags
    return 4 * floats


def engine_comm_bytes(width: int) -> int:
    """Returns what DeepSpeed hands over in a step: gradients and new weights in bf16."""
    return 2 * 2 * (DISTILBERT_PARAMETERS + 2 * width * width)


def variant_of(system: str) -> Recipe:
    """Returns the recipe whose objective and recompute a system has on LF-AmazonTitles-131K."""
    prefix = {"psl": ""}.get(system, f"{system}-")
    return load_recipe(f"{prefix}lf-amazontitles-131k")
