"""Learning rates are a pure function of the step; groups follow role and decay."""

import pytest
import torch
from torch import nn

from unidec_ds.optim import OptimizerConfig, learning_rates, parameter_groups


def test_warm_up_then_linear_to_zero():
    config = OptimizerConfig(encoder_lr=0.1, head_lr=0.2, row_lr=0.4, warmup_steps=4)
    rates = [learning_rates(config, step, 12) for step in range(12)]
    factors = [rate.encoder / 0.1 for rate in rates]
    expected = [0.25, 0.5, 0.75, 1.0, *(1 - i / 8 for i in range(8))]
    assert factors == pytest.approx(expected)
    assert all(r.head == pytest.approx(2 * r.encoder) for r in rates)
    assert all(r.row == pytest.approx(4 * r.encoder) for r in rates)


def test_fraction_and_no_warm_up():
    config = OptimizerConfig(encoder_lr=1.0, warmup_fraction=0.25)
    assert learning_rates(config, 0, 8).encoder == pytest.approx(0.5)
    config = OptimizerConfig(encoder_lr=1.0, warmup_steps=0)
    assert learning_rates(config, 0, 8).encoder == 1.0
    assert learning_rates(config, 7, 8).encoder == pytest.approx(1 / 8)


def test_groups_name_every_trained_parameter_once_and_spare_biases_and_norms():
    model = nn.Module()
    model.encoder = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    model.de_head = nn.Linear(4, 4)
    model.frozen = nn.Linear(4, 4).requires_grad_(False)
    groups = parameter_groups(model, OptimizerConfig(weight_decay=0.1))
    grouped = [id(p) for group in groups for p in group["params"]]
    trained = [id(p) for p in model.parameters() if p.requires_grad]
    assert sorted(grouped) == sorted(trained)
    for group in groups:
        assert group["weight_decay"] == (0.1 if group["params"][0].ndim > 1 else 0.0)
        assert group["lr"] == (1e-4 if group["role"] == "encoder" else 2e-4)
    torch.optim.AdamW(groups)
