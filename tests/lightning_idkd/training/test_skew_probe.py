"""Where label skew acts, as measured by SkewProbe."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from short_runs import SHORT, build, latest

from lightning_idkd.callbacks import SkewProbe
from lightning_idkd.callbacks.probes.skew import MEASURES, masked_means
from lightning_idkd.config.parse import configure

LIAR = ["--faults", "[{class_path: Liars, init_args: {nodes: [2], flip: true}}]"]


@pytest.mark.parametrize(("engine", "honest"), [("loop", [0, 1, 2, 3]), ("vmap", [0, 1, 3])])
def test_measures_are_those_of_the_honest_nodes(configs, engine, honest):
    more = ["--run.precision", "64", "--distillation", "null", "--run.engine", engine, "--data.partition.alpha", "0.3"]
    more += [] if len(honest) == 4 else LIAR
    run = build(configure(["--config", str(configs / "ring_digits.yaml"), *SHORT, *more]))
    for _ in range(2):
        run.train_step(run.store.order(0, 2))
    batches, labels = run.store.evaluation_set("validation", 100)
    probe = SkewProbe()
    probe.on_epoch_end(run)
    found = probe.measure(run, run.stack.answers(batches, lambda outputs: outputs), labels)
    assert list(found) == list(MEASURES)

    y, n, k = labels.numpy(), len(honest), run.store.k
    expected = {name: [] for name in MEASURES}
    heads, features = [], []
    for i in honest:
        module = run.stack.modules[i]
        own_labels = run.store.labels[run.store.own[i]].numpy()
        has = np.array([(own_labels == c).mean() >= 1 / k for c in range(k)])
        assert 0 < has.sum() < k
        x = torch.cat([module.eval().network.features(batch).detach() for batch in batches()]).numpy()
        head = module.network.head
        z = x @ head.weight.detach().numpy().T + head.bias.detach().numpy()
        right = z.argmax(1) == y
        norm = np.linalg.norm(head.weight.detach(), axis=1)
        (start,) = (place for name, place in offsets(module).items() if name.endswith("head.weight"))
        gradient = np.linalg.norm(run.stack.G[i, start : start + k * x.shape[1]].view(k, -1), axis=1)
        assert norm.min() > 0
        assert gradient.min() > 0
        for name, values, chosen in (("accuracy", right, has[y]), ("norm", norm, has), ("gradient", gradient, has)):
            expected[f"{name}_own"].append(values[chosen].mean())
            expected[f"{name}_lacking"].append(values[~chosen].mean())
        heads.append(head.weight.detach().numpy().ravel())
        features.append(x.ravel())
    for name, vectors in (("head", np.array(heads)), ("features", np.array(features))):
        mean = vectors.mean(0)
        distance = np.sqrt(sum(((v - mean) ** 2).sum() for v in vectors) / n)
        expected[f"distance_{name}"] = [distance / np.linalg.norm(mean)]
    assert found["distance_head"] > 0
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], np.mean(values), rtol=1e-8, err_msg=name)


def test_a_tensor_that_is_the_mean_of_all_honest_nodes_is_tried_and_put_back(configs):
    more = ["--run.precision", "64", "--distillation", "null", "--data.partition.alpha", "0.3", *LIAR]
    honest = [0, 1, 3]
    run = build(configure(["--config", str(configs / "ring_digits.yaml"), *SHORT, *more]))
    run.train_step(run.store.order(0, 1))
    run.stack.X.add_(
        0.05 * torch.randn(run.stack.X.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    )
    before = run.stack.X.clone()
    tried = SkewProbe(samples=100).try_mean_tensors(run)
    assert torch.equal(run.stack.X, before)
    batches, labels = run.store.evaluation_set("validation", 100)
    for name, (start, size) in places(run.stack.modules[0]).items():
        rows = before[honest, start : start + size].numpy()
        mean = rows.mean(0)
        distance = np.sqrt(((rows - mean) ** 2).sum(1).mean()) / np.linalg.norm(mean)
        assert tried[name]["distance"] == pytest.approx(distance, rel=1e-9)
        accuracies = []
        for i in honest:
            row = before[i].clone()
            row[start : start + size] = torch.from_numpy(mean)
            logits = torch.cat(
                [run.stack.model(row, {k: b[i] for k, b in run.stack.buffers.items()}).eval()(x) for x in batches()]
            )
            accuracies.append((logits.argmax(1) == labels).double().mean().item())
        assert tried[name]["accuracy"] == pytest.approx(np.mean(accuracies), rel=1e-9)
    assert len({t["accuracy"] for t in tried.values()}) > 1


def places(module):
    starts = offsets(module)
    return {name: (starts[name], parameter.numel()) for name, parameter in module.named_parameters()}


def offsets(module):
    """Where each parameter begins in the row of a node; parameters lie in the row in the order of the module."""
    places, start = {}, 0
    for name, parameter in module.named_parameters():
        places[name] = start
        start += parameter.numel()
    return places


def test_a_run_writes_measures_and_their_picture(configs, fit):
    probe = ["--callbacks", "[{class_path: SkewProbe, init_args: {samples: 64}}]", "--distillation", "null"]
    assert fit(*probe) == 0
    run = latest(fit.runs)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) >= 2
    assert all(line[f"skew/{name}"] is None or line[f"skew/{name}"] >= 0 for line in lines for name in MEASURES)
    tensors = json.loads((run / "summary.json").read_text())["skew/tensors"]
    assert "network.head.weight" in tensors
    assert (run / "plots" / "skew.png").stat().st_size > 10_000


def test_a_run_that_repeats_its_last_evaluation_measures_the_same(fit):
    probe = ["--callbacks", "[{class_path: SkewProbe, init_args: {samples: 64}}]", "--distillation", "null"]
    assert fit(*probe) == 0
    run = latest(fit.runs)
    before = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][-1]
    for file in ("summary.json", "checkpoints/final.ckpt"):
        (run / file).unlink()
    assert fit(*probe, "--run.resume", "auto") == 0
    after = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][-1]
    measured = {name: before[f"skew/{name}"] for name in MEASURES}
    assert measured == {name: after[f"skew/{name}"] for name in MEASURES}
    assert measured["gradient_own"] > 0


def test_without_held_out_samples_there_is_nothing_to_measure(fit, capsys):
    assert fit("--callbacks", "[{class_path: SkewProbe}]", "--data.validation", "0", "--distillation", "null") == 2
    assert "SkewProbe needs held-out samples" in capsys.readouterr().err


def test_classes_that_all_nodes_have_leave_no_value():
    own, lacking = masked_means(torch.ones(2, 3), torch.tensor([[True, False, False], [True, True, True]]))
    assert own.tolist() == [1.0, 1.0]
    assert lacking[0] == 1
    assert lacking[1].isnan()
