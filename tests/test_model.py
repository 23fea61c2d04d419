"""The model: chunks and recompute change nothing, padding is not seen, heads are as defined."""

import pytest
import torch
from tiny import bert_config
from torch.nn.functional import normalize
from transformers import BertModel

from unidec_ds.batch import make_chunks
from unidec_ds.data.corpus import RaggedTokens
from unidec_ds.model import Masks, ModelConfig, UniDEC


def make_model(**settings):
    torch.manual_seed(0)
    config = bert_config(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return UniDEC(BertModel(config, add_pooling_layer=False), 16, ModelConfig(**settings))


def random_texts(count=13, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 9, (count,), generator=generator)
    values = torch.randint(4, 20, (int(lengths.sum()),), generator=generator)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    return RaggedTokens(values.int().numpy(), offsets.numpy())


def one_by_one(model, texts):
    pooled = []
    for start, end in zip(texts.offsets[:-1], texts.offsets[1:], strict=True):
        ids = torch.from_numpy(texts.values[start:end]).long()[None]
        pooled.append(model.encoder(input_ids=ids).last_hidden_state.mean(1))
    return torch.cat(pooled)


@pytest.mark.parametrize("chunk", [0, 1, 4, 100])
@pytest.mark.parametrize("recompute", [False, True])
def test_chunked_encoding_equals_one_text_at_a_time_and_so_do_its_gradients(chunk, recompute):
    texts, model = random_texts(), make_model()
    chunks, order = make_chunks(texts, chunk, pad_token_id=0)
    *out, query_clean, label_clean = model(chunks, order, 5, 8, None, recompute)
    assert torch.equal(query_clean, out[0])
    assert torch.equal(label_clean, out[2])
    assert not query_clean.requires_grad
    assert not label_clean.requires_grad
    loss = sum((part * torch.arange(16)).sum() for part in out)
    loss.backward()
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad(set_to_none=True)

    pooled = one_by_one(model, texts)
    de = normalize(torch.tanh(model.de_head(pooled)), dim=-1)
    classifier = model.classifier_head(pooled[:5])
    expected = (de[:5], classifier, de[5:])
    for got, want in zip(out, expected, strict=True):
        torch.testing.assert_close(got, want)
    sum((part * torch.arange(16)).sum() for part in expected).backward()
    wanted = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(grads) == len(wanted)
    for got, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_two_steps_under_recompute_follow_the_loss_of_no_recompute():
    """The reentrant kind of checkpointing gives silently wrong gradients here."""
    losses = {}
    for recompute in (False, True):
        model, texts = make_model(), random_texts()
        chunks, order = make_chunks(texts, 3, pad_token_id=0)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        losses[recompute] = []
        for _ in range(3):
            out = model(chunks, order, 5, 8, None, recompute)
            loss = (out.query_de_BD @ out.label_de_PD.T).sum() + out.query_classifier_BD.pow(
                2
            ).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[recompute].append(loss.item())
    assert losses[True] == pytest.approx(losses[False], rel=1e-5)
    assert losses[False][2] != pytest.approx(losses[False][0], rel=1e-3)


def test_identity_heads_without_activation_are_the_encoders_own_embedding():
    model, texts = make_model(head_init="identity", de_activation="none"), random_texts()
    chunks, order = make_chunks(texts, 4, pad_token_id=0)
    out = model(chunks, order, 13, 0)
    pooled = one_by_one(model, texts)
    torch.testing.assert_close(out.query_de_BD, normalize(pooled, dim=-1))
    torch.testing.assert_close(out.query_classifier_BD, pooled)
    assert out.label_de_PD.shape == (0, 16)


def test_masks_drop_before_the_norm_and_embeddings_are_fp32_under_bf16():
    model, texts = make_model().bfloat16(), random_texts()
    chunks, order = make_chunks(texts, 4, pad_token_id=0)
    mask = torch.ones(5, 16)
    mask[:, 3] = 0.0
    out = model(chunks, order, 5, 8, Masks(mask, mask, torch.ones(8, 16)))
    assert all(part.dtype is torch.float32 for part in out)
    assert (out.query_de_BD[:, 3] == 0).all()
    assert (out.query_classifier_BD[:, 3] == 0).all()
    torch.testing.assert_close(out.query_de_BD.norm(dim=1), torch.ones(5))
    unmasked = model(chunks, order, 5, 8)
    for clean in ("query_de_clean_BD", "label_de_clean_PD"):
        assert not getattr(out, clean).requires_grad
        assert torch.equal(getattr(out, clean), getattr(unmasked, clean))


def test_a_rank_without_texts_still_runs_the_encoder_and_gives_zero_gradients():
    model = make_model()
    texts = RaggedTokens(random_texts().values[:0], random_texts().offsets[:1])
    chunks, order = make_chunks(texts, 4, pad_token_id=0)
    out = model(chunks, order, 0, 0)
    sum(part.sum() for part in out).backward()
    gradients = [p.grad for p in model.parameters()]
    assert all(g is not None and not g.any() for g in gradients)
