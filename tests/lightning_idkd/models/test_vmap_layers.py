"""Layers that have the nodes' channels side by side under vmap."""

import pytest
import torch
from torch import nn

from lightning_idkd import NodeModule, NodeStack
from lightning_idkd.models.norms import EvoNormQGM, EvoNormS0, GroupNorm
from lightning_idkd.models.vmap_layers import Conv2d, MaxPool2d
from lightning_idkd.models.vmap_ops import call_channelwise

N, B, C, S = 3, 4, 16, 6
LAYERS = {
    "MaxPool2d": lambda: MaxPool2d(3, 2, 1),
    "GroupNorm": lambda: GroupNorm.over(C, relu=True),
    "GroupNorm, no parameters": lambda: GroupNorm(4, C, affine=False),
    "EvoNormS0": lambda: EvoNormS0(C),
    "EvoNormQGM": lambda: EvoNormQGM(C),
}


def side_by_side(dtype=torch.float32):
    """Images [B, N, C, S, S] that lie as [B, S, S, N, C]."""
    x = torch.randn(B, S, S, N, C, generator=torch.Generator().manual_seed(0)).to(dtype)
    return x.permute(0, 3, 4, 1, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_nodes_side_by_side_equal_one_after_the_other(name, dtype):
    layer, x = LAYERS[name]().to(dtype), side_by_side(dtype)
    parameters = {k: p.detach() + torch.arange(N)[:, None] for k, p in layer.named_parameters()}
    leaves = [x.clone().requires_grad_(), *(p.clone().requires_grad_() for p in parameters.values())]

    def run(x, *values):
        return torch.func.functional_call(layer, dict(zip(parameters, values, strict=True)), (x,))

    together = torch.vmap(run, in_dims=(1, *(0 for _ in parameters)))(*leaves)
    one_by_one = torch.stack([run(leaves[0][:, i], *(p[i] for p in leaves[1:])) for i in range(N)])
    tolerance = {"rtol": 1e-9, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(together, one_by_one, **tolerance)
    g = torch.randn(together.shape, dtype=dtype, generator=torch.Generator().manual_seed(1))
    for a, b in zip(torch.autograd.grad(together, leaves, g), torch.autograd.grad(one_by_one, leaves, g), strict=True):
        torch.testing.assert_close(a, b, **tolerance)


@pytest.mark.parametrize("name", LAYERS)
def test_they_stay_side_by_side_without_a_copy(name):
    layer = LAYERS[name]()
    y = torch.vmap(layer, in_dims=1, out_dims=1)(side_by_side())
    assert y.flatten(1, 2).is_contiguous(memory_format=torch.channels_last)
    assert y.untyped_storage().nbytes() == y.nbytes


def test_parameters_of_all_and_images_of_all():
    """What is not batched belongs to every node."""
    weight, x = torch.arange(1.0, C + 1), side_by_side()
    op = lambda nodes, x, w: x * w[:, None, None] * nodes  # noqa: E731
    found = torch.vmap(lambda x: call_channelwise(op, x, weight), in_dims=1)(x)
    torch.testing.assert_close(found, N * x.movedim(1, 0) * weight[:, None, None])
    each = torch.arange(N)[:, None] + weight
    found = torch.vmap(lambda w: call_channelwise(lambda _, w, x: x * w[:, None, None], w, x[:, 0]))(each)
    assert torch.equal(found, x[None, :, 0] * each[:, None, :, None, None])


def test_torchs_own_layers_in_a_users_network_are_exchanged():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            layers = nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(32, 5)
            self.layers = nn.Sequential(*layers)

        def forward(self, x):
            return self.layers(x)

    x = torch.randn(2, 7, S, S, 3, dtype=torch.float64).movedim(-1, -3)
    y = torch.full((2, 7, 5), 0.2, dtype=torch.float64)
    loop, vmap = (
        NodeStack(lambda: NodeModule(Net()), range(2), dtype=torch.float64, engine=e) for e in ("loop", "vmap")
    )
    kinds = [type(m) for m in vmap.modules[0].modules()]
    assert {MaxPool2d, GroupNorm} <= set(kinds)
    assert not {nn.MaxPool2d, nn.GroupNorm} & set(kinds)
    torch.testing.assert_close(loop.step(x, y, 0), vmap.step(x, y, 0))
    torch.testing.assert_close(loop.G, vmap.G)


def test_a_pool_over_images_without_a_batch_keeps_nodes_apart():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.pool, self.head = nn.MaxPool2d(3, 2, 1), nn.Linear(9, 5)

        def forward(self, x):
            return self.head(self.pool(input=x[:, 0]).flatten(1))

    x = torch.randn(N, 7, S, S, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).movedim(-1, -3)
    y = torch.full((N, 7, 5), 0.2, dtype=torch.float64)
    loop, vmap = (
        NodeStack(lambda: NodeModule(Net()), range(N), dtype=torch.float64, engine=e) for e in ("loop", "vmap")
    )
    torch.testing.assert_close(loop.step(x, y, 0), vmap.step(x, y, 0))
    torch.testing.assert_close(loop.G, vmap.G)


def test_a_layer_that_stands_in_two_places_is_each_nodes_own_in_both():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.norm = nn.Linear(3 * S * S, 3 * S * S), nn.BatchNorm1d(3 * S * S)
            self.head = nn.Linear(3 * S * S, 5)
            self.second, self.again = nn.Linear(3 * S * S, 3 * S * S), self.norm
            self.second.weight = self.first.weight

        def forward(self, x):
            return self.head(self.again(self.second(self.norm(self.first(x.flatten(1))))))

    x = torch.randn(2, 7, S, S, 3, dtype=torch.float64).movedim(-1, -3)
    y = torch.full((2, 7, 5), 0.2, dtype=torch.float64)
    loop, vmap = (
        NodeStack(lambda: NodeModule(Twice()), range(2), dtype=torch.float64, engine=e) for e in ("loop", "vmap")
    )
    apart = 1 + 0.1 * torch.arange(2)[:, None]
    for s in (loop, vmap):
        s.X.mul_(apart)
    torch.testing.assert_close(loop.step(x, y, 0), vmap.step(x, y, 0))
    torch.testing.assert_close(loop.G, vmap.G)
    for k, b in loop.buffers.items():
        torch.testing.assert_close(b, vmap.buffers[k])


def test_autocast_reaches_convolutions_under_vmap_too():
    layer, x = Conv2d(C, 2 * C, 3, padding=1), side_by_side()
    weights = layer.weight.detach() + torch.arange(N)[:, None, None, None, None] / 10

    def run(x, w):
        return torch.func.functional_call(layer, {"weight": w}, (x,))

    with torch.autocast("cpu", torch.bfloat16):
        together = torch.vmap(run, in_dims=(1, 0), out_dims=1)(x, weights)
        one_by_one = torch.stack([run(x[:, i], weights[i]) for i in range(N)], 1)
    assert together.dtype == one_by_one.dtype == torch.bfloat16
    torch.testing.assert_close(together, one_by_one, rtol=0.02, atol=0.02)
