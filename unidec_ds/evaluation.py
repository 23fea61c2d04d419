"""Exact, filtered evaluation in every view, at any number of ranks.

Three views of one model: the dual encoder alone (cosine of g1), the classifier alone, and unified:
the L2-normalised vectors of both concatenated, so that its score is cos_DE + cos_classifier, one
inner-product search. With another weight w of the dual encoder the unified score is
2·(w·cos_DE + (1-w)·cos_classifier); `unified` chooses one on the validation queries. A fourth view,
"encoder", ranks by the encoder's own embeddings: evaluated before training it is the untrained
baseline.

Flow: all query vectors are made once and held on every rank (N·2D·4 bytes); then labels stream
past in blocks of fixed ids, shared over the ranks in turn. A block's owner encodes its texts,
receives its classifier rows from their owners, and merges the scores into one running top-k per
view. No label matrix ever exists. Filter pairs are masked inside the block, so removing them
costs no depth. Blocks are cut at the same places at any world size, and ties go by label id, so
the result is the same too.

Shape legend: N queries, L labels, D width, K top-k, W ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Literal, Protocol, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize
from tqdm import tqdm

from unidec_ds import comm
from unidec_ds.classifier import partition
from unidec_ds.data.corpus import Corpus
from unidec_ds.data.keyed import hash64
from unidec_ds.data.pairs import Ids, Pairs
from unidec_ds.embedding import BLOCK, View, embed, embed_all
from unidec_ds.metrics import (
    FrequencyBin,
    frequency_breakdown,
    inverse_propensity,
    score_predictions,
)
from unidec_ds.model import UniDEC
from unidec_ds.search import TopK, fixed_blocks, query_block
from unidec_ds.settings import Settings

KS = (1, 3, 5, 10, 100)
SearchView = Literal["encoder", "de", "classifier", "unified"]
EQUAL_WEIGHT = 0.5
"""Weight of the dual encoder in the view "unified"."""
Split = Literal["train", "test"]


class EvaluationConfig(Settings):
    """What is measured, and when."""

    propensity: tuple[Annotated[float, Field(ge=0)], Annotated[float, Field(gt=0)]] = (0.55, 1.5)
    """(a, b) of the inverse propensities. Published code disagrees on them; every PSP is printed
    with its pair."""
    every_epochs: Annotated[int, Field(ge=0)] = 1
    """Evaluate on the validation queries after every n-th epoch; 0 never does."""
    max_queries: Annotated[int, Field(ge=0)] = 0
    """Evaluate on this many queries, a seeded sample; 0 takes all."""
    tune_unified: bool = True
    """Where validation queries exist and both heads are trained: after training choose the weight
    of the dual encoder in the unified view on them, and report it as the view `unified_tuned`
    beside the equal weighting. Costs one more evaluation of the validation queries."""
    projector_labels: Annotated[int, Field(ge=0, le=100_000)] = 2000
    """Labels whose DE vectors go to TensorBoard's projector after training, a seeded sample; 0 =
    none. Costs some 8 bytes of disk per label and dimension."""

    def sampled(self, num_queries: int) -> int:
        """Returns how many of these queries an evaluation takes."""
        return min(num_queries, self.max_queries or num_queries)


class RowSource(Protocol):
    """Where classifier rows are read from: the table in training, or a checkpoint."""

    def read(self, label_ids: Ids) -> Tensor:
        """Returns rows that this rank holds, fp32 [n, D] on the host."""
        ...


@dataclass(frozen=True)
class Predictions:
    """The best labels of each query in one view; -1 and -inf where there are fewer than K."""

    label_ids: Ids
    """int64 [N, K], best first."""
    scores: NDArray[np.float32]
    """fp32 [N, K]."""


@dataclass(frozen=True)
class Evaluation:
    """Metrics and predictions of each view, the same on every rank."""

    query_ids: Ids
    """The queries evaluated."""
    metrics: dict[str, dict[str, float]]
    """By view, then by name: {"unified": {"P@1": percent, ...}, ...}."""
    predictions: dict[str, Predictions]
    """By view; on rank 0 only, empty elsewhere."""
    breakdown: dict[str, list[FrequencyBin]]
    """The views' parts by train frequency of the label: [head, torso, tail]; rank 0 only."""
    num_all_queries: int
    """Number of queries that `query_ids` are a sample of, or their own number."""

    def describe_queries(self) -> str:
        """Returns how many queries were evaluated, in words."""
        if len(self.query_ids) == self.num_all_queries:
            return f"{self.num_all_queries:,} queries"
        return f"a sample of {len(self.query_ids):,} of {self.num_all_queries:,} queries"


def sample_queries(query_ids: Ids, max_queries: int, seed: int) -> Ids:
    """Returns `max_queries` of the queries, ascending; all of them if 0 or there are fewer."""
    if not max_queries or max_queries >= len(query_ids):
        return query_ids
    keys = hash64(seed, "evaluation queries", query_ids)
    return np.sort(query_ids[np.argsort(keys)[:max_queries]])


def evaluate(
    model: UniDEC,
    rows: RowSource | None,
    corpus: Corpus,
    query_ids: Ids,
    *,
    split: Split,
    views: tuple[SearchView, ...],
    cosine_classifier: bool,
    propensity: tuple[float, float],
    unified_weights: Mapping[str, float] | None = None,
    num_all_queries: int | None = None,
    title: str = "evaluating",
) -> Evaluation:
    """Ranks all labels for `query_ids` in each view and scores the rankings.

    Args:
        model: encoder and heads, on this rank's device.
        rows: the classifier rows; None if no view needs them.
        corpus: texts, truth and filter pairs.
        query_ids: int64 [N], queries of `split`.
        split: which table and truth `query_ids` index.
        views: what to rank by.
        cosine_classifier: whether the classifier view normalises the rows, as its loss did.
        propensity: (a, b); propensities always come from the full train positives.
        unified_weights: further rankings by name, each the unified view with this weight of the
            dual encoder, from 0 to 1.
        num_all_queries: what `query_ids` are a sample of; None if they are all.
        title: of the progress bar, drawn on rank 0.

    Collectives: one all-reduce of the query vectors, one gather of rows per block of labels, one
    gather of N·K keys per view; every rank must call.
    """
    tops = search_labels(
        model,
        rows,
        corpus,
        query_ids,
        split=split,
        views=views,
        cosine_classifier=cosine_classifier,
        unified_weights=unified_weights,
        k=max(KS),
        title=title,
    )
    predictions: dict[str, Predictions] = {}
    metrics: dict[str, dict[str, float]] = {}
    breakdown: dict[str, list[FrequencyBin]] = {}
    if comm.is_main():
        q_l = inverse_propensity(corpus.positives["train"], *propensity)
        truth = _rows(corpus.positives[split], query_ids)
        train_counts = corpus.positives["train"].column_counts()
        for view, top in tops.items():
            scores, label_ids = top.result()
            predictions[view] = Predictions(label_ids.cpu().numpy(), scores.cpu().numpy())
            metrics[view] = score_predictions(
                truth, predictions[view].label_ids, inverse_propensity=q_l, ks=KS
            )
            breakdown[view] = frequency_breakdown(
                truth, predictions[view].label_ids, train_counts=train_counts, ks=KS
            )
    return Evaluation(
        query_ids,
        comm.broadcast_object(metrics),
        predictions,
        breakdown,
        len(query_ids) if num_all_queries is None else num_all_queries,
    )


@torch.no_grad()
def search_labels(
    model: UniDEC,
    rows: RowSource | None,
    corpus: Corpus,
    query_ids: Ids,
    *,
    split: Split,
    views: tuple[SearchView, ...],
    cosine_classifier: bool,
    unified_weights: Mapping[str, float] | None,
    k: int,
    title: str,
) -> dict[str, TopK]:
    """Returns each view's running top-k over all labels, by name; complete on rank 0 only.

    Args: as in `evaluate`; `k` labels are kept per query.
    """
    weights = {"unified": EQUAL_WEIGHT} if "unified" in views else {}
    weights.update(unified_weights or {})
    heads = _heads(views, with_unified=bool(weights))
    with tqdm(
        total=len(query_ids) + corpus.num_labels,
        desc=title,
        unit=" texts",
        disable=not comm.is_main(),
        leave=False,
    ) as bar:
        queries = dict(
            zip(
                heads,
                embed_all(
                    model, corpus.queries[split], query_ids, heads, corpus.pad_token_id, bar.update
                ),
                strict=True,
            )
        )
        device = next(model.parameters()).device
        names = dict.fromkeys((*views, *weights))
        tops = {name: TopK(len(query_ids), k, device) for name in names}
        exclude = _rows(corpus.filter_pairs[split], query_ids)
        for first_label, labels in _label_vectors(model, rows, corpus, heads, bar):
            no_text = ~corpus.label_has_text[first_label : first_label + BLOCK]
            _merge_block(
                queries,
                labels,
                tops,
                first_label,
                torch.from_numpy(np.flatnonzero(no_text)).to(device),
                exclude,
                cosine_classifier,
                weights,
            )
    for top in tops.values():
        for keys in comm.gather_tensors(top.keys_QK)[1:]:
            top.merge_keys(keys)
    return tops


def _heads(views: tuple[SearchView, ...], with_unified: bool) -> tuple[View, ...]:
    wanted = set(views) | ({"de", "classifier"} if with_unified else set())
    return tuple(head for head in get_args(View) if head in wanted)


def _label_vectors(
    model: UniDEC,
    rows: RowSource | None,
    corpus: Corpus,
    heads: tuple[View, ...],
    bar: tqdm,  # type: ignore[type-arg]
) -> Iterator[tuple[int, dict[View, Tensor]]]:
    """Yields the first label id and the label vectors of each block that this rank owns."""
    device = next(model.parameters()).device
    text_heads = tuple(head for head in heads if head != "classifier")
    for number, (start, end) in enumerate(fixed_blocks(corpus.num_labels, BLOCK)):
        owner = number % comm.world_size()
        ids = np.arange(start, end)
        vectors: dict[View, Tensor] = {}
        if "classifier" in heads:
            assert rows is not None
            block_rows = gather_rows(rows, ids, owner, device)
            if block_rows is not None:
                vectors["classifier"] = block_rows
        if owner == comm.rank():
            made = embed(model, corpus.labels, ids, text_heads, corpus.pad_token_id)
            vectors.update(zip(text_heads, made, strict=True))
            yield start, vectors
        bar.update(end - start)


def gather_rows(
    rows: RowSource, label_ids: Ids, rank_to: int, device: torch.device
) -> Tensor | None:
    """Returns the classifier rows of `label_ids` on rank `rank_to`, fp32 [n, D] on `device`.

    Collectives: one gather; every rank must call.
    """
    owners = partition.owner(label_ids, comm.world_size())
    sizes = np.bincount(owners, minlength=comm.world_size()).tolist()
    own_rows = rows.read(label_ids[owners == comm.rank()]).to(device)
    parts = comm.gather_rows_to(rank_to, own_rows, sizes)
    if parts is None:
        return None
    gathered = own_rows.new_empty(len(label_ids), own_rows.shape[1])
    for rank, part in enumerate(parts):
        gathered[torch.from_numpy(owners == rank).to(device)] = part
    return gathered


def _merge_block(
    queries: dict[View, Tensor],
    labels: dict[View, Tensor],
    tops: dict[str, TopK],
    first_label: int,
    no_text: Tensor,
    exclude: Pairs,
    cosine_classifier: bool,
    weights: Mapping[str, float],
) -> None:
    """Merges every ranking's scores of one block of labels into its top-k."""
    some_queries = next(iter(queries.values()))
    for first_query, end_query in fixed_blocks(len(some_queries), query_block(some_queries.device)):
        part = {head: vectors[first_query:end_query] for head, vectors in queries.items()}
        for name, scores_BL in _scores(part, labels, no_text, cosine_classifier, weights):
            if name in tops:
                tops[name].update(
                    scores_BL, first_query=first_query, first_label=first_label, exclude=exclude
                )


def _scores(
    queries: dict[View, Tensor],
    labels: dict[View, Tensor],
    no_text: Tensor,
    cosine_classifier: bool,
    weights: Mapping[str, float],
) -> Iterator[tuple[str, Tensor]]:
    """Yields each ranking's name and scores [B, L] of one block; the caller may overwrite them.

    Labels without a text live on their row alone: their cosine_DE is 0 in a unified score.
    """
    scores = {
        head: queries[head] @ vectors.T for head, vectors in labels.items() if head != "classifier"
    }
    for scores_BL in scores.values():
        scores_BL[:, no_text] = 0.0
    if "classifier" in labels:
        cosine_BL = queries["classifier"] @ normalize(labels["classifier"], dim=-1).T
        for name, weight in weights.items():
            yield name, unified_score(scores["de"], cosine_BL, weight)
        yield (
            "classifier",
            cosine_BL if cosine_classifier else queries["classifier"] @ labels["classifier"].T,
        )
    for head, scores_BL in scores.items():
        scores_BL[:, no_text] = -torch.inf
        yield head, scores_BL


def unified_score(cosine_de: Tensor, cosine_classifier: Tensor, weight_de: float) -> Tensor:
    """Returns 2·(w·cos_DE + (1-w)·cos_classifier), a new tensor; at w = 1/2 their plain sum."""
    return (2 * weight_de * cosine_de).add_(cosine_classifier, alpha=2 * (1 - weight_de))


def _rows(pairs: Pairs, rows: Ids) -> Pairs:
    """Returns the pairs of `rows`, renumbered 0..len(rows) - 1."""
    row, column = pairs.take(rows)
    return Pairs.from_pairs(row, column, len(rows), pairs.num_columns)


def format_table(metrics: dict[str, dict[str, float]], propensity: tuple[float, float]) -> str:
    """Returns the table people read: one line per view, percent."""
    columns = ("P@1", "P@3", "P@5", "nDCG@5", "PSP@1", "PSP@5", "R@10", "R@100")
    width = max(len(name) for name in metrics)
    lines = [" " * width + "".join(f"{column:>8}" for column in columns)]
    for name, values in metrics.items():
        lines.append(f"{name:<{width}}" + "".join(f"{values[c]:8.2f}" for c in columns))
    lines.append(f"percent; PSP with a={propensity[0]} b={propensity[1]}")
    return "\n".join(lines)


def format_breakdown(bins: list[FrequencyBin]) -> str:
    """Returns the lines people read about one view's head, torso and tail."""
    columns = ("P@1", "P@5", "R@10", "R@100")
    lines = [f"{'train positives':>22}{'labels':>9}" + "".join(f"{name:>8}" for name in columns)]
    for part in bins:
        counts = f"{part.min_count:,}"
        if part.max_count != part.min_count:
            counts += f" to {part.max_count:,}"
        scores = "".join(f"{part.scores[name]:8.2f}" for name in columns)
        lines.append(f"{part.name:<6}{counts:>16}{part.num_labels:9,}{scores}")
    lines.append("P: the part of all queries' P, the three add up; R: of this part's true labels")
    return "\n".join(lines)
