"""How much there is to do: the sizes of a corpus, and what one rank's step of it looks like.

With a corpus at hand a few steps are planned and their batches cut exactly as training would, so
pools, chunks and padding are the real ones; only the shortlists of hard negatives, which mining has
yet to find, are replaced by random labels. Without one the sizes are what the user says they will
be, and texts are as long as they are said to be.

Cost with a corpus: a sort of the train query ids and a few batches, about a second for 2.2M
queries. Nothing is written.

Shape legend: B queries of the global batch, P pool labels, L labels, N queries, K shortlist length.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from unidec_ds.assembly import make_planner
from unidec_ds.batch import make_batch
from unidec_ds.classifier import partition
from unidec_ds.config import Recipe
from unidec_ds.data.corpus import MAX_VALIDATION_QUERIES, Corpus
from unidec_ds.data.pool import Planner
from unidec_ds.errors import UserError
from unidec_ds.mining.mine import mines_at

_SAMPLE_STEPS = 4


@dataclass(frozen=True)
class Sizes:
    """The sizes of a corpus."""

    num_labels: int
    """L."""
    labels_with_text: int
    """Those that the dual encoder sees."""
    train_queries: int
    """Rows of the train table."""
    trained_queries: int
    """Those to train on: with a positive, and without the validation queries."""
    validation_queries: int
    test_queries: int
    train_positives: int
    """Positive pairs of the train set."""
    query_tokens: float
    """Mean length of a train query."""
    label_tokens: float
    """Mean length of a label."""
    corpus_bytes: int
    """Of the prepared corpus on disk, mapped into memory; 0 if it is not there yet."""
    source: str
    """Where the sizes come from, in words."""

    def evaluated_queries(self, recipe: Recipe) -> int:
        """Returns the queries of the final evaluation."""
        return recipe.evaluation.sampled(self.test_queries or self.validation_queries)


@dataclass(frozen=True)
class StepShape:
    """What one rank encodes and scores in one step."""

    batch_size: int
    """Queries of the step over all ranks, B."""
    pool_size: int
    """Labels of the pool over all ranks, P."""
    own_queries: int
    """Queries this rank encodes."""
    own_labels: int
    """Pool labels this rank owns: its classifier rows."""
    own_label_texts: int
    """Those of them it encodes."""
    chunks: tuple[tuple[int, int], ...]
    """(texts, padded length) of each encoder call, longest first."""
    num_tokens: int
    """Tokens of this rank's texts, padding not counted."""

    @property
    def num_padded_tokens(self) -> int:
        """Tokens the encoder computes."""
        return sum(texts * length for texts, length in self.chunks)


@dataclass(frozen=True)
class Workload:
    """A corpus's sizes, and sample steps of the rank that has most to do."""

    sizes: Sizes
    steps: tuple[StepShape, ...]
    world_size: int
    steps_per_epoch: int
    total_steps: int
    num_minings: int
    """Of the whole run; 0 if it does not mine."""


def corpus_workload(corpus: Corpus, recipe: Recipe, world_size: int) -> Workload:
    """Returns the workload of training on a prepared corpus."""
    manifest, candidates = corpus.manifest, corpus.train_query_ids()
    fraction = recipe.corpus.validation_fraction
    validation = min(int(fraction * len(candidates)), MAX_VALIDATION_QUERIES)
    lengths = manifest["token_lengths"]
    sizes = Sizes(
        num_labels=corpus.num_labels,
        labels_with_text=int(np.count_nonzero(corpus.label_has_text)),
        train_queries=len(corpus.queries["train"]),
        trained_queries=len(candidates) - validation,
        validation_queries=validation,
        test_queries=len(corpus.queries.get("test", ())),
        train_positives=corpus.positives["train"].num_pairs,
        query_tokens=float(lengths["train"]["mean"]),
        label_tokens=float(lengths["labels"]["mean"]),
        corpus_bytes=sum(manifest["files"].values()),
        source=f"the corpus {corpus.path}",
    )
    planner = with_random_shortlists(make_planner(corpus, recipe, candidates), corpus, recipe)
    steps = []
    for step in range(1 if recipe.objective.pool == "all" else _SAMPLE_STEPS):
        batch = make_batch(
            planner.plan(step),
            corpus,
            rank=0,  # owns one more label and no fewer queries than any other, give or take one
            world_size=world_size,
            encoder_chunk=recipe.train.encoder_chunk,
            with_label_texts=recipe.objective.de != "none",
        )
        steps.append(
            StepShape(
                batch_size=len(batch.plan.query_ids),
                pool_size=len(batch.plan.label_ids),
                own_queries=batch.query_sizes[0],
                own_labels=len(batch.own_pool),
                own_label_texts=len(batch.own_pool_with_text),
                chunks=tuple(tuple(chunk.input_ids.shape) for chunk in batch.chunks),  # type: ignore[misc]
                num_tokens=batch.num_tokens,
            )
        )
    return _workload(sizes, tuple(steps), recipe, world_size)


def sizes_workload(sizes: Sizes, recipe: Recipe, world_size: int) -> Workload:
    """Returns the workload of training on a corpus of these sizes.

    The pool is as large as the recipe lets it become, the longest chunk as long as
    `encoder.max_length`, the others of mean length.

    Raises:
        UserError: a size cannot be.
    """
    if min(sizes.num_labels, sizes.trained_queries) < 1:
        raise UserError(
            f"--labels {sizes.num_labels} and --queries {sizes.train_queries}: needs at least one "
            "label and one query to train on"
        )
    batch_size = min(recipe.train.batch_size, sizes.trained_queries)
    pool = recipe.pool
    pool_size = sizes.num_labels
    if recipe.objective.pool == "psl":
        mean_positives = sizes.train_positives / max(sizes.train_queries, 1)
        positives = pool.num_positives or mean_positives
        if pool.fill_with_positives:
            positives = max(positives, mean_positives)
        drawn = pool.num_hard_negatives if _draws_hard_negatives(recipe) else 0
        drawn = min(drawn, recipe.mining.shortlist_size)
        wanted = math.ceil(batch_size * (positives + drawn))
        pool_size = min(sizes.num_labels, wanted, pool.size or wanted)
    own_queries = -(-batch_size // world_size)
    own_labels = partition.num_local_rows(pool_size, 0, world_size)
    own_texts = own_labels if recipe.objective.de != "none" else 0
    texts = own_queries + own_texts
    tokens = own_queries * sizes.query_tokens + own_texts * sizes.label_tokens
    mean_length = max(1, math.ceil(tokens / texts))
    chunk = recipe.train.encoder_chunk or texts
    longest = max(mean_length, recipe.encoder.max_length)
    chunks = [
        (min(chunk, texts - start), longest if start == 0 else mean_length)
        for start in range(0, texts, chunk)
    ]
    step = StepShape(
        batch_size=batch_size,
        pool_size=pool_size,
        own_queries=own_queries,
        own_labels=own_labels,
        own_label_texts=own_texts,
        chunks=tuple(chunks),
        num_tokens=round(tokens),
    )
    return _workload(sizes, (step,), recipe, world_size)


def given_sizes(
    recipe: Recipe,
    *,
    labels: int,
    queries: int,
    test_queries: int,
    positives: float,
    query_tokens: float | None,
    label_tokens: float | None,
) -> Sizes:
    """Returns the sizes that a user gives of a corpus that is not there yet.

    Args:
        recipe: the run's.
        labels: L.
        queries: train queries.
        test_queries: of the test set.
        positives: mean positives of a train query.
        query_tokens: mean length of a query; None takes `encoder.max_length`.
        label_tokens: mean length of a label; likewise.
    """
    validation = min(int(recipe.corpus.validation_fraction * queries), MAX_VALIDATION_QUERIES)
    longest = float(recipe.encoder.max_length)
    source = "the sizes given"
    if query_tokens is None or label_tokens is None:
        source += f"; texts of unknown length count as {recipe.encoder.max_length} tokens"
    return Sizes(
        num_labels=labels,
        labels_with_text=labels,
        train_queries=queries,
        trained_queries=queries - validation,
        validation_queries=validation,
        test_queries=test_queries,
        train_positives=round(positives * queries),
        query_tokens=min(query_tokens or longest, longest),
        label_tokens=min(label_tokens or longest, longest),
        corpus_bytes=0,
        source=source,
    )


def with_random_shortlists(planner: Planner, corpus: Corpus, recipe: Recipe) -> Planner:
    """Returns the planner with random labels in place of mined ones, if the run mines any."""
    if not _draws_hard_negatives(recipe):
        return planner
    shortlists = _random_shortlists(
        len(corpus.queries["train"]), recipe.mining.shortlist_size, corpus.num_labels
    )
    return planner.with_mined(shortlists, None)


def _workload(
    sizes: Sizes, steps: tuple[StepShape, ...], recipe: Recipe, world_size: int
) -> Workload:
    steps_per_epoch = -(-sizes.trained_queries // recipe.train.batch_size)
    total = steps_per_epoch * recipe.train.epochs
    total = min(total, recipe.train.max_steps or total)
    return Workload(
        sizes=sizes,
        steps=steps,
        world_size=world_size,
        steps_per_epoch=steps_per_epoch,
        total_steps=total,
        num_minings=_num_minings(recipe, -(-total // steps_per_epoch)),
    )


def _num_minings(recipe: Recipe, epochs: int) -> int:
    return sum(mines_at(recipe.mining, epoch) for epoch in range(epochs))


def _draws_hard_negatives(recipe: Recipe) -> bool:
    return (
        recipe.pool.num_hard_negatives > 0
        and recipe.objective.pool == "psl"
        and _num_minings(recipe, recipe.train.epochs) > 0
    )


def _random_shortlists(num_queries: int, size: int, num_labels: int) -> NDArray[np.int32]:
    """Returns int32 [N, K] random labels, none twice in a row, in the memory of one row each.

    Row i begins one place after row i - 1 in one long random sequence that repeats: queries far
    apart, such as those of a random batch, share labels no more than by chance.
    """
    size = min(size, num_labels)
    order = np.random.default_rng(0).permutation(num_labels).astype(np.int32)
    sequence = np.resize(order, num_queries + size)
    return as_strided(sequence, (num_queries, size), (sequence.itemsize,) * 2, writeable=False)
