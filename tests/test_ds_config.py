"""The ds_config: what is accepted, what is refused and with which words."""

import json

import pytest

from unidec_ds.ds_config import load_ds_config
from unidec_ds.errors import ConfigError, UserError


def load(tmp_path, content, batch_size=10, world_size=3):
    path = tmp_path / "ds.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return load_ds_config(path, batch_size=batch_size, world_size=world_size)


ZERO = {"zero_optimization": {"stage": 2}}


def test_the_engines_copy_has_integers_for_the_batch(tmp_path):
    config = load(tmp_path, {**ZERO, "train_micro_batch_size_per_gpu": "auto"})
    copy = config.for_engine(10, 3)
    assert copy["train_micro_batch_size_per_gpu"] == 4
    assert copy["train_batch_size"] == 12
    assert copy["gradient_accumulation_steps"] == 1
    assert config.content["train_micro_batch_size_per_gpu"] == "auto"
    assert config.dtype == "fp32"


def test_nvme_is_for_the_table_and_the_encoder_stays_on_the_host(tmp_path):
    offload = {"device": "nvme", "nvme_path": "/fast"}
    config = load(tmp_path, {"zero_optimization": {"stage": 1, "offload_optimizer": offload}})
    assert config.offload == offload
    copied = config.for_engine(10, 1)["zero_optimization"]["offload_optimizer"]
    assert copied == {"device": "cpu"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({**ZERO, "fp16": {"enabled": True}}, "fp16.enabled: fp16 is refused"),
        ({**ZERO, "gradient_accumulation_steps": 4}, "train.encoder_chunk"),
        ({**ZERO, "train_batch_size": 64}, "the recipe's train.batch_size 10"),
        ({**ZERO, "train_micro_batch_size_per_gpu": 3}, "needs 4"),
        ({**ZERO, "optimizer": {"type": "Adam"}}, "set optimizer.encoder_lr"),
        ({**ZERO, "scheduler": {"type": "WarmupLR"}}, "optimizer.warmup_steps"),
        ({**ZERO, "gradient_cliping": 1.0}, "did you mean gradient_clipping?"),
        ({**ZERO, "gradient_clipping": -1}, "needs a number >= 0"),
        ({**ZERO, "bf16": True}, "bf16.enabled"),
        ({}, "zero_optimization: needs a section"),
        ({"zero_optimization": {"stage": 3}}, "3 is refused: it would gather every encoder layer"),
        ({"zero_optimization": {"stage": 7}}, "needs 0, 1 or 2"),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "gpu"}}},
            "needs cpu, nvme or none",
        ),
        (
            {"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}},
            "needs stage 1 or 2",
        ),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme"}}},
            "nvme_path: needed",
        ),
        ({"zero_optimization": {"stage": 2, "offload_param": {}}}, "offload_param"),
        ({**ZERO, "sparse_gradients": True}, "outside ZeRO"),
        ('{"zero_optimization": {"stage": 2,}}', "line 1 column"),
        ('{"bf16": {}, "bf16": {}}', "given twice"),
        ("[]", "one JSON object"),
    ],
)
def test_refusals(tmp_path, content, message):
    with pytest.raises(ConfigError) as error:
        load(tmp_path, content)
    assert message in str(error.value)


def test_all_faults_are_listed_at_once(tmp_path):
    with pytest.raises(ConfigError) as error:
        load(tmp_path, {"fp16": {"enabled": True}, "optimizer": {}, "zero_optimization": {}})
    assert len(error.value.faults) == 3


def test_agreeing_batch_keys_are_accepted(tmp_path):
    given = {**ZERO, "train_batch_size": 12, "train_micro_batch_size_per_gpu": 4}
    assert load(tmp_path, given).content == given
    given = {**ZERO, "train_batch_size": 10, "gradient_accumulation_steps": "auto"}
    assert load(tmp_path, given).for_engine(10, 3)["train_batch_size"] == 12


def test_a_missing_file_says_where_to_look(tmp_path):
    with pytest.raises(UserError, match=r"ds_configs/README\.md"):
        load_ds_config(tmp_path / "none.json", batch_size=1, world_size=1)
