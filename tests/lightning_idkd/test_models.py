"""Networks: closed forms, exact sizes, one contract (features, head, forward), batching over nodes, user errors."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, stack_module_state, vmap

from lightning_idkd.errors import UserError
from lightning_idkd.models import CNN, ResNet, TorchModule
from lightning_idkd.models.normalisation import EvoNormS0

SMALL = [
    ResNet(8, 8, "evonorm"),
    ResNet(8, 8, "group"),
    ResNet(8, 8, "batch"),
    CNN(8, norm="none"),
    CNN(8, norm="group"),
    CNN(8, norm="batch"),
]


def parameters(network):
    return sum(p.numel() for p in network.parameters())


def evonorm_s0(x, v, gamma, beta, groups, eps=1e-5):
    """Plain loops over samples, groups and channels."""
    out = np.empty_like(x)
    per_group = x.shape[1] // groups
    for b in range(len(x)):
        for c in range(x.shape[1]):
            first = c // per_group * per_group
            std = np.sqrt(np.var(x[b, first : first + per_group]) + eps)
            out[b, c] = x[b, c] / (1 + np.exp(-v[c] * x[b, c])) / std * gamma[c] + beta[c]
    return out


@pytest.mark.parametrize(("channels", "groups"), [(16, 8), (12, 4), (7, 1), (64, 8)])
def test_evonorm_s0_is_its_closed_form_and_keeps_gradients_right(channels, groups):
    rng = np.random.default_rng([0, channels])
    x = 3 + rng.standard_normal((3, channels, 4, 5))
    v, gamma, beta = rng.standard_normal((3, channels))
    layer = EvoNormS0(channels).double()
    with torch.no_grad():
        for parameter, value in zip((layer.v, layer.weight, layer.bias), (v, gamma, beta), strict=True):
            parameter.copy_(torch.from_numpy(value))
    np.testing.assert_allclose(layer(torch.from_numpy(x)).detach(), evonorm_s0(x, v, gamma, beta, groups), rtol=1e-10, atol=1e-12)
    small = torch.from_numpy(x[:1, :, :2, :2]).requires_grad_()

    def output(x, v, weight, bias):
        return functional_call(layer, {"v": v, "weight": weight, "bias": bias}, x)

    assert torch.autograd.gradcheck(output, (small, *layer.parameters()))


def test_evonorm_survives_a_large_mean_and_a_constant_image_in_float32():
    x = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0)) + 1000
    expected = evonorm_s0(x.double().numpy(), *np.ones((2, 16)), np.zeros(16), 8)
    np.testing.assert_allclose(EvoNormS0(16)(x).detach(), expected, rtol=1e-3)
    assert EvoNormS0(16)(torch.ones(2, 16, 8, 8)).isfinite().all()


def test_parameter_counts_are_those_of_pencil_and_paper():
    # stem 3*16*9; three blocks a stage; 1x1 shortcuts 16*32 and 32*64; head 64*10 + 10
    convolutions = 432 + 6 * 16 * 16 * 9 + (16 * 32 + 5 * 32 * 32) * 9 + (32 * 64 + 5 * 64 * 64) * 9 + 512 + 2048
    # two numbers a channel for each norm: stem, six a stage, and one for each of the two shortcuts
    norms = 2 * (16 + 6 * (16 + 32 + 64) + 32 + 64)
    v = 16 + 3 * (16 + 32 + 64)  # EvoNorm's third number: the stem and one layer a block
    assert parameters(ResNet(20, 16, "group").build(3, 32, 10)) == convolutions + norms + 650 == 272_474
    assert parameters(ResNet(20, 16, "batch").build(3, 32, 10)) == convolutions + norms + 650
    assert parameters(ResNet(20, 16, "evonorm").build(3, 32, 10)) == convolutions + norms + v + 650 == 272_826
    cnn = 9 * (16 + 16 * 32 + 32 * 32) + 32 * 10 + 10
    assert parameters(CNN().build(1, 8, 10)) == cnn + 2 * (16 + 32 + 32) == 14_458
    assert parameters(CNN(norm="none").build(1, 8, 10)) == cnn + 16 + 32 + 32


@pytest.mark.parametrize("architecture", SMALL, ids=str)
@pytest.mark.parametrize(("channels", "size", "classes"), [(3, 8, 10), (1, 13, 7)])
def test_forward_is_head_of_pooled_features_at_any_size(architecture, channels, size, classes):
    network = architecture.build(channels, size, classes).double().eval()
    x = torch.randn(4, channels, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    features = network.features(x)
    assert isinstance(network.head, nn.Linear)
    assert features.shape == (4, network.head.in_features)
    assert features.dtype == network(x).dtype == torch.float64
    assert network(x).shape == (4, classes)
    torch.testing.assert_close(network(x), network.head(features), rtol=0, atol=0)


def test_the_second_and_third_stage_halve_the_image():
    network = ResNet(14, 8).build(3, 16, 10)
    x, sizes = network.stem(torch.zeros(1, 3, 16, 16)), []
    for block in network.blocks:
        x = block(x)
        sizes.append((x.shape[1], x.shape[2]))
    assert sizes == [(8, 16), (8, 16), (16, 8), (16, 8), (32, 4), (32, 4)]


@pytest.mark.parametrize("norm", ["evonorm", "group"])
def test_without_batch_norm_no_output_depends_on_the_rest_of_the_batch(norm):
    network = ResNet(8, 8, norm).build(3, 8, 10).double()
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert not list(network.buffers())
    torch.testing.assert_close(network(x)[:1], network(x[:1]))


@pytest.mark.parametrize("architecture", SMALL, ids=str)
def test_vmap_over_stacked_nodes_equals_a_loop_for_loss_gradient_and_buffers(architecture):
    nodes = [architecture.build(3, 8, 10).double() for _ in range(3)]
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(3, 5, 3, 8, 8, dtype=torch.float64, generator=generator)
    y = torch.randint(10, (3, 5), generator=generator)
    stacked, buffers = stack_module_state(nodes)
    skeleton = architecture.build(3, 8, 10).double()

    def loss(p, b, x, y):
        return nn.functional.cross_entropy(functional_call(skeleton, (p, b), (x,)), y)

    gradients = vmap(grad(loss))(stacked, buffers, x, y)
    for i, node in enumerate(nodes):
        nn.functional.cross_entropy(node(x[i]), y[i]).backward()
        for name, parameter in node.named_parameters():
            torch.testing.assert_close(gradients[name][i], parameter.grad, rtol=1e-9, atol=1e-11)
        for name, buffer in node.named_buffers():  # running statistics, moved in place by both
            torch.testing.assert_close(buffers[name][i], buffer)


def test_he_initialisation_of_convolutions():
    network = ResNet(8, 64, "group").build(3, 8, 10)
    weight = network.blocks[-1].conv2.weight  # 256 channels, 3x3: 590k samples
    assert weight.std().item() == pytest.approx((2 / (256 * 9)) ** 0.5, rel=0.01)


def test_dropout_is_there_only_when_asked_for_and_only_before_the_head():
    assert not [m for m in CNN().build(1, 8, 10).modules() if isinstance(m, nn.Dropout)]
    network = CNN(dropout=0.5).build(1, 8, 10)
    torch.manual_seed(0)
    x = torch.randn(64, 1, 8, 8)
    zeros = (network.train().features(x) == 0).float().mean() - (network.eval().features(x) == 0).float().mean()
    assert zeros.item() == pytest.approx(0.5, abs=0.05)


def test_cnn_reads_handwritten_digits():
    load_digits = pytest.importorskip("sklearn.datasets").load_digits
    images, labels = (torch.from_numpy(a) for a in load_digits(return_X_y=True))
    images = images.float().view(-1, 1, 8, 8) / 16 - 0.5
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, test = order[:1400], order[1400:]
    torch.manual_seed(0)
    network = CNN().build(1, 8, 10)
    optimiser = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    for _ in range(8):
        for batch in train[torch.randperm(len(train))].split(32):
            optimiser.zero_grad()
            nn.functional.cross_entropy(network(images[batch]), labels[batch]).backward()
            optimiser.step()
    with torch.no_grad():
        assert (network(images[test]).argmax(1) == labels[test]).float().mean() >= 0.96


@pytest.mark.parametrize(("depth", "below", "above"), [(18, 14, 20), (10, 8, 14), (2, 8, 14), (-4, 8, 14), (31, 26, 32)])
def test_a_depth_that_is_not_6n_plus_2_is_refused_with_the_nearest_two(depth, below, above):
    with pytest.raises(UserError, match=rf"node\.network\.depth is {depth};.* {below} and {above}\."):
        ResNet(depth)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ResNet(norm="evonrm"), r"node\.network\.norm is 'evonrm'.*Did you mean 'evonorm'"),
        (lambda: CNN(norm="evonorm"), r"node\.network\.norm is 'evonorm'; allowed are none, group, batch"),
        (lambda: ResNet(width=0), r"node\.network\.width is 0"),
        (lambda: CNN(dropout=1.0), r"node\.network\.dropout is 1\.0"),
    ],
)
def test_values_out_of_range_are_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()


class Tiny(nn.Module):
    """Takes two of the three sizes; flattens the images."""

    def __init__(self, size, classes, hidden=5):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(size * size, hidden), nn.Tanh(), nn.Linear(hidden, classes))

    def forward(self, x):
        return self.net(x)


class LogProbabilities(Tiny):
    def forward(self, x):
        return self.net(x).log_softmax(1)


class WithHead(nn.Module):
    def __init__(self, channels, classes):
        super().__init__()
        self.head = nn.Linear(channels, classes)

    def features(self, x):
        return x.mean((2, 3))

    def forward(self, x):
        return self.head(self.features(x))


class NoLinear(nn.Module):
    def __init__(self, channels, classes):
        super().__init__()
        self.conv = nn.Conv2d(channels, classes, 1)

    def forward(self, x):
        return self.conv(x).mean((2, 3))


def test_a_module_by_import_path_gets_the_sizes_it_names_and_is_split_into_features_and_head():
    network = TorchModule(f"{__name__}.Tiny", {"hidden": 7}).build(1, 8, 10)
    x = torch.randn(3, 1, 8, 8)
    assert all(m.training for m in network.modules())
    assert network.features(x).shape == (3, 7)
    assert network.head.out_features == 10
    assert parameters(network) == 64 * 7 + 7 + 7 * 10 + 10
    torch.testing.assert_close(network(x), network.head(network.features(x)))


def test_a_module_that_has_features_and_head_is_used_as_it_is():
    assert type(TorchModule(f"{__name__}.WithHead").build(3, 8, 4)).__name__ == "WithHead"


def test_building_by_import_path_leaves_the_global_generator_where_the_weights_left_it():
    torch.manual_seed(0)
    WithHead(3, 4)
    expected = torch.rand(1)
    torch.manual_seed(0)
    TorchModule(f"{__name__}.WithHead").build(3, 8, 4)
    assert torch.rand(1) == expected


def test_torchvision_networks_get_the_number_of_classes():
    pytest.importorskip("torchvision")
    network = TorchModule("torchvision.models.resnet18").build(3, 32, 7)
    assert all(m.training for m in network.modules())
    x = torch.randn(2, 3, 32, 32)
    assert network.features(x).shape == (2, 512)
    assert network(x).shape == (2, 7)
    assert parameters(network) == 11_689_512 - 513 * (1000 - 7)  # the published size, with 7 classes for 1000


@pytest.mark.parametrize(
    ("path", "arguments", "message"),
    [
        ("resnet18", {}, r"node\.network\.path is 'resnet18'; it is an import path"),
        ("torch.nnn.Linear", {}, r"no module named 'torch\.nnn'.*Did you mean 'nn'"),
        ("torch.nn.Sequentil", {}, r"torch\.nn has no 'Sequentil'\. Did you mean 'Sequential'"),
        ("fractions.Fraction", {}, r"makes a Fraction, not a torch\.nn\.Module"),
        (f"{__name__}.Tiny", {"hiden": 3}, r"unexpected keyword argument 'hiden'"),
        (f"{__name__}.NoLinear", {}, r"does not end in an nn\.Linear with 10 outputs"),
        (f"{__name__}.LogProbabilities", {}, r"does not end in an nn\.Linear with 10 outputs"),
        (f"{__name__}.WithHead", {"channels": 2}, r"fails on images \[2, 1, 8, 8\]"),
        ("torch.nn.Flatten", {}, r"not logits \[2, 10\]"),
    ],
)
def test_mistakes_in_an_import_path_are_named(path, arguments, message):
    with pytest.raises(UserError, match=message):
        TorchModule(path, arguments).build(1, 8, 10)


def test_architectures_are_made_and_parsed_without_torch():
    code = """
import sys
from jsonargparse import ArgumentParser
from lightning_idkd.models import CNN, Architecture, ResNet, TorchModule

parser = ArgumentParser()
parser.add_argument("--network", type=Architecture)
for made in (ResNet(8, norm="group"), CNN(4, 0.5), TorchModule("a.B", {"x": 1})):
    arguments = [f"--network.{key}={value}" for key, value in vars(made).items()]
    parsed = parser.parse_args([f"--network={type(made).__name__}", *arguments])
    assert parser.instantiate(parsed).network == made
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
