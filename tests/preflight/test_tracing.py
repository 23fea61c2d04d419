"""FLOPs and bytes traced without numbers are those of the real model on real batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import make_inputs, write_recipe_file
from torch.nn.functional import normalize
from torch.utils.flop_counter import FlopCounterMode

from unidec_ds.assembly import build_model, make_planner
from unidec_ds.batch import make_batch
from unidec_ds.config import load_recipe
from unidec_ds.data.prepare import resolve_corpus
from unidec_ds.ds_config import load_ds_config
from unidec_ds.losses import head_loss
from unidec_ds.model import Chunk, Masks
from unidec_ds.preflight.tracing import Tally, chunk_working_bytes, trace_model
from unidec_ds.preflight.work import step_flops
from unidec_ds.preflight.workload import corpus_workload

CPU = torch.device("cpu")
HIDDEN, INTERMEDIATE, LAYERS = 16, 32, 2  # of tiny.bert_config


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"))


def load(inputs, **sections):
    recipe = load_recipe(str(write_recipe_file(inputs, **sections)))
    ds_config = load_ds_config(inputs / "ds_config.json", batch_size=12, world_size=1)
    corpus = resolve_corpus(recipe.corpus, recipe.encoder.name, 8, show_progress=False)
    return recipe, ds_config, corpus


def addmm_flops(out, left, right, *_, out_shape=None, **__):
    return 2 * left[0] * left[1] * right[1]


def counted_step(recipe, corpus):
    """FLOPs that torch counts in one real step: model, losses, backward."""
    planner = make_planner(corpus, recipe, corpus.train_query_ids())
    objective, train = recipe.objective, recipe.train
    batch = make_batch(
        planner.plan(0),
        corpus,
        rank=0,
        world_size=1,
        encoder_chunk=train.encoder_chunk,
        with_label_texts=objective.de != "none",
    )
    model = build_model(recipe, CPU).train()
    num_queries, num_texts = batch.query_sizes[0], len(batch.own_pool_with_text)
    rows = torch.randn(len(batch.own_pool), model.width).requires_grad_()
    masks = None
    if recipe.model.head_dropout:
        masks = Masks(*(torch.ones(n, model.width) for n in (num_queries, num_queries, num_texts)))
    # The loss accumulates with the in-place product, which torch's counter does not know.
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: addmm_flops})
    with counter:
        recompute = train.recompute and train.encoder_chunk > 0
        made = model(batch.chunks, batch.order, num_queries, num_texts, masks, recompute)
        sides = {
            "de": (made.query_de_BD, made.label_de_PD, batch.de_targets),
            "classifier": (normalize(made.query_classifier_BD), rows, batch.classifier_targets),
        }
        total = sum(
            weight
            * head_loss(
                getattr(objective, head),
                *sides[head],
                temperature=objective.temperature,
                l2q=objective.l2q,
                block_bytes=train.loss_block_bytes,
                combine_logsumexp=lambda x: x,
            ).total
            for head, weight in objective.head_weights.items()
        )
        total.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"train": {"recompute": False}},
        {"train": {"encoder_chunk": 0}},
        {"model": {"head_dropout": 0.1, "width": 12}},
        {"objective": {"de": "bce", "classifier": "bce"}},
        {"objective": {"de": "none"}},
        {"objective": {"classifier": "none"}},
    ],
    ids=str,
)
def test_a_steps_flops_are_what_torch_counts(inputs, sections):
    recipe, ds_config, corpus = load(inputs, **sections)
    shape = corpus_workload(corpus, recipe, 1).steps[0]
    flops = step_flops(recipe, shape, trace_model(recipe, ds_config, "cpu"))
    assert flops.total == counted_step(recipe, corpus)
    assert flops.encoder > flops.heads > 0


@pytest.mark.parametrize("length", [1, 3, 5, 8])
def test_an_encoders_flops_are_those_of_its_layers(inputs, length):
    recipe, ds_config, _ = load(inputs)
    cost = trace_model(recipe, ds_config, "cpu")
    projections = 4 * HIDDEN * HIDDEN + 2 * HIDDEN * INTERMEDIATE
    by_hand = LAYERS * (2 * length * projections + 4 * length * length * HIDDEN)
    assert cost.encoder_flops(7, length) == 7 * by_hand


@pytest.mark.parametrize(("texts", "length"), [(3, 5), (9, 8)])
def test_what_a_real_chunk_keeps_is_what_was_traced(inputs, texts, length):
    recipe, ds_config, _ = load(inputs)
    cost = trace_model(recipe, ds_config, "cpu")
    model = build_model(recipe, CPU).train()
    ids = torch.ones(texts, length, dtype=torch.int64)
    mask = torch.ones_like(ids)
    mask[:, -1] = 0  # padding, as the trace assumes
    with Tally(model) as tally:
        pooled = model.pool(Chunk(ids, mask))
        live_bytes = tally.live_bytes
        pooled.sum().backward()
        most_bytes = tally.most_bytes
    # Position ids, one row of int64 for all texts, are counted for each of them.
    assert cost.kept(texts, length) == live_bytes + (texts - 1) * 8 * length
    # Its working memory leaves out the gradients that the real one holds.
    working, _ = chunk_working_bytes(cost.model, texts, length)
    gradients = 4 * sum(p.numel() for p in model.parameters() if p.grad is not None)
    assert most_bytes - live_bytes - gradients <= working <= most_bytes


def test_autograd_saves_nearly_all_that_a_chunk_keeps(inputs):
    """Independent of `Tally`: what autograd packs, each storage once, parameters left out."""
    recipe, ds_config, _ = load(inputs)
    model = build_model(recipe, CPU).train()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.ones(9, 8, dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        pooled = model.pool(Chunk(ids, torch.ones_like(ids)))
    assert pooled.requires_grad
    kept = trace_model(recipe, ds_config, "cpu").kept(9, 8)
    assert 0.85 * kept < sum(saved.values()) <= kept


def test_bf16_keeps_less_and_fused_attention_no_square(inputs):
    recipe, ds_config, _ = load(inputs)
    on_cpu = trace_model(recipe, ds_config, "cpu")
    on_cuda = trace_model(recipe, ds_config, "cuda")
    (inputs / "bf16.json").write_text(
        '{"bf16": {"enabled": true}, "zero_optimization": {"stage": 1}}'
    )
    bf16 = load_ds_config(inputs / "bf16.json", batch_size=12, world_size=1)
    assert trace_model(recipe, bf16, "cpu").kept(4, 8) < on_cpu.kept(4, 8)
    kept = np.array([on_cuda.kept(1, length) for length in (2, 4, 6, 8)])
    assert not np.diff(kept, 2).any()
    assert np.diff([on_cpu.kept(1, length) for length in (2, 4, 6, 8)], 2).all()
