"""The commands that docs/clusters.md prints, and what makes them run on this machine."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

from ruamel.yaml import YAML

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "clusters.md").read_text()
LAUNCHERS = ("deepspeed", "torchrun", "accelerate")
PORT_OPTION = {
    "deepspeed": "--master_port",
    "torchrun": "--master_port",
    "accelerate": "--main_process_port",
}
COUNTS = ("--num_accelerators", "--nproc_per_node", "--num_processes")


def section(title: str) -> str:
    """Returns the text of the page's section `title`, at any level."""
    (text,) = re.findall(rf"(?ms)^#+ {title}\n(.*?)(?=^#|\Z)", PAGE)
    return text


def commands(title: str) -> dict[str, str]:
    """Returns the command that a section's table gives for each launcher."""
    rows = dict(re.findall(r"(?m)^\| (\w+) \| `([^`]+)` \|$", section(title)))
    assert tuple(sorted(rows)) == tuple(sorted(LAUNCHERS)), title
    return rows


def yaml_options(path: str) -> dict[str, str | bool]:
    """Returns the options of `accelerate launch` that stand for a config file of ours."""
    content = YAML(typ="safe").load((ROOT / path).read_text())
    assert content.pop("distributed_type") == "DEEPSPEED"
    assert content.pop("compute_environment") == "LOCAL_MACHINE"
    assert content.pop("main_training_function") == "main"
    if content["num_machines"] == 1:
        assert content.pop("machine_rank") == 0
    assert not content.pop("use_cpu", False)
    section = content.pop("deepspeed_config")
    options: dict[str, str | bool] = {"--use_deepspeed": True}
    for name, value in {**content, **section}.items():
        is_named_so = name.startswith(("deepspeed_", "num_", "machine_", "main_process_", "zero3_"))
        assert is_named_so, name
        options[f"--{name}"] = str(value).lower() if isinstance(value, bool) else str(value)
    return options


def options(command: str) -> dict[str, str | bool]:
    """Returns a command's options up to and after train.py; of one given twice, the last."""
    words = shlex.split(command)
    found: dict[str, str | bool] = {}
    for word, following in zip(words, [*words[1:], "--"], strict=True):
        if word == "R":
            continue
        if word == "--config_file":
            found = {**yaml_options(following), **found}
        elif word.startswith("--"):
            is_flag = following.startswith("--") or following == "train.py"
            found[word] = True if is_flag else following
    return found


def runnable(
    command: str,
    folder: Path,
    job: list[str],
    port: int,
    node_rank: int = 0,
    hostfile: Path | None = None,
) -> list[str]:
    """Returns a command of the page as it runs here.

    Eight GPUs become two CPU ranks, two nodes of eight two names of this machine with one rank
    each, every ds_config that of `folder`, and R the options `job`. A port of its own keeps runs
    on one machine apart.
    """
    is_two_nodes = hostfile is not None
    ds_config = str(folder / "ds_config.json")
    words: list[str] = []
    for word in shlex.split(command):
        if word == "R":
            words += job
        elif words and words[-1] in COUNTS:
            words.append({"1": "1", "8": "1" if is_two_nodes else "2"}[word])
        elif re.fullmatch(r"ds_configs/\w+\.json", word):
            words.append(ds_config)
        elif re.fullmatch(r"ds_configs/\w+\.yaml", word):
            words.append(_on_cpu(word, ds_config, port, folder / Path(word).name))
        elif word == "hosts":
            words.append(str(hostfile))
        else:
            word = word.replace("node1", "localhost").replace("29500", str(port))
            word = word.replace("is_host=H", f"is_host={'false' if node_rank else 'true'}")
            words.append(str(node_rank) if word == "K" else word)
    if not is_two_nodes and "--config_file" not in words:
        words[1:1] = [PORT_OPTION[words[0]], str(port)]
    return words


def _on_cpu(path: str, ds_config: str, port: int, copy: Path) -> str:
    content = YAML(typ="safe").load((ROOT / path).read_text())
    content["deepspeed_config"]["deepspeed_config_file"] = ds_config
    content["main_process_port"] = port
    if content["num_machines"] == 2:
        assert content["num_processes"] == 16
        content["num_processes"] = 2
    copy.write_text(json.dumps(content))  # JSON is YAML
    return str(copy)
