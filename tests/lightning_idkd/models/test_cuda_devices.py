"""A CUDA device does what the CPU does, by every engine."""

from __future__ import annotations

import pytest
import torch
from interrupts import InterruptAt
from short_runs import checkpoint, extra, latest, lines, same
from torch import nn

from lightning_idkd.data.images import Images
from lightning_idkd.data.partition import IID, partition
from lightning_idkd.data.store import Store
from lightning_idkd.errors import UserError
from lightning_idkd.models import CNN, ResNet
from lightning_idkd.nodes.node import NodeModule
from lightning_idkd.nodes.stack import NodeStack

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

NETWORKS = {
    "ResNet, EvoNorm": ResNet(8, width=16, norm="evonorm"),
    "ResNet, EvoNorm of QG-DSGDm's code": ResNet(8, width=16, norm="evonorm_qgm"),
    "ResNet, GroupNorm": ResNet(8, width=8, norm="group"),
    "ResNet, groups of 3": ResNet(8, width=12, norm="group"),
    "CNN, dropout": CNN(4, norm="group", dropout=0.3),
    "CNN, batch norm": CNN(4, norm="batch"),
}
ENGINES = ["loop", "vmap", "graph"]
N, B, C, S, K = 4, 8, 3, 16, 5


def exact():
    """As a run has it."""
    torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32 = True, False


def stack(network, engine, device="cuda", dtype=torch.float32):
    exact()
    build = network if isinstance(network, type) else lambda: NETWORKS[network].build(C, S, K)
    s = NodeStack(lambda: NodeModule(build()), range(N), 0, device, dtype, engine)
    s.X.add_(0.05 * torch.randn(s.X.shape, generator=torch.Generator().manual_seed(9)).to(s.X))
    return s


def batch(device="cuda", dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(N, B, S, S, C, generator=g, dtype=torch.float64).movedim(-1, -3)
    return x.to(device, dtype), torch.randn(N, B, K, generator=g, dtype=torch.float64).softmax(-1).to(device, dtype)


def walk(s, steps):
    """Descent on a batch a step; the last losses."""
    for step in range(steps):
        losses = s.step(*batch(s.device, s.X.dtype, step), step)
        s.X.sub_(0.02 * s.G)
    return losses


def error(a, b):
    return ((a.cpu().double() - b.double()).norm() / b.double().norm()).item()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("network", NETWORKS)
class TestAgainstTheCPU:
    def test_fifty_steps_in_float64(self, network, engine):
        cpu, cuda = stack(network, "loop", "cpu", torch.float64), stack(network, engine, dtype=torch.float64)
        assert error(walk(cuda, 50), walk(cpu, 50)) < 1e-9
        assert error(cuda.X, cpu.X) < 1e-9
        for name, b in cpu.buffers.items():
            assert not b.is_floating_point() or error(cuda.buffers[name], b) < 1e-9
        assert cuda.views_intact()

    def test_a_step_in_float32(self, network, engine):
        cpu, cuda = stack(network, "loop", "cpu", torch.float64), stack(network, engine)
        for _ in range(4):  # the last of them is the recording's
            losses = cuda.step(*batch(), 7)
        expected = cpu.step(*batch("cpu", torch.float64), 7)
        if network != "CNN, batch norm":  # its statistics move, but do not count in training
            assert error(losses, expected) < 1e-5
        assert error(cuda.G, cpu.G) < 1e-5


@pytest.mark.parametrize("network", NETWORKS)
def test_a_recording_is_the_call_again_to_the_bit(network):
    vmap, graph = stack(network, "vmap"), stack(network, "graph")
    for seed in range(6):
        assert torch.equal(graph.step(*batch(seed=seed), seed), vmap.step(*batch(seed=seed), seed))
        assert torch.equal(graph.G, vmap.G)
        for s in (vmap, graph):
            s.X.sub_(0.1 * s.G)


def test_engines_that_read_rows_elsewhere_work_on_recordings():
    vmap, graph = stack("ResNet, EvoNorm", "vmap"), stack("ResNet, EvoNorm", "graph")
    for step in range(5):
        x, y = batch(seed=step)
        assert torch.equal(graph.gradient(0.9 * graph.X, x, y, step), vmap.gradient(0.9 * vmap.X, x, y, step))
        features = graph.features(graph.X, x, step)
        assert torch.equal(features, vmap.features(vmap.X, x, step))
        assert torch.equal(graph.pull_back(graph.X, features, x, step), vmap.pull_back(vmap.X, features, x, step))


class Looking(nn.Module):
    """Waits for the device, which no recording can."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(C * S * S, K)

    def forward(self, x):
        y = self.head(x.flatten(1))
        torch.cuda.synchronize()
        return y


def test_a_step_that_cannot_be_recorded_is_reported_and_not_chosen():
    s = stack(Looking, "graph")
    x, y = batch()
    for step in range(2):
        s.step(x, y, step)
    with pytest.raises(UserError, match=r"run.engine: graph .*vmap"):
        s.step(x, y, 2)
    assert stack(Looking, "loop").choose(x, y, ENGINES, [1])[0] in ("loop", "vmap")


class Drawing(nn.Module):
    """Draws from the global generator."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(C * S * S, K)

    def forward(self, x):
        return nn.functional.dropout(self.head(x.flatten(1)), 0.5, self.training)


def test_draws_from_the_device_generator_depend_on_the_step_alone():
    a, b = stack(Drawing, "loop"), stack(Drawing, "loop")
    a.step(*batch(), 0)
    first = a.step(*batch(), 1)
    torch.manual_seed(5)
    assert torch.equal(b.step(*batch(), 1), first)


def test_batches_are_those_of_the_cpu():
    g = torch.Generator().manual_seed(0)
    images = Images(
        torch.randint(256, (64, C, S, S), generator=g, dtype=torch.uint8), torch.arange(64) % K, tuple("abcde")
    )
    split = partition(IID(), images.labels.numpy(), 2, 0, 0.0)
    stores = [
        Store(images, images, None, split, range(2), batch=4, augment="crop_flip", device=device)
        for device in ("cpu", "cuda")
    ]
    orders = [store.order(0, 8) for store in stores]
    assert torch.equal(orders[1].cpu(), orders[0])
    for step in range(8):
        (x, y), (u, v) = (
            store.batch(order[:, 4 * step : 4 * step + 4], step) for store, order in zip(stores, orders, strict=True)
        )
        torch.testing.assert_close(u.cpu(), x)
        assert torch.equal(v.cpu(), y)


@pytest.mark.parametrize("engine", ENGINES)
def test_an_interrupted_run_ends_bit_equal(fit, tmp_path, engine):
    def run(folder, stops):
        variant = ["--run.engine", engine, "--run.accelerator", "cuda", *extra(InterruptAt, steps=stops)]
        return fit(*variant, "--run.resume", "auto", folder=folder)

    assert run("whole", []) == 0
    assert [run("cut", [7, 4 * 18 + 5]) for _ in range(3)] == [130, 130, 0]
    whole, cut = latest(tmp_path / "whole"), latest(tmp_path / "cut")
    assert same(checkpoint(whole), checkpoint(cut)) is None
    assert [m["accuracy/node_mean"] for m in lines(whole)] == [m["accuracy/node_mean"] for m in lines(cut)]


@pytest.mark.parametrize("rule", ["RelaySGD", "NGC", "CCL", "ChocoSGD", "LocalOptimizer"])
def test_rules_repeat_their_bits(fit, tmp_path, rule):
    variant = ["--run.accelerator", "cuda", "--run.engine", "vmap", "--gossip", rule, "--graph.topology", "Chain"]
    for folder in ("a", "b"):
        assert fit(*variant, folder=folder) == 0
    assert same(checkpoint(latest(tmp_path / "a")), checkpoint(latest(tmp_path / "b"))) is None
