"""Recipes: strict, every fault at once, overrides, and what the sections demand of each other."""

import pytest
from tiny import recipe_text

from unidec_ds.config import load_recipe, recipe_names, write_recipe
from unidec_ds.errors import ConfigError, UserError


def test_every_shipped_recipe_loads():
    assert {"quickstart", "lf-wordnet-84k", "lf-amazontitles-131k"} <= set(recipe_names())
    for name in recipe_names():
        assert load_recipe(name).train.batch_size > 0


def test_all_faults_are_listed_at_once_with_key_value_and_nearest_spelling(tmp_path):
    file = tmp_path / "r.yaml"
    text = recipe_text(
        tmp_path,
        train={"batch_siz": 4, "epochs": 0},
        optimizer={"row_lr": "fast"},
        objective={"de": "softmx"},
        pol={"size": 3},
    )
    file.write_text(text)
    with pytest.raises(ConfigError) as error:
        load_recipe(str(file))
    faults = "\n".join(error.value.faults)
    assert len(error.value.faults) == 5
    assert "train.batch_siz: unknown key; did you mean batch_size?" in faults
    assert "train.epochs: found 0;" in faults
    assert 'optimizer.row_lr: found "fast";' in faults
    assert 'objective.de: found "softmx";' in faults
    assert "pol: unknown key; did you mean pool?" in faults


def test_overrides_are_yaml_1_2_and_checked_like_the_file(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text(recipe_text(tmp_path))
    recipe = load_recipe(
        str(file),
        ["optimizer.row_lr=1e-2", "evaluation.propensity=[0.6, 2.6]", "train.max_steps=7"],
    )
    assert recipe.optimizer.row_lr == 0.01
    assert recipe.evaluation.propensity == (0.6, 2.6)
    assert recipe.train.max_steps == 7
    with pytest.raises(ConfigError, match=r"section\.key=value"):
        load_recipe(str(file), ["train.max_steps"])
    with pytest.raises(ConfigError, match=r"train\.max_stepz: unknown key; did you mean max_steps"):
        load_recipe(str(file), ["train.max_stepz=1"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {epochs: 1, epochs: 2}", "duplicate"),
        ("train: [unclosed", "line 1"),
        ("- a\n- b", "mapping of sections"),
        ("train: {epochs: .nan}", r"train\.epochs"),
    ],
)
def test_files_that_are_not_recipes(tmp_path, text, message):
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_recipe(str(file))


def test_an_unknown_name_lists_the_recipes():
    with pytest.raises(UserError, match="did you mean quickstart"):
        load_recipe("quickstrat")
    with pytest.raises(UserError, match="cannot be read"):
        load_recipe("no/such/recipe.yaml")


@pytest.mark.parametrize(
    ("sections", "key"),
    [
        ({"batches": {"kind": "clustered"}, "mining": {"every_epochs": 0}}, "batches.kind"),
        ({"objective": {"pool": "all"}, "mining": {"every_epochs": 1}}, "mining.every_epochs"),
        ({"objective": {"de": "none"}, "mining": {"every_epochs": 1}}, "mining.every_epochs"),
        (
            {"checkpoint": {"keep_best": True}, "evaluation": {"every_epochs": 0}},
            "checkpoint.keep_best",
        ),
        ({"objective": {"de": "none", "classifier": "none"}}, "objective"),
        ({"classifier": {"streamed": True}}, "objective.classifier softmax needs all labels"),
        (
            {
                "classifier": {"streamed": True},
                "objective": {"classifier": "bce"},
                "model": {"row_dropout": 0.1},
            },
            "model.row_dropout",
        ),
        ({"classifier": {"optimizer": "sgd", "format": "rowwise"}}, "rowwise"),
    ],
)
def test_sections_that_contradict_each_other(tmp_path, sections, key):
    file = tmp_path / "r.yaml"
    file.write_text(recipe_text(tmp_path, **sections))
    with pytest.raises(ConfigError, match=key):
        load_recipe(str(file))


def test_rows_that_start_from_texts_make_cosine_the_default(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text(recipe_text(tmp_path, classifier={"init": "label_text"}))
    assert load_recipe(str(file)).objective.classifier_logits == "cosine"
    assert (
        load_recipe(str(file), ["objective.classifier_logits=dot"]).objective.classifier_logits
        == "dot"
    )
    file.write_text(recipe_text(tmp_path))
    assert load_recipe(str(file)).objective.classifier_logits == "dot"


def test_a_written_recipe_reads_back_the_same(tmp_path):
    recipe = load_recipe("quickstart")
    write_recipe(recipe, tmp_path / "config.yaml")
    assert load_recipe(str(tmp_path / "config.yaml")) == recipe
