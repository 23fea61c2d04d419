"""Encoders: the packaged one with its checksum, a local folder, and names that lead nowhere."""

import pytest
import torch
from tiny import make_encoder
from torch import nn

from unidec_ds import encoders
from unidec_ds.encoders import (
    PACKAGED_ENCODER,
    EncoderConfig,
    check_encoder,
    load_encoder,
    load_tokenizer,
    resolve_encoder,
)
from unidec_ds.errors import UserError

CPU = torch.device("cpu")


def test_the_packaged_encoder_loads_without_a_pooler_and_embeds_sensibly():
    encoder = load_encoder(EncoderConfig(), CPU)
    assert not [name for name, _ in encoder.named_parameters() if "pooler" in name]
    assert {m.p for m in encoder.modules() if isinstance(m, nn.Dropout)} == {0.0}
    tokens = load_tokenizer(PACKAGED_ENCODER)(
        ["a small dog", "a little puppy", "tax law"], return_tensors="pt", padding=True
    )
    with torch.no_grad():
        states = encoder(**tokens).last_hidden_state
    weights = tokens["attention_mask"].unsqueeze(-1)
    vectors = nn.functional.normalize((states * weights).sum(1) / weights.sum(1), dim=-1)
    assert vectors[0] @ vectors[1] > 0.6 > vectors[0] @ vectors[2]


def test_an_altered_packaged_encoder_is_refused(monkeypatch):
    monkeypatch.setattr(encoders, "_PACKAGED_SHA256", "0" * 64)
    encoders._packaged_folder.cache_clear()
    with pytest.raises(UserError, match="has SHA-256 53aa5117"):
        resolve_encoder(PACKAGED_ENCODER)
    encoders._packaged_folder.cache_clear()


def test_a_folder_loads_with_its_dropout_set(tmp_path):
    name = make_encoder(tmp_path)
    encoder = load_encoder(EncoderConfig(name=name, dropout=0.25), CPU)
    assert {m.p for m in encoder.modules() if isinstance(m, nn.Dropout)} == {0.25}
    check_encoder(name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("packaged:other", "no packaged encoder"),
        ("./nowhere", "there is no folder"),
        ("/nowhere/at/all", "there is no folder"),
        ("nobody/no-such-model", "cannot be loaded"),
    ],
)
def test_names_that_lead_nowhere(name, message):
    with pytest.raises(UserError, match=message):
        check_encoder(name)


def test_a_folder_that_is_no_model(tmp_path):
    with pytest.raises(UserError, match=r"has no config\.json"):
        resolve_encoder(str(tmp_path))
