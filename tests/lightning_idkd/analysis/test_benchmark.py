"""The benchmark runs and its shares sum to 1; no test reads the times themselves."""

import json

import pytest

from lightning_idkd.analysis import benchmark
from lightning_idkd.cli import main


@pytest.fixture(autouse=True)
def _short_turns(monkeypatch):
    monkeypatch.setattr(benchmark, "SHORTEST_TURN", 0.01)


@pytest.mark.slow
def test_every_form_of_a_step_is_timed_also_on_a_graph_of_arrows(configs, tmp_path, capsys):
    """A process that waits for a message that nobody sends fails after gloo's half hour."""
    config = ["--config", str(configs / "ring_digits.yaml"), "--graph.nodes", "3", "--train.batch_size", "4",
              "--graph.topology", "OnePeerExponential"]  # fmt: skip
    assert main(["bench", *config, "--rounds", "1", "--out", str(tmp_path / "new" / "bench.json")]) == 0
    [case] = json.loads((tmp_path / "new" / "bench.json").read_text())["cases"].values()
    forms = {form.split(",")[0] for form in case["samples_per_second"]}
    assert forms == {"loop", "parallel", "vmap", "bare loop", "one model", "process per node"}
    assert all(0 < rate["least"] <= rate["median"] <= rate["most"] for rate in case["samples_per_second"].values())
    assert sum(case["shares"].values()) == pytest.approx(1)
    assert all(share >= 0 for share in case["shares"].values())
    assert case["peak_memory_bytes"] > 10**8
    said = capsys.readouterr().out
    assert "| process per node |" in said
    assert "| CNN, n = 3 |" in said


def test_options_that_the_suite_does_not_take_are_refused(capsys):
    assert main(["bench", "--graph.nodes", "8"]) == 2
    assert "--graph.nodes: bench takes it beside a --config" in capsys.readouterr().err


def test_an_engine_asked_for_is_the_only_one_and_is_timed_without_faults_too(configs, tmp_path, monkeypatch):
    """On one node more than the form with a process per node takes."""
    monkeypatch.setattr(benchmark, "MOST_PROCESSES", 2)
    monkeypatch.setattr(benchmark, "run_in_processes", lambda work, *given: {benchmark.measure_peak_memory: 1}[work])
    config = ["--config", str(configs / "ring_digits.yaml"), "--graph.nodes", "3", "--train.batch_size", "2"]
    faults = ["--faults", "[{class_path: MessageLoss, init_args: {p: 0.5}}]", "--run.engine", "vmap"]
    assert main(["bench", *config, *faults, "--rounds", "1", "--out", str(tmp_path / "bench.json")]) == 0
    [case] = json.loads((tmp_path / "bench.json").read_text())["cases"].values()
    forms = {form.split(",")[0] for form in case["samples_per_second"]}
    assert forms == {"vmap", "vmap without faults", "bare loop", "one model"}
    assert case["fastest"].startswith("vmap,")
