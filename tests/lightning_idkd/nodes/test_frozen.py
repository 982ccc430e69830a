"""Frozen parameters under every engine, in checkpoints and in what a run says; fine-tuning a torchvision network."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from interrupts import InterruptAt
from short_runs import checkpoint, extra, latest, same
from torch import nn

import lightning_idkd as idkd
from lightning_idkd.cli import main
from lightning_idkd.errors import UserError
from lightning_idkd.models import Architecture, TorchModule
from lightning_idkd.nodes.node import NodeModule
from lightning_idkd.nodes.stack import NodeStack, run_network
from lightning_idkd.training import memory

N, B, C, S, K = 3, 4, 3, 8, 5
TRUNK = ["conv1.*", "bn1.*", "layer*"]  # of torchvision's ResNets
every_engine = pytest.mark.parametrize("engine", ["loop", "parallel", "vmap"])


class Half(nn.Module):
    """A frozen convolution with BatchNorm, and a trained one."""

    def __init__(self, classes=K, channels=C, asleep=False):
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(channels, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.5))
        self.trunk.requires_grad_(False).train(not asleep)
        self.body = nn.Conv2d(6, 6, 3)
        self.head = nn.Linear(6, classes)

    def features(self, x):
        return self.body(self.trunk(x)).mean((2, 3))

    def forward(self, x):
        return self.head(self.features(x))


class OnlyHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk, self.head = nn.Conv2d(C, 6, S).requires_grad_(False), nn.Linear(6, K)

    def features(self, x):
        return self.trunk(x).flatten(1)

    def forward(self, x):
        return self.head(self.features(x))


class HalfFrozen(Architecture):
    """The user's own way to freeze: their network does."""

    def build(self, channels, size, classes):
        return Half(classes, channels)


class AllFrozen(Architecture):
    def build(self, channels, size, classes):
        return Half(classes, channels).requires_grad_(False)


class NoGradient(NodeModule):
    """A loss of the frozen part alone."""

    def training_step(self, batch, batch_idx=0):
        return self.network.trunk(batch[0]).square().mean()


def stack(make=Half, engine="loop", nodes=N, node=NodeModule, dtype=torch.float64):
    s = NodeStack(lambda: node(make()), range(nodes), dtype=dtype, engine=engine)
    s.X.add_(0.05 * torch.randn(s.X.shape, dtype=dtype, generator=torch.Generator().manual_seed(9)))
    return s


def batch(seed=0, size=S, nodes=N, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(nodes, B, size, size, C, generator=g, dtype=torch.float64).movedim(-1, -3)
    return x.to(dtype), torch.randn(nodes, B, K, generator=g, dtype=torch.float64).softmax(-1).to(dtype)


def sgd(s, steps, decay=0.1):
    """Steps with weight decay on all that the rows hold."""
    for step in range(steps):
        s.step(*batch(step), step)
        s.X.sub_(0.05 * (s.G + decay * s.X))
    return s


def names(s):
    return [slot.name for slot in s.layout]


@every_engine  # compile: in test_stack
def test_they_keep_their_bits_under_every_engine_and_the_rest_descends(engine):
    s = stack(engine=engine)
    assert names(s) == [f"network.{name}" for name in ("body.weight", "body.bias", "head.weight", "head.bias")]
    before, start = {k: t.clone() for k, t in s.frozen.items()}, s.X.clone()
    sgd(s, 3)
    assert list(before) == [f"network.trunk.{name}" for name in ("0.weight", "0.bias", "1.weight", "1.bias")]
    for module in s.modules:
        assert all(torch.equal(module.get_parameter(k), t) for k, t in before.items())
        assert all(module.get_parameter(k).data_ptr() == s.frozen[k].data_ptr() for k in before)  # one copy of them
    assert s.views_intact()
    assert (s.X - start).abs().amax(1).min() > 1e-3
    torch.testing.assert_close(s.X, sgd(stack(), 3).X, rtol=1e-9, atol=1e-12)


@every_engine
def test_gradients_of_the_rest_are_autograds(engine):
    s, (x, y) = stack(lambda: Half(asleep=True), engine), batch()  # without dropout
    modules = copy.deepcopy(s.modules)
    s.step(x, y, 0)
    for i, module in enumerate(modules):
        nn.functional.cross_entropy(module(x[i]), y[i]).backward()
        for slot in s.layout:
            torch.testing.assert_close(slot.view(s.G)[i], module.get_parameter(slot.name).grad, rtol=1e-9, atol=1e-12)


@every_engine
def test_a_cut_copy_is_seen(engine):
    s = stack(engine=engine)
    assert s.views_intact()
    s.modules[1].network.trunk.double().float().double()
    assert not s.views_intact()


@every_engine
def test_features_of_frozen_parameters_alone_have_no_gradient(engine):
    """As cross-feature losses ask for them."""
    s = stack(OnlyHead, engine)
    x, _ = batch()
    s.step(*batch(), 0)
    assert s.G.norm() > 0
    features = s.features(s.X, x, 0)
    assert torch.equal(s.pull_back(s.X, torch.ones_like(features), x, 0), torch.zeros_like(s.X))


@every_engine
def test_a_frozen_norm_learns_statistics_in_training_mode_and_not_in_evaluation_mode(engine):
    """Each node's own, of its own batches; a part that was built in evaluation mode stays in it, prediction or not."""
    awake, asleep = stack(engine=engine), stack(lambda: Half(asleep=True), engine)
    mean = "network.trunk.1.running_mean"
    for s in (awake, asleep):
        start = s.buffers[mean].clone()
        s.step(*batch(), 0)
        run_network(s.modules[0], [batch()[0][0]])
        s.step(*batch(1), 1)
        assert torch.equal(s.buffers[mean], start) == (s is asleep)
        assert [m.training for m in s.modules[0].network.trunk] == [s is awake] * 4
        assert s.modules[0].training
        assert s.modules[0].network.body.training
    assert not torch.equal(awake.buffers[mean][0], awake.buffers[mean][1])


def test_a_network_that_was_left_in_evaluation_mode_trains_all_but_its_frozen_parts():
    s = stack(lambda: Half(asleep=True).eval())
    assert s.modules[1].network.body.training
    assert not s.modules[1].network.trunk[1].training


def test_a_model_beside_the_nodes_has_frozen_parameters_of_its_own():
    s = stack()
    made = s.model(s.X.mean(0), {k: b[0] for k, b in s.buffers.items()})
    assert torch.equal(made.network.trunk[0].weight, s.frozen["network.trunk.0.weight"])
    with torch.no_grad():
        made.network.trunk[0].weight.zero_()
    assert s.frozen["network.trunk.0.weight"].any()


# ---------------------------------------------------------------------- torchvision


def resnet18():
    return TorchModule("torchvision.models.resnet18", frozen=TRUNK).build(C, 32, K)


def test_fine_tuning_a_torchvision_network_is_the_same_under_loop_and_vmap():
    """A ResNet-18 of which only the classifier is trained, its BatchNorms in training mode, for 32x32 images."""
    found = []
    for engine in ("loop", "vmap"):
        s = stack(resnet18, engine, nodes=2)
        before = {k: t.clone() for k, t in s.frozen.items()}
        losses = []
        for step in range(2):
            losses.append(s.step(*batch(step, 32, 2), step))
            s.X.sub_(0.05 * (s.G + 0.1 * s.X))
        assert all(torch.equal(before[k], t) for k, t in s.frozen.items())
        found.append((torch.stack(losses), s))
    (losses, loop), (theirs, vmap) = found
    assert names(loop) == ["network.head.weight", "network.head.bias"]
    assert loop.parameters == 513 * K
    assert loop.frozen_parameters == 11_689_512 - 513 * 1000  # the published size, less its classifier
    torch.testing.assert_close(theirs, losses, rtol=1e-9, atol=0)
    assert (vmap.X - loop.X).norm() <= 1e-9 * loop.X.norm()
    for k, b in loop.buffers.items():
        torch.testing.assert_close(vmap.buffers[k], b, rtol=1e-9, atol=1e-12)
    assert not torch.equal(loop.buffers["network.features.bn1.running_mean"][0],
                           loop.buffers["network.features.bn1.running_mean"][1])  # fmt: skip


def test_a_pattern_that_names_no_parameter_is_refused_with_the_parts_there_are():
    said = (r"node\.network\.frozen: no parameter of torchvision\.models\.resnet18 is named 'layers\*'; "
            "its parts are conv1, bn1, layer1, layer2, layer3, layer4, fc")  # fmt: skip
    with pytest.raises(UserError, match=said):
        TorchModule("torchvision.models.resnet18", frozen=["conv1.*", "layers*"]).build(C, 32, K)


# ---------------------------------------------------------------------- whole runs


OWN = ["--node.network", f"{__name__}.HalfFrozen", "--gossip.weight_decay", "0.01"]
COUNT, STILL = 60 + 12 + 330 + 70, 60 + 12  # 1x3x3 to 6, a norm; 6x3x3 to 6, 6 to 10


def test_a_run_says_how_many_there_are_and_neither_moves_nor_sends_them(fit, capsys):
    given = [*OWN, *extra(InterruptAt, steps=[30])]
    assert fit(*given) == 130
    assert f"HalfFrozen, {COUNT} parameters, {STILL} of them frozen; QGDSGDm" in capsys.readouterr().out
    assert fit(*given, "--run.resume", "auto") == 0
    assert fit(*OWN, folder="other") == 0
    run, other = latest(fit.runs), latest(fit.runs.parent / "other")
    summary, state = json.loads((run / "summary.json").read_text()), checkpoint(run)
    assert (summary["parameters"], summary["frozen_parameters"]) == (COUNT, STILL)
    assert state["X"].shape == (4, COUNT - STILL)
    assert sum(t.numel() for t in state["frozen"].values()) == STILL
    assert same(state["X"], checkpoint(other)["X"]) is None
    assert summary["communication"]["parameter_bytes"] == 4 * 2 * 4 * (COUNT - STILL) * (summary["steps"] + 1)
    loaded = idkd.load(run, trust=True)
    start = NodeStack(lambda: NodeModule(Half(10, 1)), range(1), 0).frozen
    for module in (loaded.stack.modules[3], loaded.consensus()):
        assert all(torch.equal(module.get_parameter(k), t) for k, t in start.items())
    assert f"{COUNT} parameters" in repr(loaded)
    assert main(["evaluate", str(run), "--trust"]) == 0


def test_all_of_them_frozen_is_refused(fit, capsys):
    assert fit("--node.network", f"{__name__}.AllFrozen") == 2
    assert f"node.network: all {COUNT} parameters are frozen (requires_grad is False)" in capsys.readouterr().err
    assert not fit.runs.exists()


@every_engine
def test_a_loss_of_frozen_parameters_alone_is_refused(engine):
    with pytest.raises(UserError, match=r"node\.module: the loss depends on no trained parameter"):
        stack(engine=engine, node=NoGradient).step(*batch(), 0)


def test_a_checkpoint_brings_them_back():
    s = stack()
    frozen = {k: t + 1 for k, t in s.frozen.items()}
    s.restore({"layout": s.describe(), "X": s.X.clone(), "buffers": s.buffers, "frozen": frozen})
    assert all(torch.equal(s.modules[2].get_parameter(k), t) for k, t in frozen.items())


def test_a_checkpoint_of_before_is_read_where_nothing_is_frozen_and_else_refused():
    s = stack()
    with pytest.raises(UserError, match="others are frozen"):
        s.restore({"layout": s.describe(), "X": s.X.clone(), "buffers": s.buffers})
    plain = stack(lambda: Half().requires_grad_(True))
    plain.restore({"layout": plain.describe(), "X": torch.ones_like(plain.X), "buffers": plain.buffers})
    assert (plain.X == 1).all()


def test_memory_holds_them_once(fit, monkeypatch):
    asked = {}
    monkeypatch.setattr(memory, "require_memory", lambda parts, *_: asked.update(parts))
    assert fit(*OWN, "--run.until", "1", "--distillation", "null") == 0
    frozen = asked["rows and gradients"]
    monkeypatch.setattr("lightning_idkd.training.memory.OBJECT", 0)
    assert fit(*OWN, "--run.until", "1", "--distillation", "null", folder="other") == 0
    assert asked["rows and gradients"] == 4 * (2 * 4 * (COUNT - STILL) + STILL) < frozen


def test_a_graph_is_counted_without_them(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = ["--graph.topology", "Ring", "--data.private", "Digits", "--node.network", f"{__name__}.HalfFrozen"]
    assert main(["topology", *given]) == 0
    assert f"({COUNT - STILL} trained parameters of HalfFrozen" in capsys.readouterr().out
