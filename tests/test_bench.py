"""The benchmarks start, and their figures have the keys that others read."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).parents[1] / "scripts" / "bench"
SHARED = {
    "results", "stages", "classifiers", "collectives", "dense_offload", "rival_costs", "rival_runs",
    "scale_stages",
}  # fmt: skip
NAMES = sorted(path.stem for path in BENCH.glob("*.py") if path.stem not in SHARED)


def run(name, *options, monkeypatch):
    """Runs a benchmark in this process, as `python scripts/bench/NAME.py` would."""
    script = BENCH / f"{name}.py"
    monkeypatch.syspath_prepend(str(BENCH))
    monkeypatch.setattr(sys, "argv", [str(script), *map(str, options)])
    runpy.run_path(str(script), run_name="__main__")


@pytest.mark.parametrize("name", NAMES)
def test_help_names_the_common_options(name, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(name, "--help", monkeypatch=monkeypatch)
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert "--quick" in text
    assert "--json" in text


def test_gpu_check_says_what_is_missing_without_a_gpu():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    script = BENCH.parent / "gpu_check.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "no GPU" in done.stderr
    assert "--cpu" in done.stderr


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_gpu_trains_as_the_cpu_does(tmp_path):
    script = BENCH.parent / "gpu_check.py"
    sizes = ["--labels", "20000", "--train-queries", "4000", "--batch-size", "64"]
    subprocess.run([sys.executable, script, "--work", tmp_path, *sizes], check=True)


@pytest.mark.kernel
def test_label_scaling_writes_figures_table_and_plot(tmp_path, monkeypatch):
    options = ["--labels", 300, 900, "--rows", 64, "--width", 32, "--seconds", 0, "--quick"]
    paths = ["--json", tmp_path / "figures.json", "--results", tmp_path / "results"]
    run("label_scaling", *options, *paths, "--scratch", tmp_path, monkeypatch=monkeypatch)
    figures = json.loads((tmp_path / "figures.json").read_text())
    systems = {"row_sparse", "deepspeed_dense", "torch_fused", "sparse_adam"}
    cases = {(system, labels) for system in systems for labels in (300, 900)}
    assert {(figure["system"], figure["labels"]) for figure in figures} == cases
    for figure in figures:
        assert (figure["width"], figure["rows"]) == (32, 64)
        assert figure["step_s"] > figure["update_s"] > 0
        assert figure["floor_s"] > 0
    page = (tmp_path / "results" / "label_scaling.md").read_text()
    for part in ("| row_sparse | fp32 | 900 |", "- commit: ", "- versions: ", "update / floor"):
        assert part in page
    assert (tmp_path / "results" / "label_scaling.png").read_bytes().startswith(b"\x89PNG")


def test_systems_of_a_size_make_the_same_update(monkeypatch):
    """Each rival is what its name says: from equal rows, equal gradients give equal rows."""
    monkeypatch.syspath_prepend(str(BENCH))
    import classifiers as bench
    import numpy as np

    label_ids = np.array([1, 4, 5])
    updated = {}
    for system in bench.SYSTEMS:
        table = bench.new_table(8, 16, "fp32", bench.Placement("cpu"))
        made = bench.row_sparse(table)
        if system != "row_sparse":
            made = bench.rival(system, table.state(), torch.zeros(8 * 16))
        for step in range(3):
            rows = made.rows(label_ids)
            (rows * torch.linspace(-1, 1 + step, 16)).sum().backward()
            made.update(label_ids, rows)
        updated[system] = table.read(np.arange(8))
    ours = updated["row_sparse"]
    for system in ("deepspeed_dense", "torch_fused"):
        torch.testing.assert_close(updated[system][label_ids], ours[label_ids])
    undecayed = ours[label_ids] - updated["sparse_adam"][label_ids]
    assert undecayed.abs().max() < 3.5 * bench.LR * bench.WEIGHT_DECAY  # SparseAdam has no decay


@pytest.mark.kernel
@pytest.mark.slow
def test_rivals_cost_what_the_formulas_say(tmp_path):
    script, file = BENCH / "rivals.py", tmp_path / "figures.json"
    options = ["--labels", "700", "--systems", "psl", "dexml", "renee", "zero_offload"]
    sizes = ["--width", "32", "--batch-size", "16", "--pool-size", "64", "--steps", "1"]
    command = [sys.executable, script, "--quick", "--json", file, *options, *sizes]
    subprocess.run(command, check=True)
    figures = json.loads(file.read_text())
    of_ranks = {1: {}, 2: {}}
    for figure in figures:
        if not figure["system"].startswith("epoch:"):
            of_ranks[figure["world_size"]][figure["system"]] = figure
    measured = of_ranks[1]
    assert measured.keys() == of_ranks[2].keys() == {"psl", "dexml", "renee", "zero_offload"}
    for system, figure in of_ranks[2].items():
        assert figure["comm_bytes"] == figure["own_comm_bytes"] + figure["engine_comm_bytes"]
        # The engine reduces gradients and gathers weights of the encoder; of every row as well,
        # where rows are its parameters.
        more = figure["engine_comm_bytes"] - of_ranks[2]["psl"]["engine_comm_bytes"]
        rows = 2 * 4 * 700 * 32 if system == "zero_offload" else 0
        assert rows <= more <= rows + 64 if rows else more <= 0  # ZeRO pads its partitions
    for figure in measured.values():
        assert (figure["labels"], figure["world_size"], figure["comm_bytes"]) == (700, 1, 0)
        assert min(figure["step_s"], figure["peak_bytes"]) > 0
        assert figure["flops"] == pytest.approx(figure["formula_flops"], rel=0.02)
    assert measured["psl"]["pool"] == 64
    assert measured["dexml"]["pool"] == measured["renee"]["pool"] == 700
    epochs = {(f["system"], f["set"], f["world_size"]): f for f in figures if "set" in f}
    assert len(epochs) == 3 * 3 * 2
    for (system, name, gpus), figure in epochs.items():
        ours = epochs["epoch:psl", name, gpus]
        ratio = figure["epoch_flops"] / ours["epoch_flops"]
        assert figure["times_unidec_flops"] == pytest.approx(ratio)
        if system == "epoch:dexml":
            assert ratio > 4
