"""Nodes as rows: views, layout, gradients, agreement of the engines, dropout of both kinds, consensus."""

import copy
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_idkd import randomness
from lightning_idkd.callbacks import BalancedSoftmax
from lightning_idkd.errors import UserError
from lightning_idkd.models import CNN, MLP, ResNet
from lightning_idkd.nodes.node import NodeModule
from lightning_idkd.nodes.stack import NodeStack, mean_buffers, run_network

ARCHITECTURES = {
    "batch norm": CNN(4, norm="batch"),
    "dropout": CNN(4, norm="group", dropout=0.3),
    "group norm": ResNet(8, width=8, norm="group"),
}
ENGINES = ["loop", "parallel", "vmap"]
N, B, C, S, K = 3, 4, 2, 8, 5
every_network = pytest.mark.parametrize("name", ARCHITECTURES)
every_engine = pytest.mark.parametrize("engine", ENGINES)


class Drawing(nn.Module):
    """Batch norm, then a dropout that draws from the global generator."""

    def __init__(self):
        super().__init__()
        self.norm, self.head = nn.BatchNorm2d(C), nn.Linear(C * S * S, K)

    def forward(self, x):
        return self.head(F.dropout(self.norm(x).flatten(1), 0.5, self.training))


def stack(network="batch norm", engine="loop", dtype=torch.float64, seed=0, nodes=range(N), loss=None):
    build = network if callable(network) else lambda: ARCHITECTURES[network].build(C, S, K)

    def node():
        module = NodeModule(build())
        module.loss = loss
        return module

    return NodeStack(node, nodes, seed, dtype=dtype, engine=engine)


def batch(seed=0, dtype=torch.float64, n=N):
    """Images [n, B, C, S, S], channels-last as the store gives them, and soft targets [n, B, K]."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, B, S, S, C, generator=g, dtype=torch.float64).movedim(-1, -3)
    return x.to(dtype), torch.randn(n, B, K, generator=g, dtype=torch.float64).softmax(-1).to(dtype)


def spread(s, scale=0.05):
    """Move the nodes apart."""
    s.X.add_(scale * torch.randn(s.X.shape, dtype=s.X.dtype, generator=torch.Generator().manual_seed(9)))
    return s


def snapshot(s):
    return {"X": s.X.clone(), "G": s.G.clone()} | {k: b.clone() for k, b in s.buffers.items()}


def same(s, before):
    return all(torch.equal(before[k], t) for k, t in ({"X": s.X, "G": s.G} | s.buffers).items())


def in_row_order(tensors):
    """Parameters flattened one after the other, four-dimensional ones with their channels last."""
    return torch.cat([(t.permute(0, 2, 3, 1) if t.ndim == 4 else t).flatten() for t in tensors])


def assert_views(s):
    """Storage, place and value of every parameter, gradient and buffer, without the code under test."""
    assert s.views_intact()
    for i, module in enumerate(s.modules):
        offset = start = i * s.X.stride(0)
        for p in module.parameters():
            for t, rows in ((p, s.X), (p.grad, s.G)):
                assert t.untyped_storage().data_ptr() == rows.untyped_storage().data_ptr()
                assert t.storage_offset() == offset
            assert p.ndim != 4 or p.permute(0, 2, 3, 1).is_contiguous()
            offset += p.numel()
        assert offset == start + s.parameters
        assert torch.equal(in_row_order(module.parameters()), s.X[i])
        assert torch.equal(in_row_order(p.grad for p in module.parameters()), s.G[i])
        for name, b in module.named_buffers():
            assert b.untyped_storage().data_ptr() == s.buffers[name].untyped_storage().data_ptr()
            assert torch.equal(b, s.buffers[name][i])


def copies(s):
    """The nodes again as ordinary modules that share no memory with the rows."""
    modules = []
    for i in range(s.n):
        module, offset = copy.deepcopy(s.modules[i]), 0
        for p in module.parameters():
            out, *rest = p.shape
            flat = s.X[i, offset : offset + p.numel()].clone()
            value = flat.view(out, rest[1], rest[2], rest[0]).permute(0, 3, 1, 2) if p.ndim == 4 else flat.view(p.shape)
            p.data = value.contiguous()
            p.grad = None
            offset += p.numel()
        for name, b in list(module.named_buffers()):
            owner, _, leaf = name.rpartition(".")
            module.get_submodule(owner)._buffers[leaf] = b.clone()
        modules.append(module.train())
    return modules


def by_autograd(modules, x, y):
    """Losses [n] and gradients [n, P] of separate modules."""
    losses, gradients = [], []
    for module, xi, yi in zip(modules, x, y, strict=True):
        loss = -(yi * module.network(xi.contiguous()).log_softmax(1)).sum(1).mean()
        gradients.append(in_row_order(torch.autograd.grad(loss, list(module.parameters()))))
        losses.append(loss.detach())
    return torch.stack(losses), torch.stack(gradients)


# ---------------------------------------------------------------------- rows


@every_engine
@every_network
def test_parameters_gradients_and_buffers_stay_in_their_rows(name, engine):
    s, (x, y) = stack(name, engine), batch()
    assert_views(s)
    for step in range(3):
        s.step(x, y, step)
        s.X.sub_(0.1 * s.G)
        assert_views(s)
    s.X.copy_(torch.arange(s.X.numel()).view_as(s.X) / s.X.numel())
    assert_views(s)
    s.gradient(0.5 * s.X, x, y, 3)
    assert_views(s)


def test_a_convolution_lies_channels_last_in_its_row():
    s = stack()
    (slot,) = (slot for slot in s.layout if slot.name == "network.layers.0.weight")
    weight = s.modules[1].network.layers[0].weight
    assert weight.shape == (4, C, 3, 3)
    assert weight.is_contiguous(memory_format=torch.channels_last)
    o, c, h, w = 2, 1, 0, 2
    s.X[1, slot.offset + ((o * 3 + h) * 3 + w) * C + c] = 42.0
    assert weight[o, c, h, w] == 42.0
    assert torch.equal(slot.view(s.X)[1], weight)


def test_the_layout_names_all_parameters_back_to_back():
    s = stack("group norm")
    plain = NodeModule(ARCHITECTURES["group norm"].build(C, S, K))
    assert [(d["name"], tuple(d["shape"])) for d in s.describe()] == [(k, p.shape) for k, p in plain.named_parameters()]
    sizes = [p.numel() for p in plain.parameters()]
    assert [d["offset"] for d in s.describe()] == [sum(sizes[:i]) for i in range(len(sizes))]
    assert s.parameters == sum(sizes)


def test_all_nodes_start_from_one_row_that_the_seed_alone_fixes():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    s = stack("group norm")
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(s.X, s.X[:1].expand_as(s.X))
    assert s.X[0].std() > 0
    torch.manual_seed(2)
    assert torch.equal(stack("group norm").X, s.X)
    assert not torch.equal(stack("group norm", seed=1).X, s.X)
    assert torch.equal(stack("group norm", nodes=[2]).X[0], s.X[2])  # another process starts there too


@pytest.mark.parametrize("cut", [
    lambda module: module.double(),
    lambda module: module.to(memory_format=torch.contiguous_format),
    lambda module: setattr(module.network.head, "weight", nn.Parameter(module.network.head.weight.detach().clone())),
    lambda module: module.network.layers[1][0]._buffers.update(running_mean=torch.zeros(4)),
])  # fmt: skip
def test_cut_views_are_seen(cut):
    s = stack(dtype=torch.float32)
    assert s.views_intact()
    cut(s.modules[1])
    assert not s.views_intact()


# ---------------------------------------------------------------------- gradients


@every_engine
@pytest.mark.parametrize("name", ["batch norm", "group norm"])
def test_losses_gradients_and_statistics_are_those_of_separate_modules(name, engine):
    s, (x, y) = spread(stack(name, engine)), batch()
    modules = copies(s)
    expected_losses, expected = by_autograd(modules, x, y)
    X = s.X.clone()
    losses = s.step(x, y, 0)
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-12)
    np.testing.assert_allclose(s.G, expected, rtol=0, atol=1e-12 * float(expected.norm()))
    assert torch.equal(s.X, X)
    assert not losses.requires_grad
    for i, module in enumerate(modules):
        for k, b in module.named_buffers():
            np.testing.assert_allclose(s.buffers[k][i], b, rtol=1e-12)
    if name == "batch norm":
        assert s.buffers["network.layers.1.0.num_batches_tracked"].tolist() == [1] * N


@every_engine
def test_gradients_replace_those_of_the_step_before(engine):
    s, (x, y) = stack("group norm", engine), batch()
    s.step(x, y, 0)
    first = s.G.clone()
    s.step(x, y, 1)
    assert torch.equal(s.G, first)


@every_engine
@every_network
def test_gradient_at_other_parameters_leaves_everything_in_place(name, engine):
    s, (x, y) = spread(stack(name, engine)), batch()
    s.step(x, y, 4)
    before, other = snapshot(s), s.X + 0.1
    there = s.gradient(other, x, y, 4)
    assert same(s, before)
    assert torch.equal(s.gradient(s.X, x, y, 4), s.G)  # the same batch draws the same masks
    s.X.copy_(other)
    s.step(x, y, 4)
    assert torch.equal(there, s.G)
    assert not torch.equal(there, before["G"])


@every_engine
@every_network
def test_loss_at_other_parameters_leaves_everything_in_place(name, engine):
    s, (x, y) = spread(stack(name, engine)), batch()
    s.step(x, y, 4)
    before, other = snapshot(s), s.X + 0.1
    there = s.loss(other, x, y, 4)
    assert same(s, before)
    s.X.copy_(other)
    expected = s.step(x, y, 4)  # the same batch draws the same masks
    torch.testing.assert_close(there, expected, rtol=1e-12, atol=0)
    assert not there.requires_grad


@every_engine
@every_network
def test_features_and_gradients_through_them_leave_everything_in_place(name, engine):
    """A loss whose derivative by the features is ``V`` is, but for a constant, the sum of their products."""
    s, (x, y) = spread(stack(name, engine)), batch()
    s.step(x, y, 4)
    before, other = snapshot(s), s.X + 0.1
    features = s.features(other, x, 4)
    V = torch.randn(features.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    found = s.pull_back(other, V, x, 4)
    assert same(s, before)
    assert_views(s)
    s.X.copy_(other)
    for i, module in enumerate(copies(s)):
        for layer in (m for m in module.modules() if isinstance(m, randomness.Dropout)):
            layer.calls = 0
        mine = module.network.features(x[i].contiguous())
        wanted = torch.autograd.grad((V[i] * mine).sum(), list(module.parameters()), materialize_grads=True)
        np.testing.assert_allclose(features[i], mine.detach(), rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(found[i], in_row_order(wanted), rtol=0, atol=1e-12 * float(found.norm()))
    assert not features.requires_grad
    assert features.std() > 0


@every_network
def test_nodes_stand_on_other_rows_for_a_while(name):
    s = spread(stack(name))
    before, other, x = snapshot(s), (s.X + 0.1).clone(), batch()[0]
    with s.use_parameters(other):
        assert torch.equal(s.X, other)
        assert_views(s)
        there = [run_network(module, [x[0]]).logits for module in s.modules]
    assert same(s, before)
    assert_views(s)
    for i, logits in enumerate(there):
        with torch.no_grad():
            np.testing.assert_allclose(
                logits, s.model(other[i], {k: b[i] for k, b in s.buffers.items()})(x[0]), atol=1e-6
            )
    with pytest.raises(KeyError), s.use_parameters(other):
        raise KeyError
    assert same(s, before)
    with s.use_parameters(s.X):  # its own: changes inside are meant
        s.X.add_(1.0)
    assert torch.equal(s.X, before["X"] + 1.0)


def tempered(temperatures):
    """What a batch has besides inputs and targets: label counts, which samples are private, temperatures."""
    return torch.ones(N, K, dtype=torch.float64), temperatures == 1, temperatures


@every_engine
@pytest.mark.parametrize("T", [0.5, 1.0, 4.0])
def test_at_a_temperature_the_loss_is_that_of_the_softened_answers_times_its_square(T, engine):
    """T^2 KL(target, softmax(z / T)) plus T^2 times the targets' entropy, which no parameter moves; the first two
    samples of a batch are private, at temperature 1."""
    s, (x, y) = spread(stack("group norm", engine)), batch()
    temperatures = torch.tensor([1.0, 1.0, T, T], dtype=torch.float64).expand(N, B)
    modules = copies(s)
    losses = s.step(x, y, 0, *tempered(temperatures))
    for i, module in enumerate(modules):
        z = module.network(x[i].contiguous())
        kl = T**2 * F.kl_div((z[2:] / T).log_softmax(1), y[i, 2:], reduction="none").sum(1)
        plain = F.cross_entropy(z[:2], y[i, :2], reduction="none")
        gradient = in_row_order(torch.autograd.grad((plain.sum() + kl.sum()) / B, list(module.parameters())))
        np.testing.assert_allclose(s.G[i], gradient, rtol=0, atol=1e-12 * float(gradient.norm()))
        entropy = T**2 * torch.special.entr(y[i, 2:]).sum(1)
        np.testing.assert_allclose(losses[i], ((plain.sum() + kl.sum() + entropy.sum()) / B).detach(), rtol=1e-12)


@every_engine
def test_weights_in_the_targets_weigh_loss_and_gradient(engine):
    """Over the batch, not over the sum of the weights; with and without temperatures."""
    s, (x, y) = spread(stack("group norm", engine)), batch()
    weights = torch.tensor([1.0, 0.0, 0.25, 3.0], dtype=torch.float64).expand(N, B)
    modules = copies(s)
    for more in ([], tempered(torch.full((N, B), 2.0, dtype=torch.float64))):
        t = 2.0 if more else 1.0
        losses = s.step(x, y * weights[..., None], 0, *more)
        for i, module in enumerate(modules):
            one = -(y[i] * (module.network(x[i].contiguous()) / t).log_softmax(1)).sum(1)
            loss = (t**2 * weights[i] * one).sum() / B
            gradient = in_row_order(torch.autograd.grad(loss, list(module.parameters())))
            np.testing.assert_allclose(losses[i], loss.detach(), rtol=1e-12)
            np.testing.assert_allclose(s.G[i], gradient, rtol=0, atol=1e-12 * float(gradient.norm()))


@every_network
def test_engines_agree_with_temperatures_and_at_other_parameters(name):
    x, y = batch()
    more = tempered(torch.tensor([1.0, 2.0, 1.0, 0.5], dtype=torch.float64).expand(N, B))
    found = []
    for engine in ("loop", "vmap"):
        s = spread(stack(name, engine))
        losses = s.step(x, y, 3, *more)
        found.append((losses, s.G.clone(), s.gradient(s.X + 0.1, x, y, 3, *more)))
    for loop, vmap in zip(*found, strict=True):
        assert (loop - vmap).norm() <= 1e-9 * loop.norm()
    assert not torch.equal(found[0][1], found[0][2])


# ---------------------------------------------------------------------- engines


def trained(name, engine, dtype, steps):
    s = spread(stack(name, engine, dtype))
    for step in range(steps):
        s.step(*batch(step, dtype), step)
        s.X.sub_(0.05 * s.G)
    return s


@pytest.fixture
def threads():
    """Leave torch's thread count as it was."""
    count = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(count)


@every_network
def test_engines_agree_in_double_precision_over_fifty_steps(name, threads):
    loop = trained(name, "loop", torch.float64, 50)
    for workers in (1, 2):
        threads(workers)
        vmap = trained(name, "vmap", torch.float64, 50)
        assert (loop.X - vmap.X).norm() <= 1e-9 * loop.X.norm(), workers
        for k, b in loop.buffers.items():
            if b.is_floating_point():
                assert (b - vmap.buffers[k]).norm() <= 1e-9 * b.norm(), (workers, k)
            else:
                assert torch.equal(b, vmap.buffers[k]), (workers, k)
    assert (loop.X - spread(stack(name)).X).norm() > 0.01 * loop.X.norm()  # they went somewhere


@pytest.mark.parametrize("name", [*ARCHITECTURES, Drawing])
@pytest.mark.parametrize("workers", [2, 3, 5])
def test_workers_give_the_bits_of_the_loop(name, workers, threads):
    threads(1)
    loop = trained(name, "loop", torch.float32, 5)
    threads(workers)
    parallel = trained(name, "parallel", torch.float32, 5)
    assert torch.equal(loop.X, parallel.X)
    assert all(torch.equal(b, parallel.buffers[k]) for k, b in loop.buffers.items())
    assert torch.get_num_threads() == workers
    shares = [N] if name is Drawing else [1, 2] if workers == 2 else [1, 1, 1]
    assert [len(rows) for rows in parallel._split_rows(range(N))] == shares


@pytest.mark.parametrize("network", [Drawing, "group norm"])
def test_workers_answer_as_the_loop_does(network, threads):
    """Also of a network that draws whenever it is asked."""
    found = []
    for engine, workers in (("loop", 1), ("parallel", 2), ("parallel", 2)):
        threads(workers)
        s = trained(network, engine, torch.float32, 1)
        torch.manual_seed(0)
        found.append(s.each(lambda i, s=s: s.modules[i](batch(7, torch.float32)[0][i])))
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_where_a_worker_fails_the_others_have_ended(threads):
    threads(2)
    s, ended = trained("group norm", "parallel", torch.float32, 1), []

    def work(i):
        if i == 0:
            raise ValueError("row 0")
        time.sleep(0.2)
        ended.append(i)

    with pytest.raises(ValueError, match="row 0"):
        s.each(work)
    assert sorted(ended) == [1, 2]


@every_network
@pytest.mark.parametrize("workers", [1, 2])
def test_engines_agree_in_single_precision_on_one_step(name, workers, threads):
    loop = trained(name, "loop", torch.float32, 1)
    threads(workers)
    vmap = trained(name, "vmap", torch.float32, 1)
    assert loop.G.dtype == vmap.G.dtype == torch.float32
    assert (loop.G - vmap.G).norm() <= 1e-5 * loop.G.norm()
    for k, b in loop.buffers.items():
        np.testing.assert_allclose(vmap.buffers[k], b, rtol=1e-5, atol=1e-6)


@every_engine
def test_dropout_masks_differ_between_nodes_and_steps_and_follow_the_node(engine):
    s, (x, y) = stack("dropout", engine), batch()
    x, y = x[:1].expand(N, *x.shape[1:]), y[:1].expand(N, *y.shape[1:])  # the same row and data at every node
    losses = s.step(x, y, 0)
    assert len(set(losses.tolist())) == N
    assert not torch.equal(s.step(x, y, 1), losses)
    torch.manual_seed(3)
    assert torch.equal(s.step(x, y, 0), losses)
    alone = stack("dropout", engine, nodes=[2])
    np.testing.assert_allclose(alone.step(x[:1], y[:1], 0), losses[2:], rtol=1e-12)


@every_engine
@every_network
def test_a_network_without_draws_of_its_own_leaves_the_global_generator(name, engine):
    s, (x, y) = stack(name, engine), batch()
    before = torch.get_rng_state()
    s.step(x, y, 0)
    s.step(x, y, 1)
    assert torch.equal(torch.get_rng_state(), before)


def test_draws_from_the_global_generator_depend_on_seed_node_and_step_alone():
    x, y = batch(n=1)
    x, y = x.expand(N, *x.shape[1:]), y.expand(N, *y.shape[1:])

    def losses(global_seed, steps, **options):
        s = stack(Drawing, **options)
        torch.manual_seed(global_seed)
        return [s.step(x[: s.n], y[: s.n], step) for step in steps]

    first = losses(1, [0, 1])
    assert all(torch.equal(a, b) for a, b in zip(first, losses(2, [0, 1]), strict=True))
    assert torch.equal(losses(3, [1])[0], first[1])  # resumed at step 1
    assert torch.equal(losses(4, [1], nodes=[2])[0], first[1][2:])  # in another process
    assert len({*first[0].tolist(), *first[1].tolist()}) == 2 * N


@pytest.mark.parametrize("name", ["batch norm", "dropout"])
def test_vmap_may_take_some_nodes_at_a_time(name, monkeypatch):
    together, apart = (spread(stack(name, "vmap")) for _ in range(2))
    apart.nodes_per_call = 2
    calls, vmap = [], NodeStack._run_vmap
    monkeypatch.setattr(
        NodeStack, "_run_vmap", lambda self, f, rows, *rest: calls.append(rows) or vmap(self, f, rows, *rest)
    )
    losses = [s.step(*batch(), 0) for s in (together, apart)]
    assert calls == [range(3), range(1), range(1, 3)]
    torch.testing.assert_close(*losses, rtol=1e-12, atol=1e-12)
    assert (together.G - apart.G).norm() <= 1e-12 * together.G.norm()
    for k, b in together.buffers.items():
        torch.testing.assert_close(b, apart.buffers[k])
    assert_views(apart)


@pytest.mark.slow
def test_a_compiled_node_takes_the_same_steps_with_buffers_dropout_a_frozen_layer_and_a_local_loss():
    def network():
        layers = (nn.Linear(C * S * S, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3),
                  nn.Linear(8, 8), nn.Linear(8, K))  # fmt: skip
        layers[4].requires_grad_(False)
        return nn.Sequential(nn.Flatten(), *layers)

    loop, compiled = (spread(stack(network, engine, loss=BalancedSoftmax())) for engine in ("loop", "compile"))
    counts = torch.arange(N * K).view(N, K).double()
    more = counts, torch.arange(B).expand(N, B) != 1, torch.ones(N, B).double()  # sample 1 is distilled
    for step in range(3):
        losses = [s.step(*batch(step), step, *more) for s in (loop, compiled)]
        torch.testing.assert_close(*losses, rtol=1e-9, atol=1e-12)
        assert (loop.G - compiled.G).norm() <= 1e-9 * loop.G.norm()
    for k, b in loop.buffers.items():
        torch.testing.assert_close(b, compiled.buffers[k])
    assert list(compiled.frozen) == ["network.5.weight", "network.5.bias"]
    assert all(torch.equal(t, compiled.frozen[k]) for k, t in loop.frozen.items())
    assert compiled.views_intact()


def test_what_torch_compile_cannot_do_is_a_sentence(monkeypatch):
    def fails(*_, **__):
        raise torch._dynamo.exc.Unsupported("a graph break\nand more", "here")

    s = stack(engine="compile")
    monkeypatch.setattr(s, "_program", fails, raising=False)
    with pytest.raises(
        UserError, match=r"run\.engine: torch\.compile fails for this network or machine \(.*a graph break\)$"
    ):
        s.step(*batch(), 0)


def test_vmap_refuses_draws_from_the_global_generator():
    with pytest.raises(UserError, match=r"run\.engine: vmap .*torch\.nn\.Dropout.*run\.engine: loop"):
        stack(Drawing, "vmap").step(*batch(), 0)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("network", [*ARCHITECTURES, Drawing])
def test_choosing_an_engine_measures_without_a_trace(network):
    s, (x, y) = spread(stack(network)), batch()
    s.G.fill_(7.0)
    before = snapshot(s)
    engine, count, cast = s.choose(x, y, ENGINES, [1])
    assert engine == s.engine
    assert engine in (["loop"] if network is Drawing else ENGINES)
    assert count == torch.get_num_threads() == 1
    assert cast is s.autocast is False
    assert same(s, before)
    assert_views(s)
    fixed = spread(stack(network, engine))
    assert torch.equal(s.step(x, y, 0), fixed.step(x, y, 0))


@pytest.mark.usefixtures("threads")
def test_choosing_picks_the_fastest(monkeypatch):
    s = stack()
    cost = {("loop", 1): 5, ("loop", 2): 4, ("parallel", 2): 3.5, ("vmap", 1): 2, ("vmap", 2): 3}
    monkeypatch.setattr(s, "_time_step", lambda *_: cost[s.engine, torch.get_num_threads()])
    assert s.choose(*batch(), ENGINES, [1, 2]) == ("vmap", 1, False)
    assert (s.engine, torch.get_num_threads()) == ("vmap", 1)
    assert s.choose(*batch(), ["loop", "parallel"], [1, 2]) == ("parallel", 2, False)
    assert s.choose(*batch(), ["loop"], [1, 2]) == ("loop", 2, False)
    monkeypatch.setattr(s, "_time_step", lambda *_: 1 - s.autocast / 2)
    assert s.choose(*batch(), ["loop"], [1], casts=[False, True]) == ("loop", 1, True)
    assert s.autocast


@pytest.mark.usefixtures("threads")
def test_choosing_leaves_out_autocast_where_a_layer_refuses_it(monkeypatch):
    s = stack()
    s.autocast = False

    def time_step(*_):
        if s.autocast:
            raise RuntimeError("expected scalar type Float but found BFloat16")
        return 1.0

    monkeypatch.setattr(s, "_time_step", time_step)
    assert s.choose(*batch(), ["loop"], [1], casts=[False, True]) == ("loop", 1, False)
    assert not s.autocast
    with pytest.raises(RuntimeError, match="BFloat16"):
        s.choose(*batch(), ["loop"], [1], casts=[True])


@pytest.mark.usefixtures("threads")
def test_choosing_reports_the_error_if_no_engine_runs():
    s, (x, y) = stack(), batch()
    with pytest.raises(RuntimeError, match="channels"):
        s.choose(x[:, :, :1], y, ENGINES, [1])
    with pytest.raises(UserError, match=r"run\.engine"):
        stack(Drawing).choose(x, y, ["vmap"], [1])


# ---------------------------------------------------------------------- prediction and consensus


def test_a_model_stands_on_the_given_row_and_buffers():
    s = trained("batch norm", "loop", torch.float64, 2)
    row, buffers, x = s.X.mean(0), mean_buffers(s.buffers), batch(5)[0][0]
    before = snapshot(s)
    model = s.model(row, buffers)
    assert not model.training
    assert torch.equal(in_row_order(model.parameters()), row)
    for k, b in model.named_buffers():
        assert torch.equal(b, buffers[k])
    params = {slot.name: slot.view(row) for slot in s.layout}
    expected = torch.func.functional_call(copy.deepcopy(s.modules[1]).eval(), {**params, **buffers}, (x,))
    assert torch.equal(model(x), expected)
    row.zero_()  # no copy
    assert torch.equal(model(x), torch.zeros(B, K, dtype=torch.float64))
    assert same(s, before)
    assert_views(s)


def test_buffers_of_the_consensus_are_means_and_counters_the_first():
    stacked = {"mean": torch.tensor([[1.0, 2.0], [3.0, 6.0]]), "batches": torch.tensor([5, 7])}
    averaged = mean_buffers(stacked)
    assert averaged["mean"].tolist() == [2.0, 4.0]
    assert averaged["batches"].tolist() == 5
    averaged["batches"].add_(1)
    assert stacked["batches"].tolist() == [5, 7]


def test_prediction_keeps_the_order_and_the_mode():
    s = trained("batch norm", "loop", torch.float64, 1)
    x, before = batch(6)[0].flatten(0, 1), snapshot(s)
    outputs = run_network(s.modules[1], x.split(5))
    assert s.modules[1].training
    assert same(s, before)
    assert outputs.logits.shape == (N * B, K)
    assert outputs.logits.dtype == outputs.features.dtype == torch.float32
    assert not outputs.logits.requires_grad
    with torch.no_grad():
        expected = s.model(s.X[1], {k: b[1] for k, b in s.buffers.items()})(x)
    np.testing.assert_allclose(outputs.logits, expected, rtol=1e-5, atol=1e-6)


def test_a_single_sample_has_the_same_outputs_in_every_row():
    """Rows of 650 values begin at addresses that are 0 or 8 modulo 16."""
    network = lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, K * 10))  # noqa: E731
    stack = NodeStack(lambda: NodeModule(network()), range(2), 0)
    assert stack.parameters % 4 == 2
    samples = torch.randn(20, 1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    first, second = (run_network(module, samples).logits for module in stack.modules)
    assert torch.equal(first, second)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("network", ["CNN", "MLP"])
def test_a_batch_of_one_sample_has_the_same_gradients_in_every_row(network):
    torch.set_num_threads(1)
    make = {"CNN": lambda: CNN().build(1, 8, K), "MLP": lambda: MLP().build(30, K)}[network]
    x = torch.randn(5, 6, 1, *((1, 8, 8) if network == "CNN" else (30,)), generator=torch.Generator().manual_seed(0))
    y = torch.arange(5)[:, None] % K
    stacks = [NodeStack(lambda: NodeModule(make()), range(first, 5), 0) for first in range(5)]
    start = stacks[0].X + 0.05 * torch.randn(stacks[0].X.shape, generator=torch.Generator().manual_seed(1))
    for first, part in enumerate(stacks):
        part.X.copy_(start[first:])
        for t in range(6):
            stacks[0].step(x[:, t], y, t)
            part.step(x[first:, t].clone(), y[first:], t)
            assert torch.equal(part.G, stacks[0].G[first:])


# ---------------------------------------------------------------------- what CUDA devices use


def test_outputs_of_all_nodes_in_one_call_are_those_of_each():
    s = spread(stack("group norm"))
    batches = [batch(seed, n=1)[0][0] for seed in range(2)]
    together = list(s._predict(range(1, N), batches))
    assert len(together) == N - 1
    for outputs, module in zip(together, s.modules[1:], strict=True):
        expected = run_network(module, batches)
        torch.testing.assert_close(outputs.logits, expected.logits)
        torch.testing.assert_close(outputs.features, expected.features)
        assert outputs.head is module.network.head
    assert all(module.training for module in s.modules)
    assert_views(s)


def test_networks_without_features_have_outputs_too():
    s = spread(stack(Drawing))
    [x] = batch(n=1)[0]
    for outputs, module in zip(s._predict(range(N), [x]), s.modules, strict=True):
        torch.testing.assert_close(outputs.logits, run_network(module, [x]).logits)
        assert outputs.features is None
        assert outputs.head is None


@every_engine
def test_autocast_is_of_training_alone(engine):
    plain, cast = (spread(stack("group norm", engine, torch.float32)) for _ in range(2))
    cast.autocast = True
    x, y = batch(dtype=torch.float32)
    losses = cast.step(x, y, 0)
    torch.testing.assert_close(losses, plain.step(x, y, 0), rtol=0.02, atol=0)
    assert not torch.equal(cast.G, plain.G)
    assert (cast.G - plain.G).norm() < 0.3 * plain.G.norm()  # of so few samples: where ReLU bends, roundings tell
    assert cast.G.dtype == losses.dtype == torch.float32
    assert torch.equal(run_network(cast.modules[0], [x[0]]).logits, run_network(plain.modules[0], [x[0]]).logits)
    assert_views(cast)
