"""What a run will need, before it is begun."""

import json
import mmap
import subprocess
import sys

import pytest
import torch
from short_runs import SHORT, command_of, latest, run_of

from lightning_idkd.errors import UserError
from lightning_idkd.network import block_columns
from lightning_idkd.training import memory


def test_what_does_not_fit_is_refused_with_what_would_help():
    parts = dict.fromkeys(memory.ADVICE, 0)
    parts |= {"program and data": 5 * 10**9, "rows and gradients": 6 * 10**9, "activations": 10**9}
    memory.require_memory(parts, 7 * 10**9, 64, 1)
    with pytest.raises(UserError) as error:
        memory.require_memory(parts, 6 * 10**9, 64, 1)
    assert str(error.value) == (
        "graph.nodes: 64 nodes need about 7 GB of memory, and 6 GB are free; 6 GB of it are rows and gradients: fewer "
        "graph.nodes, or a smaller node.network would help"
    )
    with pytest.raises(UserError, match="need about 14 GB"):
        memory.require_memory(parts, 13 * 10**9, 64, 2)
    memory.require_memory(parts, None, 64, 1)


def test_a_run_that_does_not_fit_is_refused_before_anything_is_written(fit, capsys, monkeypatch):
    monkeypatch.setattr(memory, "read_free_memory", lambda device: 10**6)
    assert fit() == 2
    assert "error: graph.nodes: 4 nodes need about" in capsys.readouterr().err
    assert not fit.runs.exists()


def test_free_memory_is_known_here():
    assert 10**7 < memory.read_free_memory(torch.device("cpu")) < 10**14
    before = memory.read_resident_memory()
    with mmap.mmap(-1, 2 * 10**8) as kept:  # from the system: an allocator may have such a block left
        kept.write(b"x" * len(kept))
        after = memory.read_resident_memory()
    assert after - before == pytest.approx(2 * 10**8, rel=0.2)


@pytest.mark.slow
def test_the_peak_of_a_run_is_not_that_of_the_process_which_started_it():
    run = "import torch; from lightning_idkd.training.record import read_peak_memory; " \
          "print(read_peak_memory(torch.device('cpu')))"  # fmt: skip
    start = f"import subprocess, sys; kept = bytearray(2 * 10**9); subprocess.run([sys.executable, '-c', {run!r}])"
    done = subprocess.run([sys.executable, "-c", start], capture_output=True, text=True, timeout=240)
    assert 10**8 < int(done.stdout) < 15 * 10**8, done.stderr[-2000:]


ROBUST = "{class_path: Robust, init_args: {rule: {class_path: DSGD}, aggregator: {class_path: SCClip}}}"


@pytest.mark.slow
@pytest.mark.parametrize("gossip", [[], ["--gossip", ROBUST]], ids=["mixing", "aggregating"])
def test_the_peak_is_what_was_predicted(configs, tmp_path, gossip):
    network = ["--node.network", "MLP", "--node.network.depth", "3", "--node.network.width", "1100",
               "--data.partition", "IID"]  # fmt: skip
    given = ["--data.private.limit", "64", "--train.epochs", "1",
             "--train.evaluate_samples", "16", "--distillation", "null"]  # fmt: skip
    command = [*command_of(configs / "ring_digits.yaml"), *SHORT, *network, *given, *gossip, "--run.dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    summary = json.loads((latest(tmp_path) / "summary.json").read_text())
    assert summary["predicted_memory_bytes"] == pytest.approx(summary["peak_memory_bytes"], rel=0.25)
    assert summary["peak_memory_bytes"] > 12 * 4 * summary["parameters"]  # most of it are the rows, and no program


@pytest.mark.parametrize(
    ("kept", "rows", "expected"), [(2**20, 100, 32), (2**20, 20, 20), (2**22, 100, 8), (2**30, 100, 1)]
)
def test_vmap_takes_as_many_nodes_as_the_caches_of_two_threads_hold(kept, rows, expected, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert memory.choose_nodes_per_call(kept, rows, torch.device("cpu")) == expected
    assert memory.choose_nodes_per_call(kept, rows, torch.device("cuda")) == rows


def test_activations_of_a_node_do_not_depend_on_the_number_of_nodes(configs):
    few, many = (run_of(configs, "--graph.nodes", n, "--train.batch_size", "16") for n in ("4", "32"))
    kept = [memory.measure_activations(run.stack.modules[0], run.store) for run in (few, many)]
    assert kept[0] == kept[1]


@pytest.mark.parametrize(("nodes", "columns"), [(4, 65536), (16, 16384), (128, 8192), (1024, 8192), (4096, 2048)])
def test_a_block_is_as_wide_as_its_values_allow(nodes, columns):
    assert block_columns(nodes, torch.device("cpu")) == columns
