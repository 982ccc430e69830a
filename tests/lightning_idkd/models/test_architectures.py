"""Networks: closed forms, exact sizes, one contract (features, head, forward), batching over nodes, user errors."""

import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
import torchvision
from torch import nn
from torch.func import functional_call, grad, stack_module_state, vmap

from lightning_idkd.data import ImageInputs, VectorInputs
from lightning_idkd.errors import UserError
from lightning_idkd.models import CNN, MLP, VGG, Architecture, LeNet, MobileNetV2, ResNet, TorchModule, ViT
from lightning_idkd.models.norms import EvoNormQGM, EvoNormS0, GroupNorm, norm_layer
from lightning_idkd.nodes.node import NodeModule
from lightning_idkd.nodes.stack import NodeStack
from lightning_idkd.randomness import replace_dropout

SMALL = [
    ResNet(8, 8, "evonorm"),
    ResNet(8, 8, "group"),
    ResNet(8, 8, "batch"),
    ResNet(8, 8, "evonorm_batch", 2),
    ResNet(8, 8, "evonorm_qgm"),
    ResNet(8, 8, "evonorm_qgm", pool=1),
    ResNet(8, 8, "batch_statistics"),
    CNN(8, norm="none"),
    CNN(8, norm="group"),
    CNN(8, norm="batch"),
    CNN(8, norm="batch_statistics"),
]
LARGE = [  # of 32x32 images
    LeNet(),
    VGG(),
    VGG("batch"),
    VGG("batch_statistics"),
    MobileNetV2(),
    MobileNetV2("batch"),
    MobileNetV2("batch_statistics"),
    ViT(8, 2, 16, 2),
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
    np.testing.assert_allclose(
        layer(torch.from_numpy(x)).detach(), evonorm_s0(x, v, gamma, beta, groups), rtol=1e-10, atol=1e-12
    )
    small = torch.from_numpy(x[:1, :, :2, :2]).requires_grad_()

    def output(x, v, weight, bias):
        return functional_call(layer, {"v": v, "weight": weight, "bias": bias}, x)

    assert torch.autograd.gradcheck(output, (small, *layer.parameters()))


@pytest.mark.parametrize(("channels", "groups"), [(16, 16), (32, 32), (64, 32), (48, 24)])
def test_evonorm_of_qg_dsgdms_code_is_its_closed_form_and_keeps_gradients_right(channels, groups):
    """x sigmoid(x) / sqrt(var of the group, divided by N - 1, + eps) gamma + beta, then ReLU."""
    rng = np.random.default_rng([1, channels])
    x, (gamma, beta) = 3 * rng.standard_normal((3, channels, 4, 5)), rng.standard_normal((2, channels))
    layer = EvoNormQGM(channels).double()
    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias"]
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(gamma))
        layer.bias.copy_(torch.from_numpy(beta))
    deviation = np.sqrt(x.reshape(3, groups, -1).var(2, ddof=1) + 1e-5).repeat(channels // groups, 1)[..., None, None]
    expected = x / (1 + np.exp(-x)) / deviation * gamma[:, None, None] + beta[:, None, None]
    np.testing.assert_allclose(layer(torch.from_numpy(x)).detach(), expected.clip(min=0), rtol=1e-10, atol=1e-12)
    small = torch.from_numpy(x[:1, :, :2, :2]).requires_grad_()
    output = lambda x, weight, bias: functional_call(layer, {"weight": weight, "bias": bias}, x)  # noqa: E731
    assert torch.autograd.gradcheck(output, (small, layer.weight, layer.bias))


def the_codes_network(x, p, pool):
    """ResNet-20-EvoNorm of QG-DSGDm's and IDKD's code, written anew; ``p`` are its parameters in the order of use."""
    p = iter(p)

    def evonorm(x):
        groups = x.unflatten(1, (min(32, x.shape[1]), -1))
        deviation = (groups.var((2, 3, 4), keepdim=True, unbiased=True) + 1e-5).sqrt().expand_as(groups).flatten(1, 2)
        return x * x.sigmoid() / deviation * next(p)[:, None, None] + next(p)[:, None, None]

    def batch_norm(x):
        return nn.functional.batch_norm(x, None, None, next(p), next(p), training=True)

    x = evonorm(nn.functional.conv2d(x, next(p), padding=1)).relu()
    for stage in range(3):
        for block in range(3):
            stride = 2 if stage and not block else 1
            y = evonorm(nn.functional.conv2d(x, next(p), stride=stride, padding=1)).relu()
            y = batch_norm(nn.functional.conv2d(y, next(p), padding=1))
            x = (y + (batch_norm(nn.functional.conv2d(x, next(p), stride=stride)) if stride == 2 else x)).relu()
    return nn.functional.avg_pool2d(x, pool).flatten(1) @ next(p).T + next(p)


@pytest.mark.parametrize(("size", "classes", "count"), [(32, 10, 272_474), (32, 100, 278_324), (64, 10, 274_394)])
def test_the_network_of_the_authors_code_has_its_size_and_its_outputs(size, classes, count):
    """For 64x64 images its last layer has 256 features, four windows of 8x8."""
    network = ResNet(20, 16, "evonorm_qgm", pool=8).build(3, size, classes).double()
    assert parameters(network) == count
    assert network.head.in_features == 64 * (size // 32) ** 2
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=g, dtype=p.dtype))
    x = torch.randn(4, 3, size, size, generator=g, dtype=torch.float64)
    expected = the_codes_network(x, network.parameters(), 8)
    for training in (True, False):
        assert (network.train(training)(x) - expected).norm() <= 1e-13 * expected.norm()


def test_evonorm_survives_a_large_mean_and_a_constant_image_in_float32():
    x = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0)) + 1000
    expected = evonorm_s0(x.double().numpy(), *np.ones((2, 16)), np.zeros(16), 8)
    np.testing.assert_allclose(EvoNormS0(16)(x).detach(), expected, rtol=1e-3)
    assert EvoNormS0(16)(torch.ones(2, 16, 8, 8)).isfinite().all()


@pytest.mark.parametrize("offset", [100, 1000])
def test_evonorm_is_exact_in_the_layout_of_the_store_far_from_zero(offset):
    x = torch.randn(4, 16, 8, 8, generator=torch.Generator().manual_seed(0)) + offset
    found = []
    for dtype in (torch.float32, torch.float64):
        layer, here = EvoNormS0(16).to(dtype), x.to(dtype, memory_format=torch.channels_last).requires_grad_()
        layer(here).sin().sum().backward()
        found.append((layer(here).detach().double(), here.grad.double(), layer.weight.grad.double()))
    for single, double in zip(*found, strict=True):
        assert (single - double).norm() <= 1e-3 * double.norm()


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


def residual(n):
    """Of a CIFAR ResNet with 6n+2 layers, with two numbers a channel for each norm."""
    first = 27 * 16 + 2 * n * (9 * 16 * 16)
    second = 9 * 16 * 32 + (2 * n - 1) * (9 * 32 * 32) + 16 * 32
    third = 9 * 32 * 64 + (2 * n - 1) * (9 * 64 * 64) + 32 * 64
    norms = (1 + 2 * n) * 16 + (1 + 2 * n) * 32 + (1 + 2 * n) * 64  # stem, blocks, two shortcuts
    return first + second + third + 2 * norms + 64 * 10 + 10


@pytest.mark.parametrize(("depth", "published"), [(20, 272_474), (32, 466_906), (56, 855_770)])  # 0.27, 0.46, 0.85 M
@pytest.mark.parametrize("norm", ["batch", "batch_statistics", "group"])
def test_residual_networks_have_the_published_size(depth, published, norm):
    assert (
        parameters(ResNet(depth, norm=norm, stem_stride=2).build(3, 32, 10)) == residual((depth - 2) // 6) == published
    )


def test_lenet_has_the_published_size():
    convolutions = 25 * 3 * 6 + 6 + 25 * 6 * 16 + 16
    assert (
        parameters(LeNet().build(3, 32, 10)) == convolutions + 400 * 120 + 120 + 120 * 84 + 84 + 84 * 10 + 10 == 62_006
    )


def test_vgg_has_the_published_size_with_and_without_norm():
    widths = [3, 64, 128, 256, 256, 512, 512, 512, 512]
    plain = sum(9 * i * o + o for i, o in pairwise(widths)) + 512 * 10 + 10
    assert parameters(VGG().build(3, 32, 10)) == plain == 9_225_610
    for norm in ("batch", "batch_statistics", "group"):
        assert parameters(VGG(norm).build(3, 64, 10)) == plain + 2 * sum(widths[1:]) == 9_231_114
    layers, sizes = VGG().build(3, 32, 10).layers, []
    for i, layer in enumerate(layers):
        if isinstance(layer, nn.MaxPool2d):
            sizes.append(tuple(layers[: i + 1](torch.zeros(1, 3, 32, 32)).shape[1:3]))
    assert sizes == [(64, 16), (128, 8), (256, 4), (512, 2), (512, 1)]


def test_mobilenet_has_the_published_size_and_leaves_4x4_of_32x32():
    # Table 2 of the paper
    table = [(1, 16, 1), (6, 24, 2), (6, 32, 3), (6, 64, 4), (6, 96, 3), (6, 160, 3), (6, 320, 1)]
    count, inputs = (27 + 2) * 32, 32
    for expansion, outputs, blocks in table:
        for _ in range(blocks):
            hidden = expansion * inputs
            expand = (inputs + 2) * hidden if expansion > 1 else 0
            count, inputs = count + expand + (9 + 2) * hidden + (hidden + 2) * outputs, outputs
    count += (320 + 2) * 1280 + 1280 * 10 + 10
    network = MobileNetV2().build(3, 32, 10)
    assert parameters(network) == count == 2_236_682
    assert network.features.features(torch.zeros(1, 3, 32, 32)).shape == (1, 1280, 4, 4)


def test_a_vision_transformer_has_the_size_of_pencil_and_paper():
    w, patch, depth, tokens = 48, 4, 3, 64 + 1
    block = 4 * w * w + 4 * w + 2 * (w * 2 * w) + 2 * w + w + 2 * 2 * w  # attention, two linear layers, two norms
    expected = 2 * patch**2 * w + w + w + tokens * w + depth * block + 2 * w + 10 * w + 10
    network = ViT(patch, depth, w, 3).build(2, 32, 10)
    assert parameters(network) == expected
    assert not [m for m in network.modules() if isinstance(m, nn.Dropout) and m.p > 0]


def test_patches_of_a_vision_transformer_keep_their_deviation():
    network = ViT(8, 1, 256).build(3, 32, 10)
    patches = network.features.conv_proj(torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    assert patches.std().item() == pytest.approx(1, rel=0.05)


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


@pytest.mark.parametrize("architecture", LARGE, ids=str)
@pytest.mark.parametrize(("channels", "classes"), [(3, 10), (1, 7)])
def test_forward_of_larger_networks_is_head_of_features(architecture, channels, classes):
    network = architecture.build(channels, 32, classes).eval()
    x = torch.randn(3, channels, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.manual_seed(0)
        nn.init.normal_(network.head.weight)  # a transformer's starts at zero
        features = network.features(x)
        assert isinstance(network.head, nn.Linear)
        assert features.shape == (3, network.head.in_features)
        assert network(x).shape == (3, classes)
        assert network(x).std() > 0
        torch.testing.assert_close(network(x), network.head(features), rtol=0, atol=0)


@pytest.mark.parametrize("architecture", [*SMALL, *LARGE], ids=str)
def test_a_training_step_gives_every_parameter_a_finite_gradient(architecture):
    torch.manual_seed(0)
    network = architecture.build(3, 32, 10).train()
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(4, 3, 32, 32, generator=generator), torch.randint(10, (4,), generator=generator)
    for _ in range(2):  # a transformer's head starts at zero: one step for the others to count
        loss = nn.functional.cross_entropy(network(x), y)
        gradients = torch.autograd.grad(loss, list(network.parameters()))
        assert all(g.isfinite().all() for g in gradients)
        with torch.no_grad():
            for p, g in zip(network.parameters(), gradients, strict=True):
                p.sub_(0.01 * g)
    assert all(g.any() for g in gradients)


@pytest.mark.parametrize(
    ("architecture", "size"), [(LeNet(), 16), (LeNet(), 29), (VGG(), 40), (MobileNetV2(), 8), (ViT(8, 1, 16, 2), 8)]
)
def test_other_image_sizes_do(architecture, size):
    network = architecture.build(1, size, 5).eval()
    assert network(torch.zeros(2, 1, size, size)).shape == (2, 5)


@pytest.mark.parametrize("stride", [1, 2])
def test_the_second_and_third_stage_halve_the_image_and_the_stem_where_asked(stride):
    network = ResNet(14, 8, stem_stride=stride).build(3, 16 * stride, 10)
    x, sizes = network.stem(torch.zeros(1, 3, 16 * stride, 16 * stride)), []
    for block in network.blocks:
        x = block(x)
        sizes.append((x.shape[1], x.shape[2]))
    assert sizes == [(8, 16), (8, 16), (16, 8), (16, 8), (32, 4), (32, 4)]


def of_the_first(architecture, training):
    """Features of one image in evaluation or training mode, beside a second and among four, two of them brighter."""
    torch.manual_seed(0)
    network = architecture.build(3, 32, 10).train(training)
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    x[2:] = 1 + 2 * x[2:]
    with torch.no_grad():
        return network.features(x[:2])[0], network.features(x)[0]


WITHOUT = [ResNet(8, 8, "evonorm"), ResNet(8, 8, "group"), CNN(8), VGG("group"),
           MobileNetV2(), LeNet(), ViT(8, 1, 16, 2)]  # fmt: skip
WITH = [
    ResNet(8, 8, "batch_statistics"),
    ResNet(8, 8, "evonorm_batch"),
    ResNet(8, 8, "evonorm_qgm"),
    CNN(8, norm="batch_statistics"),
    VGG("batch_statistics"),
    MobileNetV2("batch_statistics"),
]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("architecture", WITHOUT, ids=str)
def test_without_batch_norm_no_output_depends_on_the_rest_of_the_batch(architecture, training):
    few, many = of_the_first(architecture, training)
    torch.testing.assert_close(few, many, rtol=1e-4, atol=1e-5)
    assert not list(architecture.build(3, 32, 10).buffers())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("architecture", WITH, ids=str)
def test_batch_statistics_are_those_of_the_batch_at_hand_in_evaluation_too(architecture, training):
    few, many = of_the_first(architecture, training)
    assert (few - many).norm() > 0.05 * many.norm()
    assert not list(architecture.build(3, 32, 10).buffers())


@pytest.mark.parametrize("architecture", [ResNet(8, 8, "batch"), CNN(8, norm="batch"), VGG("batch")], ids=str)
def test_running_statistics_make_evaluation_independent_of_the_batch(architecture):
    few, many = of_the_first(architecture, training=False)
    torch.testing.assert_close(few, many, rtol=1e-4, atol=1e-5)
    few, many = of_the_first(architecture, training=True)
    assert (few - many).norm() > 0.05 * many.norm()


def test_batch_statistics_are_their_closed_form_in_evaluation():
    x = 3 + 2 * torch.randn(5, 4, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    a = x.numpy()
    expected = (a - a.mean((0, 2, 3), keepdims=True)) / np.sqrt(a.var((0, 2, 3), keepdims=True) + 1e-5)
    layer = norm_layer("batch_statistics", 4).double().eval()
    np.testing.assert_allclose(layer(x).detach(), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("norm", "first", "kind"),
    [
        ("evonorm", EvoNormS0, GroupNorm),
        ("evonorm_batch", EvoNormS0, nn.BatchNorm2d),
        ("evonorm_qgm", EvoNormQGM, nn.BatchNorm2d),
    ],
)
def test_evonorm_stands_before_the_second_convolution_and_a_plain_norm_after_it_and_in_shortcuts(norm, first, kind):
    network = ResNet(14, 8, norm).build(3, 8, 10)
    of = [type(m) for m in network.modules() if isinstance(m, (EvoNormS0, nn.BatchNorm2d, nn.GroupNorm))]
    block, shortcut = [first, kind], [kind]
    assert of == [first, *block, *block, *block, *shortcut, *block, *block, *shortcut, *block]


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


@pytest.mark.parametrize("architecture", [LeNet(), VGG("group"), MobileNetV2("batch"), ViT(8, 2, 16, 2)], ids=str)
def test_engines_agree_on_a_step_of_larger_networks(architecture):
    generator = torch.Generator().manual_seed(0)
    # [n, B, C, S, S], channels-last
    x = torch.randn(2, 3, 32, 32, 3, generator=generator, dtype=torch.float64).movedim(-1, -3)
    y = torch.randn(2, 3, 10, generator=generator, dtype=torch.float64).softmax(-1)
    gradients = []
    for engine in ("loop", "vmap"):
        nodes = NodeStack(
            lambda: NodeModule(architecture.build(3, 32, 10)), range(2), dtype=torch.float64, engine=engine
        )
        nodes.X.add_(0.02 * torch.randn(nodes.X.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(9)))
        nodes.step(x, y, 0)
        assert nodes.views_intact()
        gradients.append(nodes.G.clone())
    loop, vmapped = gradients
    assert loop.isfinite().all()
    assert loop.norm() > 0
    assert (loop - vmapped).norm() <= 1e-9 * loop.norm()


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


@pytest.mark.parametrize(
    ("depth", "below", "above"), [(18, 14, 20), (10, 8, 14), (2, 8, 14), (-4, 8, 14), (31, 26, 32)]
)
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
        (lambda: ResNet(pool=0), r"node\.network\.pool is 0; it must be at least 1"),
        (lambda: ResNet(pool=8).build(3, 28, 10), r"node\.network\.pool is 8; .* are 7x7, so it must be at most 7"),
        (lambda: ResNet(stem_stride=0), r"node\.network\.stem_stride is 0; it must be at least 1"),
        (lambda: VGG("evonorm"), r"node\.network\.norm is 'evonorm'; allowed are none, group, batch, batch_statistics"),
        (lambda: MobileNetV2("none"), r"node\.network\.norm is 'none'; allowed are group, batch, batch_statistics"),
        (lambda: ViT(depth=0), r"node\.network\.depth is 0; it must be at least 1"),
        (lambda: ViT(heads=0), r"node\.network\.heads is 0; it must be at least 1"),
        (
            lambda: ViT(width=10, heads=4),
            r"node\.network\.width is 10; it must be a multiple of node\.network\.heads, 4",
        ),
        (lambda: ViT(5).build(3, 32, 10), r"node\.network\.patch is 5; it must divide the image size, 32"),
        (lambda: ViT(64).build(3, 32, 10), r"node\.network\.patch is 64; it must divide the image size, 32"),
        (lambda: LeNet().build(3, 15, 10), r"data\.image_size: 15 given; LeNet needs 16 or more"),
        (lambda: VGG().build(3, 31, 10), r"data\.image_size: 31 given; VGG .* needs 32 or more"),
        (lambda: CNN().build(3, 1, 10), r"data\.image_size: 1 given; CNN .* needs 2 or more"),
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


class Nested(nn.Module):
    """Parts called as those that it is split into, the classifier within one of them."""

    def __init__(self, channels, classes):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(channels, 3, 3), nn.BatchNorm2d(3), nn.Dropout(0.5))
        self.head = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, classes))

    def forward(self, x):
        return self.head(self.features(x).mean((2, 3)))


SPLIT = {
    f"{__name__}.Tiny": lambda: Tiny(32, 4),
    f"{__name__}.Nested": lambda: Nested(3, 4),
    "torchvision.models.resnet18": lambda: torchvision.models.resnet18(num_classes=4),
    "torchvision.models.mobilenet_v3_small": lambda: torchvision.models.mobilenet_v3_small(num_classes=4),
}


@pytest.mark.parametrize("path", SPLIT)
def test_a_network_that_was_split_keeps_the_names_of_its_state_dict_in_both_directions(path):
    """Inside a node too, and with dropout replaced, as the nodes of a run have it."""
    whole = SPLIT[path]().eval()
    channels = 1 if path.endswith("Tiny") else 3
    node = replace_dropout(NodeModule(TorchModule(path).build(channels, 32, 4))).eval()
    state = node.network.state_dict()
    assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in whole.state_dict().items()}
    x = torch.randn(2, channels, 32, 32)
    whole.load_state_dict(state)
    torch.testing.assert_close(whole(x), node(x))
    other = SPLIT[path]().eval()
    node.load_state_dict({f"network.{k}": v for k, v in other.state_dict().items()})
    torch.testing.assert_close(node(x), other(x))
    assert node.state_dict().keys() == {f"network.{k}" for k in other.state_dict()}
    with pytest.raises(RuntimeError, match="Unexpected"):
        node.network.load_state_dict(state | {"another.weight": x})


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


def test_torchvision_networks_with_auxiliary_heads_train_without_them():
    network = TorchModule("torchvision.models.googlenet").build(3, 64, 7)
    assert network(torch.randn(2, 3, 64, 64)).shape == (2, 7)  # in training, where it would return three outputs


@pytest.mark.parametrize(
    ("path", "arguments", "message"),
    [
        ("resnet18", {}, r"node\.network\.path is 'resnet18'; it must be an import path"),
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
from lightning_idkd.models import CNN, VGG, Architecture, LeNet, MobileNetV2, ResNet, TorchModule, ViT

parser = ArgumentParser()
parser.add_argument("--network", type=Architecture)
for made in (ResNet(8, 8, "evonorm_batch", 2), CNN(4, 0.5), LeNet(), VGG("group"), MobileNetV2("batch"),
             ViT(8, 1, 16, 2), TorchModule("a.B", {"x": 1})):
    arguments = [f"--network.{key}={'null' if value is None else value}" for key, value in vars(made).items()]
    parsed = parser.parse_args([f"--network={type(made).__name__}", *arguments])
    assert parser.instantiate(parsed).network == made
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


# ---------------------------------------------------------------------- vectors


VECTORS = VectorInputs(("a", "b", "c"), None, None)


def test_the_mlp_of_fedavg_has_its_published_size():
    """McMahan et al., AISTATS 2017, section 3: the MNIST 2NN."""
    assert parameters(MLP(width=200).build_for(ImageInputs(1, 28), 10)) == 199_210
    assert parameters(MLP(5, depth=1).build_for(VECTORS, 4)) == (3 * 5 + 5) + (5 * 4 + 4)


@pytest.mark.parametrize("shape", [(7, 3), (7, 1, 2, 2)])
def test_the_mlp_is_matrix_products_and_positive_parts(shape):
    inputs = VECTORS if len(shape) == 2 else ImageInputs(1, 2)
    network = MLP(5, depth=3).build_for(inputs, 4).double()
    x = torch.randn(shape, dtype=torch.float64)
    expected = x.numpy().reshape(7, -1)
    *hidden, head = (m for m in network.modules() if isinstance(m, nn.Linear))
    assert len(hidden) == 3
    for layer in hidden:
        expected = np.maximum(expected @ layer.weight.detach().numpy().T + layer.bias.detach().numpy(), 0)
    np.testing.assert_allclose(network.features(x).detach(), expected, rtol=1e-12, atol=1e-14)
    expected = expected @ head.weight.detach().numpy().T + head.bias.detach().numpy()
    np.testing.assert_allclose(network(x).detach(), expected, rtol=1e-12, atol=1e-14)


def test_the_mlp_has_dropout_before_the_classifier():
    network = MLP(4, dropout=0.999).build_for(VECTORS, 2).train()
    assert (network.features(torch.randn(200, 3)) == 0).double().mean() > 0.99


class Flat(Architecture):
    """An architecture of vectors, in an order of its own, with an argument that the data do not set."""

    def build(self, classes, features, width=7):
        return nn.Sequential(nn.Flatten(), nn.Linear(features, width), nn.Linear(width, classes))


class Counted(Architecture):
    """An architecture of vectors that has a usual number of classes."""

    def build(self, features, classes=10):
        return nn.Linear(features, classes)


class Renamed(Architecture):
    """An architecture of images with other names, as any subclass could have before there were vectors."""

    def build(self, inputs, side=32, outputs=10, features=128):
        return inputs, side, outputs, features


class Loose(Architecture):
    def build(self, *sizes):
        return sizes


def test_an_architecture_of_vectors_gets_the_sizes_that_it_names():
    assert Flat().build_for(VECTORS, 2)[1].weight.shape == (7, 3)
    assert Flat().build_for(ImageInputs(3, 4), 2)[1].weight.shape == (7, 48)
    assert Counted().build_for(VECTORS, 2).weight.shape == (2, 3)


def test_an_architecture_of_images_gets_channels_side_and_classes_whatever_it_calls_them():
    assert Renamed().build_for(ImageInputs(1, 8), 4) == (1, 8, 4, 128)
    assert Loose().build_for(ImageInputs(1, 8), 4) == (1, 8, 4)


@pytest.mark.parametrize(("network", "said"), [
    (CNN(), r"CNN needs channels and size, but vectors have features; allowed: MLP, TorchModule, or a class of yours"),
    (ViT(), r"ViT needs channels and size, but vectors have features"),
    (Renamed(), r"Renamed needs inputs, but vectors have features"),
    (Loose(), r"Loose needs sizes of images, but vectors have features"),
])  # fmt: skip
def test_a_network_of_images_is_not_one_of_vectors(network, said):
    with pytest.raises(UserError, match=rf"^node\.network: {said}"):
        network.build_for(VECTORS, 10)


@pytest.mark.parametrize(("arguments", "said"), [
    ({"width": 0}, r"node\.network\.width is 0; it must be at least 1"),
    ({"depth": 0}, r"node\.network\.depth is 0; it must be at least 1"),
    ({"dropout": 1.0}, r"node\.network\.dropout is 1\.0; it must be a probability"),
])  # fmt: skip
def test_sizes_of_the_mlp_are_checked(arguments, said):
    with pytest.raises(UserError, match=f"^{said}"):
        MLP(**arguments)


def test_a_module_of_ones_own_is_tried_on_vectors():
    with pytest.raises(UserError, match=r"fails on vectors \[2, 3\]: "):
        TorchModule("torchvision.models.resnet18").build_for(VECTORS, 10)


# ---------------------------------------------------------------------- norms of features


NORMALISED = [
    (CNN(8, feature_norm="layer"), ImageInputs(1, 8)),
    (MLP(16, feature_norm="sphere"), VECTORS),
    (TorchModule("torchvision.models.resnet18", feature_norm="sphere"), ImageInputs(3, 32)),
    (ViT(8, 1, 16, 2, feature_norm="layer"), ImageInputs(3, 16)),
]


@pytest.mark.parametrize(("architecture", "inputs"), NORMALISED, ids=lambda v: type(v).__name__)
def test_features_are_normalised_before_the_head(architecture, inputs):
    torch.manual_seed(1)
    network = architecture.build_for(inputs, 4).double().eval()
    x = torch.randn(5, *inputs.shape, dtype=torch.float64)
    plain, features = (f(x).detach().numpy() for f in (network.network.features, network.features))
    if architecture.feature_norm == "layer":
        variance = plain.var(1, keepdims=True)
        expected = (plain - plain.mean(1, keepdims=True)) / np.sqrt(variance + 1e-5)
    else:
        expected = plain / np.linalg.norm(plain, axis=1, keepdims=True) * np.sqrt(plain.shape[1])
    np.testing.assert_allclose(features, expected, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(network(x).detach(), network.head(torch.from_numpy(features)).detach(), rtol=1e-12)


@pytest.mark.parametrize("engine", ["vmap", "parallel"])
def test_engines_agree_on_a_network_with_normalised_features(engine):
    losses = []
    x = torch.randn(3, 4, 1, 8, 8, dtype=torch.float64)
    y = torch.eye(4, dtype=torch.float64).expand(3, 4, 4).contiguous()
    for each in ("loop", engine):
        make = lambda: NodeModule(CNN(8, feature_norm="layer").build_for(ImageInputs(1, 8), 4))  # noqa: E731
        stack = NodeStack(make, range(3), dtype=torch.float64, engine=each)
        losses.append((stack.step(x, y, 0), stack.G.clone()))
    for ours, theirs in zip(*losses, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_without_a_norm_the_network_is_as_it_was():
    assert type(CNN(8).build_for(ImageInputs(1, 8), 4)) is type(CNN(8).build(1, 8, 4))
    with pytest.raises(UserError, match=r"node\.network\.feature_norm is 'spere'; allowed are layer, sphere\."):
        CNN(8, feature_norm="spere").build_for(ImageInputs(1, 8), 4)
    with pytest.raises(UserError, match=r"^node\.network\.feature_norm: Counted builds a network without features"):
        Counted(feature_norm="layer").build_for(VECTORS, 2)
