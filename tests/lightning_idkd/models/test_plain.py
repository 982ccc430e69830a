"""The networks in plain torch, which go with an exported model, compute what the trained ones do."""

from __future__ import annotations

from dataclasses import asdict
from typing import get_args

import pytest
import torch

from lightning_idkd.data.images import ImageInputs
from lightning_idkd.models import CNN, MLP, VGG, LeNet, ResNet, plain
from lightning_idkd.models.architectures import Norm, ResNetNorm

ARCHITECTURES = [
    *(ResNet(8, 8, norm) for norm in get_args(ResNetNorm)),
    ResNet(8, 24, "evonorm_qgm"),  # 24 groups of one channel in the first stage, 24 of two in the second
    ResNet(14, 8, "evonorm", stem_stride=2, pool=2),
    *(CNN(8, 0.5, norm) for norm in get_args(Norm)),
    *(VGG(norm) for norm in ("none", "group", "batch")),
    MLP(9, 3, 0.5),
    LeNet(),
    MLP(9, 2, feature_norm="layer"),
    CNN(8, feature_norm="sphere"),
]


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=str)
def test_a_plain_network_has_the_names_and_the_logits_of_the_trained_one(architecture):
    inputs, drawn = ImageInputs(3, 32), torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        trained = architecture.build_for(inputs, 4).eval()
    for tensor in trained.state_dict().values():
        if tensor.dim() == 1:  # of norms, which begin as 0 or 1, and biases
            tensor.copy_(0.5 + torch.rand(tensor.shape, generator=drawn))
    chosen = {"class_path": f"lightning_idkd.models.{type(architecture).__name__}", "init_args": asdict(architecture)}
    about = {"channels": 3, "size": 32, "classes": list("abcd"), "mean": [0.0] * 3, "std": [1.0] * 3}
    network = plain.build(about | {"config": {"node": {"network": chosen}}}).eval()
    network.load_state_dict(trained.state_dict())
    x = torch.randn(3, 3, 32, 32, generator=drawn)
    with torch.no_grad():
        torch.testing.assert_close(network(x), trained(x), rtol=1e-4, atol=1e-5)


def test_a_classifier_scales_each_channel_or_feature():
    images = torch.randint(256, (2, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    identity = torch.nn.Flatten()
    identity.weight = torch.nn.Parameter(torch.ones(1))
    scaled = plain.Classifier(identity, [10.0, 20.0, 30.0], [1.0, 2.0, 4.0])(images).view(2, 3, 4, 4)
    for c, (mean, std) in enumerate([(10, 1), (20, 2), (30, 4)]):
        torch.testing.assert_close(scaled[:, c], (images[:, c].float() - mean) / std)
    vectors = torch.tensor([[1e9 + 2, 5.0]], dtype=torch.float64)  # float32 has neither this nor the mean
    assert plain.Classifier(identity, [1e9 + 1, 1.0], [2.0, 4.0])(vectors).tolist() == [[0.5, 1.0]]
