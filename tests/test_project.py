"""The files around the package agree with it and with one another."""

import re
import subprocess
import sys
from importlib import metadata, resources
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from ruamel.yaml import YAML

from unidec_ds import __version__
from unidec_ds.ds_config import load_ds_config
from unidec_ds.engine import check_launch

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "unidec_ds"
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
DS_CONFIGS = sorted((ROOT / "ds_configs").glob("*.json"))
ACCELERATE_CONFIGS = sorted((ROOT / "ds_configs").glob("accelerate_*.yaml"))
SCRIPTS = [ROOT / "launch.sh", ROOT / ".ci" / "run", *sorted((ROOT / "scripts").glob("*.s[hb]*"))]
RECIPES = sorted(path.stem for path in (PACKAGE / "recipes").glob("*.yaml"))


def constraints() -> dict[str, list[Requirement]]:
    """The pins by package; a package may have one for each of several Python versions."""
    pins: dict[str, list[Requirement]] = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            pin = Requirement(line)
            pins.setdefault(pin.name, []).append(pin)
    return pins


def named_requirements() -> list[Requirement]:
    project = PYPROJECT["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    return [Requirement(line) for group in groups for line in group]


@pytest.mark.parametrize("requirement", named_requirements(), ids=lambda r: r.name)
def test_constraints_pin_every_named_package_within_its_bounds(requirement):
    pins = constraints()[requirement.name]
    for pin in pins:
        (only,) = pin.specifier
        assert only.operator == "=="
        assert requirement.specifier.contains(only.version)
    for python in ("3.10", "3.11", "3.12"):
        fitting = [p for p in pins if not p.marker or p.marker.evaluate({"python_version": python})]
        assert len(fitting) == 1


def test_versions_agree():
    assert PYPROJECT["project"]["version"] == __version__
    assert "## [Unreleased]" in (ROOT / "CHANGELOG.md").read_text()


def test_console_script_is_there():
    (script,) = metadata.entry_points(group="console_scripts", name="unidec-ds")
    assert callable(script.load())


@pytest.mark.parametrize("path", DS_CONFIGS, ids=lambda path: path.name)
@pytest.mark.parametrize("world_size", [1, 2])
def test_every_ds_config_is_accepted(path, world_size):
    ds_config = load_ds_config(path, batch_size=256, world_size=world_size)
    check_launch(ds_config, batch_size=256)
    assert ds_config.dtype == ("bf16" if "bf16" in path.name else "fp32")
    assert ds_config.gradient_clipping == 1.0


def test_the_default_ds_config_offloads_the_table_to_host_memory():
    path = ROOT / "ds_configs" / "single_gpu_offload_bf16.json"
    ds_config = load_ds_config(path, batch_size=256, world_size=1)
    assert ds_config.zero_stage == 2
    assert ds_config.offload == {"device": "cpu", "pin_memory": True}


@pytest.mark.parametrize("path", ACCELERATE_CONFIGS, ids=lambda path: path.name)
def test_accelerate_configs_name_a_ds_config_of_ours(path):
    content = YAML(typ="safe").load(path.read_text())
    assert content["distributed_type"] == "DEEPSPEED"
    assert ROOT / content["deepspeed_config"]["deepspeed_config_file"] in DS_CONFIGS


@pytest.mark.parametrize("path", [*DS_CONFIGS, *ACCELERATE_CONFIGS], ids=lambda path: path.name)
def test_ds_configs_readme_names_every_file(path):
    assert path.name in (ROOT / "ds_configs" / "README.md").read_text()


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_documented(name):
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    assert any(name in page.read_text().lower() for page in pages)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse(path):
    subprocess.run(["bash", "-n", str(path)], check=True)


def test_launch_help_needs_no_environment():
    done = subprocess.run(
        ["bash", str(ROOT / "launch.sh"), "--help"],
        env={"PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("Usage: bash launch.sh")
    for path in re.findall(r"ds_configs/\w+\.(?:json|md)", done.stdout):
        assert (ROOT / path).exists()


def test_no_module_holds_two():
    lengths = {path.name: len(path.read_text().splitlines()) for path in PACKAGE.rglob("*.py")}
    assert {name: length for name, length in lengths.items() if length > 420} == {}


def test_every_module_has_its_layer():
    contract = PYPROJECT["tool"]["importlinter"]["contracts"][0]
    placed = {
        name.strip(" ()") for line in contract["layers"] for name in re.split("[|:]", line)
    }  # fmt: skip
    modules = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in PACKAGE.rglob("*.py")
        if path.name != "__init__.py"
    }
    assert placed == modules


def test_licences_are_shipped():
    assert "Apache License" in (ROOT / "LICENSE").read_text()
    corpora = [path for path in resources.files("unidec_ds.corpora").iterdir() if path.is_dir()]
    assert {path.name for path in corpora} >= {"LF-WordNet-Verbs-9K", "LF-WordNet-84K"}
    for path in corpora:
        if not path.name.startswith("__"):
            assert path.joinpath("LICENSE.txt").is_file()
