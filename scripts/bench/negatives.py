"""Measures how hard a trained run's pools are with random and clustered batches, mined or not.

    python scripts/bench/negatives.py RUN [--quick] [--json FILE] [--corpus DIR]

Mines with the run's newest checkpoint, plans some batches of the next epoch in each way, and asks
the same dual encoder how hard the negatives are that a batch's queries meet in its pool. The
negatives of a query are the pool's labels that have a text and are neither its positives nor its
filter pairs.

- cos: mean cosine of a query with its negatives; `cos 10` with the ten hardest of them.
- rank: mean rank of the negatives among all labels that could be a negative of the query, 1 =
  hardest; `rank 10` of the ten hardest (5.5 would be the ten hardest there are).
- mined: labels of the pool that came in as hard negatives and are nobody's sampled positive.
- shared: share of the pool that are positives of two or more of the batch's queries.

"kept vectors": mined from the vectors that the training steps made (`mining.source: cached`),
where the run has them. Ranks take every label into account; a query against all labels is one row
of a matrix product, so this is for corpora up to a million labels or so.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from unidec_ds.assembly import LoadedRun, load_run, make_planner, split_train_queries
from unidec_ds.data.pairs import Pairs
from unidec_ds.data.pool import Planner, StepPlan
from unidec_ds.embedding import embed_all
from unidec_ds.manifest import read_manifest
from unidec_ds.mining.mine import mine
from unidec_ds.mining.mined import Mined
from unidec_ds.mining.vector_cache import FreshVectors, open_fresh
from unidec_ds.search import fixed_blocks, mask_pairs

HARDEST = 10
BLOCK = 256  # queries compared with all labels at once


def mine_here(
    run: LoadedRun, planner: Planner, train_ids: np.ndarray, folder: Path, kept: FreshVectors | None
) -> Mined:
    """Returns shortlists and clusters by the run's weights."""
    return mine(
        run.model,
        run.corpus,
        train_ids,
        config=run.recipe.mining,
        num_clusters=planner.steps_per_epoch,
        folder=folder,
        epoch=0,
        seed=run.recipe.train.seed,
        kept=kept,
    )


def kept_vectors(run: LoadedRun, step: int, steps_per_epoch: int) -> FreshVectors | None:
    """Returns the vectors that the run's steps kept, None if it kept none."""
    max_age_steps = max(1, run.recipe.mining.every_epochs) * steps_per_epoch
    return open_fresh(
        run.folder / "mining" / "vectors",
        {"queries": len(run.corpus.queries["train"]), "labels": run.corpus.num_labels},
        run.model.width,
        {"corpus_fingerprint": run.corpus.fingerprint},
        step,
        max_age_steps,
    )


def measure(
    run: LoadedRun, plan: StepPlan, queries_BD: Tensor, labels_LD: Tensor
) -> dict[str, float]:
    """Returns one batch's figures.

    Args:
        run: the run.
        plan: the batch and its pool.
        queries_BD: vectors of its queries.
        labels_LD: vectors of all labels.
    """
    has_text = torch.tensor(run.corpus.label_has_text).to(labels_LD.device)
    pool = torch.from_numpy(plan.label_ids).to(labels_LD.device)
    barred = []
    for pairs in (run.corpus.positives["train"], run.corpus.filter_pairs["train"]):
        rows, columns = pairs.take(plan.query_ids)
        barred.append(Pairs.from_pairs(rows, columns, len(plan.query_ids), pairs.num_columns))
    sums = dict.fromkeys(("cos", "cos 10", "rank", "rank 10"), 0.0)
    counts = dict.fromkeys(sums, 0)
    for start, end in fixed_blocks(len(queries_BD), BLOCK):
        scores_BL = queries_BD[start:end] @ labels_LD.T
        scores_BL[:, ~has_text] = -torch.inf
        for pairs in barred:
            mask_pairs(scores_BL, pairs, first_query=start, first_label=0)
        # Ranks by counting what is larger, in one sorted row per query.
        ascending_BL = scores_BL.sort(dim=1).values
        hardest_BP = scores_BL[:, pool].sort(dim=1, descending=True).values
        larger = torch.searchsorted(ascending_BL, hardest_BP.contiguous(), right=True)
        rank_BP = (scores_BL.shape[1] - larger + 1).double()
        is_negative_BP = hardest_BP.isfinite()
        for suffix, width in (("", hardest_BP.shape[1]), (" 10", HARDEST)):
            chosen = is_negative_BP[:, :width]
            for name, values in (("cos", hardest_BP), ("rank", rank_BP)):
                sums[name + suffix] += float(values[:, :width][chosen].double().sum())
                counts[name + suffix] += int(chosen.sum())
    figures = {name: sums[name] / max(1, counts[name]) for name in sums}
    per_label = np.bincount(plan.positive_pool, minlength=len(plan.label_ids))
    figures["pool"] = len(plan.label_ids)
    figures["mined"] = plan.num_hard_negatives
    figures["shared"] = float(np.mean(per_label >= 2))
    return figures


def main() -> None:
    """Prints one table and writes what it holds."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("run", type=Path, help="run directory")
    parser.add_argument("--quick", action="store_true", help="2 batches a way instead of 16")
    parser.add_argument("--corpus", type=Path, help="where the corpus is now")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    run = load_run(arguments.run, device, arguments.corpus)
    step = int(read_manifest(run.checkpoint)["step"])
    train_ids, _ = split_train_queries(run.corpus, run.recipe)
    planner = make_planner(run.corpus, run.recipe, train_ids)
    steps_per_epoch = planner.steps_per_epoch
    epoch = -(-step // steps_per_epoch)
    num_batches = min(2 if arguments.quick else 16, steps_per_epoch)
    spread = np.linspace(0, steps_per_epoch - 1, num_batches).astype(int)
    steps = (epoch * steps_per_epoch + spread).tolist()

    with tempfile.TemporaryDirectory() as folder:
        mined = mine_here(run, planner, train_ids, Path(folder) / "encoded", None)
        kept = kept_vectors(run, step, steps_per_epoch)
        sources = {"": mined}
        if kept is not None:
            sources[", kept vectors"] = mine_here(
                run, planner, train_ids, Path(folder) / "kept", kept
            )
        ways = {}
        for batches in ("random", "clustered"):
            clusters = mined.clusters if batches == "clustered" else None
            ways[batches, "none"] = planner.with_mined(None, clusters)
            for source, found in sources.items():
                clusters = found.clusters if batches == "clustered" else None
                ways[batches, f"mined{source}"] = planner.with_mined(found.shortlists, clusters)
        if kept is not None:
            same = agreement(sources[", kept vectors"], mined, train_ids)
            print(f"{same:.1%} of the shortlists' entries are the same with kept vectors\n")

        (labels_LD,) = embed_all(
            run.model,
            run.corpus.labels,
            np.arange(run.corpus.num_labels),
            ("de",),
            run.corpus.pad_token_id,
        )
        results = []
        for (batches, negatives), way in ways.items():
            batch_figures = []
            for number in steps:
                plan = way.plan(number)
                (queries_BD,) = embed_all(
                    run.model,
                    run.corpus.queries["train"],
                    plan.query_ids,
                    ("de",),
                    run.corpus.pad_token_id,
                )
                batch_figures.append(measure(run, plan, queries_BD, labels_LD))
            means = {
                name: float(np.mean([figures[name] for figures in batch_figures]))
                for name in batch_figures[0]
            }
            if not results:
                print("| batches | negatives | " + " | ".join(means) + " |")
                print("|---|---|" + "--:|" * len(means))
            results.append({"batches": batches, "negatives": negatives, **means})
            cells = " | ".join(
                f"{value:.3f}" if value < 1 else f"{value:,.1f}" for value in means.values()
            )
            print(f"| {batches} | {negatives} | {cells} |", flush=True)
    print(f"\n{arguments.run}, step {step}; means of {num_batches} batches")
    if arguments.json:
        about = {"run": str(arguments.run), "step": step, "batches": num_batches}
        arguments.json.write_text(json.dumps({**about, "results": results}, indent=2) + "\n")


def agreement(one: Mined, other: Mined, train_ids: np.ndarray) -> float:
    """Returns the share of a shortlist's entries that the other has too, mean over queries."""
    first, second = one.shortlists[train_ids], other.shortlists[train_ids]
    is_there = (first[:, :, None] == second[:, None, :]).any(2) & (first >= 0)
    return float(is_there.sum() / max(1, (first >= 0).sum()))


if __name__ == "__main__":
    main()
