"""Whole runs with lost messages and absent nodes: batches, norms, labels, resume, processes, engines."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest
import torch
from forked import Hosts
from interrupts import InterruptAt
from short_runs import SHORT, checkpoint, extra, latest, lines, run_of, same, train

from lightning_idkd.config.parse import configure
from lightning_idkd.training.fit import describe_reach

MESSAGES = "{class_path: MessageLoss, init_args: {p: 0.3, told: false, burst: 6}}"
CHURN = "{class_path: Churn, init_args: {leave: 0.05, rejoin: 0.15, forget: true}}"
FAULTS = ["--faults", f"[{MESSAGES}, {CHURN}, {{class_path: LinkOutage, init_args: {{p: 0.2, steps: 7}}}}]"]


def trace(tmp_path, text, forget="false"):
    file = tmp_path / "trace.csv"
    file.write_text(f"node,from,to\n{text}")
    return ["--faults", f"[{{class_path: Trace, init_args: {{file: {file}, forget: {forget}}}}}]"]


def test_the_batches_of_an_absent_node_stand_still(configs, tmp_path):
    """Steps 3 to 7 pass without node 1, so its batch of step 8 is the one of step 3 of a run without faults."""
    steps = run_of(configs).progress.steps
    run, plain = run_of(configs, *trace(tmp_path, f"1,{3 / steps},{8 / steps}\n")), run_of(configs)
    order, epochs_order = train(run, 8), plain.store.order(0, steps)
    b = run.store.batch_size
    mine = run.store.positions(order, run.progress.epoch_step)
    assert torch.equal(mine[1], epochs_order[1, 3 * b : 4 * b])
    assert torch.equal(mine[[0, 2, 3]], epochs_order[[0, 2, 3], 8 * b : 9 * b])
    train(run, 0)
    run.store.end_epoch()
    later = run.store.order(steps, 5)
    assert torch.equal(later[1], plain.store.order(steps - 5, 5)[1]), "in the next epoch it is five steps behind"
    assert torch.equal(later[0], plain.store.order(steps, 5)[0])


def test_a_trace_keeps_its_place_where_an_exchange_makes_epochs_longer(configs, tmp_path):
    """Node 1 is absent in the last step of epoch 0 and returns after the exchange; node 3 would be absent between that
    step and the exchange, and is not. In epoch 1, which is longer, node 2 is absent in the second half."""
    given = ["--distillation.start", "1", "--distillation.steps", "grow", "--train.epochs", "2"]
    steps = run_of(configs).progress.steps
    last = 1 - 1 / steps
    rows = f"1,{last - 0.1 / steps},{last + 0.1 / steps}\n3,{last + 0.1 / steps},1\n2,1.5,2\n"
    run = run_of(configs, *given, *trace(tmp_path, rows, forget="true"))
    train(run, steps)
    assert run.progress.absent == 1
    run.progress.epoch, run.progress.epoch_step = 1, 0
    run.store.end_epoch()
    run.call("on_epoch_start", epoch=1)
    longer = run.progress.steps
    assert longer > 1.2 * steps, "a moment that is counted in new steps lies in the row of node 3"
    assert run.network.returning(steps).tolist() == [False, True, False, False]
    X = run.stack.X.clone()
    run.gossip.welcome(steps)
    torch.testing.assert_close(run.stack.X[1], X[[0, 2]].mean(0))
    assert torch.equal(run.stack.X[[0, 2, 3]], X[[0, 2, 3]])
    order = run.store.order(steps, longer)
    for _ in range(longer):
        run.train_step(order)
    assert run.progress.absent == 1 + longer // 2


def test_a_resumed_run_knows_when_its_last_step_began(configs):
    run = run_of(configs)
    train(run, 3)
    again = run_of(configs)
    again.progress.restore(run.progress.state())
    again.progress.steps *= 2  # as after an exchange
    assert again.when(2)[0] == 2 / run.progress.steps


def test_shares_of_lost_messages_and_absent_nodes_are_reported(configs, tmp_path):
    """Of 4 nodes on a ring, node 1 is absent in 5 of 10 steps, and its 4 of 8 messages with it."""
    steps = run_of(configs).progress.steps
    run = run_of(configs, *trace(tmp_path, f"1,{2 / steps},{7 / steps}\n"))
    train(run, 10)
    line = run.recorder.add_line(16, lambda: False)
    assert line["faults/absent"] == 5 / 40
    assert line["faults/lost"] == 5 * 4 / (10 * 8)
    assert "faults/lost" not in run_of(configs).recorder.add_line(16, lambda: False)


def test_the_start_says_what_goes_wrong(fit, capsys):
    assert fit(*FAULTS, "--run.until", "1") == 0
    out = capsys.readouterr().out
    assert (
        "faults     MessageLoss (p 0.3, burst 6.0), Churn (leave 0.05, rejoin 0.15, forget), LinkOutage (p 0.2, s"
        in out
    )
    assert "note       faults: where senders do not know of a loss (told: false), the mean of the rows drifts" in out


def test_an_absent_node_keeps_its_row_its_norms_and_its_loss(configs, tmp_path):
    network = ["--node.network", "CNN", "--node.network.norm", "batch"]
    run = run_of(configs, *network, *trace(tmp_path, "2,0,1\n"))
    X, norms = run.stack.X.clone(), {k: b.clone() for k, b in run.stack.buffers.items()}
    train(run, 3)
    assert torch.equal(run.stack.X[2], X[2])
    assert not torch.equal(run.stack.X[1], X[1])
    assert norms
    for name, b in run.stack.buffers.items():
        assert torch.equal(b[2], norms[name][2]), name
        assert not torch.equal(b[1], norms[name][1]), name
    assert run.recorder.loss[2] == 0
    assert run.progress.samples == 3 * 3 * run.store.batch_size
    mean = run.recorder.loss[[0, 1, 3]].mean().item() / 3
    run.train.evaluate_samples = 16
    assert run.recorder.add_line(16, lambda: False)["train/loss"] == pytest.approx(mean, rel=1e-6)


def test_a_node_that_is_absent_at_an_exchange_keeps_the_labels_it_has(fit, tmp_path):
    """It misses the first exchange (before epoch 3) and takes part in the second (before epoch 5)."""
    assert fit(*trace(tmp_path, "1,2.5,3.5\n")) == 0
    sizes = [e["distilled"] for e in json.loads((latest(fit.runs) / "summary.json").read_text())["exchanges"]]
    assert sizes[0][1] == 0
    assert min(sizes[0][i] for i in (0, 2, 3)) > 0
    assert sizes[1][1] > 0


def test_a_run_resumed_inside_a_burst_equals_one_in_one_go(fit):
    assert fit(*FAULTS, folder="whole") == 0
    assert fit(*FAULTS, *extra(InterruptAt, steps=[50, 95])) == 130
    assert fit(*FAULTS, *extra(InterruptAt, steps=[50, 95]), "--run.resume", "auto") == 130
    assert fit(*FAULTS, *extra(InterruptAt, steps=[50, 95]), "--run.resume", "auto") == 0
    cut, whole = latest(fit.runs), latest(fit.runs.parent / "whole")
    different = same(checkpoint(cut) | {"callbacks": 0}, checkpoint(whole) | {"callbacks": 0})
    assert different is None
    assert lines(cut) == lines(whole)


@pytest.mark.slow
def test_two_processes_and_a_kill_give_the_bits_of_one_process(fit, configs, tmp_path):
    short = [*FAULTS, "--train.epochs", "4", "--distillation.start", "2"]
    assert fit(*short, folder="1") == 0
    command = ["--config", str(configs / "ring_digits.yaml"), *SHORT, *short, "--run.resume", "auto"]
    killed = Hosts(tmp_path / "2", 2)
    killed.start(["fit", *command, "--run.dir", "runs"])
    runs = killed.folders[0] / "runs"
    while not (latest(runs) / "checkpoints" / "last.ckpt").exists():
        time.sleep(0.2)
        assert killed.processes[0].exitcode is None
    killed.end()
    killed.start(["fit", *command, "--run.dir", "runs"])
    assert killed.wait(seconds=300)[0] == [0, 0]
    one, other = latest(tmp_path / "1"), latest(runs)
    assert same(checkpoint(one), checkpoint(other)) is None
    assert lines(one) == lines(other)


def test_engines_agree(configs):
    rows = []
    for engine in ("loop", "vmap"):
        run = run_of(configs, *FAULTS, "--run.precision", "64", "--run.engine", engine)
        train(run, 15)
        rows.append(run.stack.X.numpy().copy())
    np.testing.assert_allclose(rows[0], rows[1], rtol=0, atol=1e-9 * np.linalg.norm(rows[0]))


def test_a_rule_that_a_fault_breaks_is_refused_before_any_file_is_written(fit, capsys):
    assert fit("--gossip", "DecentLaM", "--faults", "[{class_path: MessageLoss}]") == 2
    assert "faults: MessageLoss is given, but gossip DecentLaM relies on the same weights" in capsys.readouterr().err
    assert not fit.runs.exists()


def test_faults_are_the_same_for_a_fork(fit):
    """A fork that begins in epoch 2 meets the faults of its own steps, not those from step 0 on."""
    assert fit("--run.keep", "[2]", "--distillation", "null", *FAULTS) == 0
    whole = checkpoint(latest(fit.runs))
    source = latest(fit.runs).resolve() / "checkpoints" / "epoch_2.ckpt"
    assert fit("--run.from", str(source), "--distillation", "null", *FAULTS, folder="fork") == 0
    assert torch.equal(checkpoint(latest(fit.runs.parent / "fork"))["X"], whole["X"])


LATE = ["--faults", "[{class_path: Stragglers, init_args: {max_age: 2}}]",
        "--clock", "{compute: {class_path: LogNormal, init_args: {median: 1, sigma: 0.5}}, slow: {1: 4}}"]  # fmt: skip


def test_a_run_with_late_rows_is_resumed_with_the_rows_under_way(fit):
    assert fit(*LATE, folder="whole") == 0
    assert fit(*LATE, *extra(InterruptAt, steps=[50, 95])) == 130
    assert fit(*LATE, *extra(InterruptAt, steps=[50, 95]), "--run.resume", "auto") == 130
    assert fit(*LATE, *extra(InterruptAt, steps=[50, 95]), "--run.resume", "auto") == 0
    cut, whole = latest(fit.runs), latest(fit.runs.parent / "whole")
    assert same(checkpoint(cut) | {"callbacks": 0}, checkpoint(whole) | {"callbacks": 0}) is None
    assert lines(cut) == lines(whole)
    assert fit(*LATE[2:], folder="waiting") == 0
    waiting = latest(fit.runs.parent / "waiting")
    assert lines(whole)[-1]["time/simulated"] <= lines(waiting)[-1]["time/simulated"]
    assert not torch.equal(checkpoint(whole)["X"], checkpoint(waiting)["X"])


@pytest.mark.parametrize("fault", ["Stragglers", "{class_path: Trace, init_args: {file: TRACE, unit: seconds}}"])
def test_faults_in_simulated_time_need_a_clock(fit, tmp_path, capsys, fault):
    (tmp_path / "trace.csv").write_text("node,from,to\n1,0,2\n")
    given = fault.replace("TRACE", str(tmp_path / "trace.csv"))
    given = given if given.startswith("{") else f"{{class_path: {given}}}"
    assert fit("--faults", f"[{given}]") == 2
    assert "in faults acts in simulated time and needs one" in capsys.readouterr().err


@pytest.mark.parametrize(("until", "refused"), [(3, True), (1, False)])
def test_traces_that_have_all_nodes_absent_at_once_are_refused(fit, tmp_path, capsys, until, refused):
    one, other = tmp_path / "one.csv", tmp_path / "other.csv"
    one.write_text(f"node,from,to\n0,0,{until}\n1,0,9\n")
    other.write_text("node,from,to\n1,1,2\n2,0,9\n3,2,3\n")
    given = ", ".join(f"{{class_path: Trace, init_args: {{file: {file}}}}}" for file in (one, other))
    assert fit("--faults", f"[{given}]", "--run.until", "1") == (2 if refused else 0)
    said = f"faults.file: '{one}' and '{other}' together have all 4 nodes absent at 2 epochs"
    assert (said in capsys.readouterr().err) == refused
    assert fit.runs.exists() != refused


def test_steps_without_any_node_pass(configs):
    """Four nodes, each absent with probability 0.8, are all absent in some of the steps."""
    run = run_of(configs, "--faults", "[{class_path: Churn, init_args: {leave: 0.4, rejoin: 0.1}}]")
    away, order, steps = [], run.store.order(0, run.progress.steps), run.progress.steps
    for step in range(steps):
        present = run.network.links.at(step).present
        away.append(present is not None and not present.any())
        X = run.stack.X.clone()
        run.train_step(order)
        assert torch.equal(run.stack.X, X) == away[-1]
    assert 0 < sum(away) < steps
    assert np.isfinite(run.recorder.add_line(16, lambda: False)["train/loss"])


def test_the_final_merge_is_the_mean_of_the_nodes_that_are_present(configs, tmp_path):
    run = run_of(configs, "--train.final_merge", "true", "--train.final_gossip", "0", *trace(tmp_path, "2,0,99\n"))
    train(run, 2)
    X = run.stack.X.clone()
    run.run_final_gossip()
    assert torch.equal(run.stack.X[2], X[2])
    torch.testing.assert_close(run.stack.X[[0, 1, 3]], X[[0, 1, 3]].mean(0).expand(3, -1))


def test_a_node_that_is_absent_at_an_exchange_keeps_its_soft_targets(configs, tmp_path):
    method = ["--distillation", "MutualKD", "--distillation.start", "1", "--distillation.every", "1"]
    run = run_of(configs, *method, *trace(tmp_path, "3,1.5,2.5\n"))
    kept = []
    for epoch in (1, 2):
        run.progress.epoch, run.progress.step = epoch, epoch * run.progress.steps
        run.distillation.exchange(run)
        kept.append([targets.clone() for targets in run.store.soft_targets[0]])
    assert torch.equal(kept[1][3], kept[0][3])
    assert (kept[0][3].max(1).values < 1).any(), "they are not one-hot"


def test_a_fork_counts_its_own_faults(configs, fit):
    half = ["--faults", "[{class_path: Churn, init_args: {leave: 0.5, rejoin: 0.5}}]", "--distillation", "null"]
    assert fit("--run.keep", "[3]", "--distillation", "null") == 0
    source = latest(fit.runs).resolve() / "checkpoints" / "epoch_3.ckpt"
    assert fit("--run.from", str(source), *half, folder="fork") == 0
    assert 0.35 < lines(latest(fit.runs.parent / "fork"))[-1]["faults/absent"] < 0.65


def test_hops_of_labels_go_over_the_links_of_their_own_steps(fit):
    hops = ["--distillation", "VanillaKD", "--distillation.hops", "4", "--distillation.aggregation", "ClassCount"]
    loss = ["--faults", "[{class_path: MessageLoss, init_args: {p: 0.5}}]"]
    assert fit(*hops, *loss, "--distillation.start", "3") == 0


@pytest.mark.parametrize(
    ("rule", "note"),
    [
        ("AllReduce", "faults: lost messages change nothing here, since AllReduce sends none over single edges"),
        ("SGP", None),
        ("DSGD", "the mean of the rows drifts"),
    ],
)
def test_what_losses_do_to_a_rule_is_noted(rule, note, configs):
    config = configure(["--config", str(configs / "ring_digits.yaml"), "--gossip", rule, "--faults", f"[{MESSAGES}]"])
    notes = describe_reach(config)
    assert (note in notes[0]) if note else not notes


def test_a_changed_trace_is_refused_on_resume_and_free_in_a_fork(fit, tmp_path, capsys):
    given = trace(tmp_path, "1,1,2\n")
    assert fit(*given, "--run.until", "3", "--run.keep", "[3]", "--distillation", "null") == 0
    source = latest(fit.runs).resolve()
    (tmp_path / "trace.csv").write_text("node,from,to\n1,1,4\n")
    assert (
        fit(*given, "--run.resume", str(source), "--run.until", "3", "--run.keep", "[3]", "--distillation", "null") == 2
    )
    assert "trace.csv' has changed since this run began" in capsys.readouterr().err
    checkpoint = str(source / "checkpoints" / "epoch_3.ckpt")
    assert fit(*given, "--run.from", checkpoint, "--distillation", "null", folder="fork") == 0
