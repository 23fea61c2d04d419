"""Starts a run from the model of another one, on a label set that may have changed.

`train.py --init_from RUN`: encoder, heads and classifier rows come from the newest checkpoint of
RUN, all moments start at zero and the schedule begins anew. Rows are matched by label uid (by text
where a corpus has no uids). A label that RUN did not have starts from its text, as the classifier
head sees it; one that is gone is dropped.

`choose_warm_start` does what one process can do alone, before any process group exists; then
`WarmStart.load_model` and `fill_rows` fill this rank's. Any world size reads what any other wrote,
whatever `classifier.format` either has.

Cost: 32 bytes a label while matching; a rank reads the rows of the labels it owns from the mapped
checkpoint block by block, and the new labels' texts are encoded once, shared over the ranks.

Shape legend: n labels of a block, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from tqdm import tqdm

from unidec_ds import checkpoint, comm
from unidec_ds.assembly import SavedRows, model_shapes
from unidec_ds.classifier import partition
from unidec_ds.classifier.table import ClassifierTable
from unidec_ds.config import Recipe, load_recipe
from unidec_ds.data.corpus import Corpus
from unidec_ds.data.label_digests import FILE as LABEL_DIGESTS
from unidec_ds.data.label_digests import known_by, label_digests
from unidec_ds.data.pairs import Ids
from unidec_ds.data.prepare import resolve_corpus, tokenizer_hash
from unidec_ds.data.uids import UidDigests
from unidec_ds.embedding import BLOCK, embed_all
from unidec_ds.encoders import load_tokenizer
from unidec_ds.engine import Engine
from unidec_ds.errors import CheckpointError, UserError
from unidec_ds.manifest import ENCODER_FILE, load_tensors, read_manifest
from unidec_ds.model import UniDEC
from unidec_ds.run import WARM_START, read_json, write_json
from unidec_ds.search import fixed_blocks

_COPY_ROWS = 16_384


@dataclass(frozen=True)
class WarmStart:
    """What a run takes from another one: checked and matched, nothing read yet."""

    source: Path
    """The other run's directory."""
    checkpoint: Path
    """Its newest checkpoint."""
    source_rows: Ids
    """int64 [L], the label id there of each label, -1 for a new one."""
    details: dict[str, Any]
    """Plain data for people and for warm_start.json."""

    def describe(self) -> str:
        """Returns what is said on screen."""
        found = self.details
        lines = [
            f"warm start from {self.checkpoint}",
            f"  labels by {found['matched_by']}: {found['matched']:,} matched, "
            f"{found['new']:,} new, {found['dropped']:,} dropped",
        ]
        if found["new_without_text"]:
            lines.append(f"  {found['new_without_text']:,} new labels without text start at random")
        if found["repeated"]:
            lines.append(
                f"  {found['repeated']:,} labels repeat a {found['matched_by']}: the first was "
                "matched with the first, the second with the second"
            )
        if not found["rows"]:
            lines.append("  that run trained no classifier: every row starts from its label's text")
        if found["validation_may_be_known"]:
            lines.append(
                "  this corpus or its validation split differs: some validation queries may have "
                "been trained on there, and score too well"
            )
        return "\n".join(lines)

    def load_model(self, engine: Engine) -> None:
        """Reads all of the checkpoint through, sets encoder and heads; moments stay zero.

        Raises:
            CheckpointError: on every rank; a file is damaged.

        Collectives: those of `checkpoint.find_damage` and `Engine.load_state`.
        """
        if fault := checkpoint.find_damage(self.checkpoint):
            raise CheckpointError(f"--init_from: {fault}")
        manifest = read_manifest(self.checkpoint)
        tensors = load_tensors(self.checkpoint, manifest, ENCODER_FILE, verify=False)
        engine.load_state(tensors, num_updates=0)

    def fill_rows(
        self, table: ClassifierTable, model: UniDEC, corpus: Corpus, *, cosine: bool
    ) -> None:
        """Sets this rank's rows; moments stay zero.

        New labels get the classifier head's vector of their text: of length 1 where logits are
        cosines, of the matched rows' mean length where they are inner products.

        Args:
            table: fresh.
            model: encoder and heads, as `load_model` left them.
            corpus: the new corpus.
            cosine: whether the classifier's logits are cosines.

        Collectives: one all-reduce of 2 values and those of `start_rows_from_texts`; every rank
        must call.
        """
        from_texts, length = corpus.label_has_text, 1.0
        if self.details["rows"]:
            from_texts = from_texts & (self.source_rows < 0)
            length = self._copy_rows(table, next(model.parameters()).device)
        label_ids = np.flatnonzero(from_texts)
        start_rows_from_texts(model, table, corpus, label_ids, 1.0 if cosine else length)

    def _copy_rows(self, table: ClassifierTable, device: torch.device) -> float:
        """Copies the matched rows that this rank owns; returns the mean length of all of them."""
        saved, sums = SavedRows(self.checkpoint, verify=False), torch.zeros(2, dtype=torch.float64)
        for start, end in fixed_blocks(table.num_rows, _COPY_ROWS):
            label_ids = partition.label_ids(np.arange(start, end), table.rank, table.world_size)
            source_rows = self.source_rows[label_ids]
            known = source_rows >= 0
            rows_nD = saved.read(source_rows[known])
            table.write(label_ids[known], rows_nD)
            lengths = torch.linalg.vector_norm(rows_nD, dim=1, dtype=torch.float64)
            sums += torch.stack([lengths.sum(), torch.tensor(float(len(lengths)))])
        total, count = comm.all_reduce_sum(sums.to(device)).tolist()
        return total / count if total else 1.0


def choose_warm_start(
    run: Path,
    init_from: Path | None,
    resume: str | None,
    resume_from: Path | None,
    recipe: Recipe,
    corpus: Corpus,
) -> WarmStart | None:
    """Returns the warm start to make, None where there is none; makes no process group.

    A run that was begun from another one and has no checkpoint yet begins from it again, asked to
    or not.

    Args:
        run: the run directory.
        init_from: the directory of the run to start from, if asked for.
        resume: what `--resume` said.
        resume_from: the checkpoint that it means; the run goes on from there.
        recipe: what is to be trained.
        corpus: on what.

    Raises:
        UserError: `init_from` contradicts `resume` or how `run` was begun, or its model does not
            fit this one.
        CheckpointError: `init_from` is no run, or has no checkpoint.
    """
    if init_from is not None and resume not in (None, "auto"):
        raise UserError(
            f"--init_from {init_from} begins a new run, --resume {resume} continues one: give one "
            "of them, or --resume auto"
        )
    if (run / "config.yaml").exists():
        recorded = read_json(run / WARM_START).get("source")
        begun_from = Path(recorded) if recorded else None
        if init_from is not None and begun_from != init_from.resolve():
            raise UserError(
                f"--init_from: {run} was begun {f'from {begun_from}' if begun_from else 'cold'}, "
                f"not from {init_from}; leave --init_from out, or choose another --output"
            )
        init_from = begun_from
    if init_from is None or resume_from is not None:
        return None
    return plan_warm_start(init_from.resolve(), recipe, corpus)


def plan_warm_start(source: Path, recipe: Recipe, corpus: Corpus) -> WarmStart:
    """Returns how to start `recipe` on `corpus` from the run `source`; raises as above."""
    if not (source / "config.yaml").is_file():
        raise CheckpointError(
            f"--init_from: {source} is not a run directory, it has no config.yaml; give the "
            "--output of an earlier train.py"
        )
    newest = checkpoint.latest(source)
    if newest is None:
        raise CheckpointError(f"--init_from: {source} has no complete checkpoint yet")
    manifest = read_manifest(newest)
    source_recipe = load_recipe(str(source / "config.yaml"))
    _check_model(newest, source_recipe, recipe, corpus)
    known = _label_digests_of(source, source_recipe, manifest)
    wanted = label_digests(corpus)
    source_rows = wanted.rows_in(known)
    is_new = source_rows < 0
    matched = int((~is_new).sum())
    same_split = (
        manifest.get("corpus_fingerprint") == corpus.fingerprint
        and source_recipe.corpus.validation_fraction == recipe.corpus.validation_fraction
        and source_recipe.train.seed == recipe.train.seed
    )
    details = {
        "source": str(source),
        "checkpoint": newest.name,
        "matched_by": known_by(corpus),
        "matched": matched,
        "new": len(source_rows) - matched,
        "new_without_text": int((is_new & ~corpus.label_has_text).sum()),
        "dropped": len(known) - matched,
        "repeated": wanted.num_repeated() + known.num_repeated(),
        "rows": source_recipe.objective.classifier != "none",
        "validation_may_be_known": not same_split and recipe.corpus.validation_fraction > 0,
    }
    return WarmStart(source, newest, source_rows, details)


def write_warm_start(run: Path, warm_start: WarmStart) -> None:
    """Records what a run was begun from; before `write_run`, whose files make it a run."""
    run.mkdir(parents=True, exist_ok=True)
    write_json(run / WARM_START, warm_start.details)


def start_rows_from_texts(
    model: UniDEC, table: ClassifierTable, corpus: Corpus, label_ids: Ids, length: float = 1.0
) -> None:
    """Sets rows to the classifier head's vectors of their labels' own texts, of norm `length`.

    Args:
        model: encoder and heads.
        table: this rank's shard.
        corpus: where the texts are.
        label_ids: int64, ascending, the same on every rank; all have a text.
        length: of every row set.

    Collectives: those of `embed_all` for each block of labels; every rank must call.
    """
    with tqdm(total=len(label_ids), desc="rows from label texts", unit=" labels", leave=False,
              disable=not comm.is_main()) as bar:  # fmt: skip
        for start, end in fixed_blocks(len(label_ids), BLOCK * table.world_size):
            ids = label_ids[start:end]
            (vectors_nD,) = embed_all(
                model, corpus.labels, ids, ("classifier",), corpus.pad_token_id
            )
            own = partition.owner(ids, table.world_size) == table.rank
            own_vectors = vectors_nD[torch.from_numpy(own).to(vectors_nD.device)]
            table.write(ids[own], own_vectors * length)
            bar.update(end - start)


def _check_model(newest: Path, source: Recipe, recipe: Recipe, corpus: Corpus) -> None:
    """Raises UserError where the checkpoint's model is not of this recipe's kind."""
    faults = []
    needed = model_shapes(recipe)
    with safe_open(newest / ENCODER_FILE, "pt") as file:
        names = [name for name in file.keys() if not name.endswith((".exp_avg", ".exp_avg_sq"))]  # noqa: SIM118
        found = {name: tuple(file.get_slice(name).get_shape()) for name in names}
    different = sorted(
        name for name in found.keys() | needed.keys() if found.get(name) != needed.get(name)
    )
    if different:
        name = different[0]
        faults.append(
            f"encoder.name {recipe.encoder.name} and model.width {recipe.model.width} make another "
            f"model than {source.encoder.name} and {source.model.width} made there: "
            f"{len(different)} parameters differ, such as {name} (there "
            f"{list(found[name]) if name in found else 'absent'}, here "
            f"{list(needed[name]) if name in needed else 'absent'})"
        )
    if source.encoder.name != recipe.encoder.name:
        there = tokenizer_hash(load_tokenizer(source.encoder.name))
        if there != corpus.manifest["tokenizer"]:
            faults.append(
                f"encoder.name: {recipe.encoder.name} splits texts otherwise than "
                f"{source.encoder.name} does there"
            )
    if source.model.de_activation != recipe.model.de_activation:
        faults.append(
            f"model.de_activation: {recipe.model.de_activation}, there {source.model.de_activation}"
        )
    if faults:
        raise UserError(
            f"--init_from: the model of {newest} does not fit this recipe.\n  "
            + "\n  ".join(faults)
            + "\n  Use the values of that run, or start without --init_from."
        )


def _label_digests_of(source: Path, recipe: Recipe, manifest: dict[str, Any]) -> UidDigests:
    """Returns what `write_label_digests` wrote there, or makes it from the run's corpus."""
    if (source / LABEL_DIGESTS).is_file():
        digests = UidDigests.open(source / LABEL_DIGESTS)
        assert len(digests) == manifest["num_labels"], "digests of another corpus"
        return digests
    corpus = resolve_corpus(recipe.corpus, recipe.encoder.name, recipe.encoder.max_length)
    if corpus.fingerprint != manifest.get("corpus_fingerprint"):
        raise CheckpointError(
            f"--init_from: {source} has no {LABEL_DIGESTS}, and its corpus {corpus.path} has "
            "changed since: which label a row belongs to is not known. Put the corpus back as it "
            "was, under the corpus.path of that run."
        )
    return label_digests(corpus)
