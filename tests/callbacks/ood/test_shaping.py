"""Shaped activations and perturbed images."""

import math

import pytest
import torch
from clusters import CLASSES, clusters, detector, draws, outputs, same_order, strangers
from torch import nn

from lightning_idkd.callbacks import (
    ASH,
    KNN,
    ODIN,
    SCALE,
    KLMatching,
    MaxLogit,
    ReAct,
)
from lightning_idkd.labels import Outputs


def test_shapings_of_a_hand_example():
    x = torch.tensor([[4.0, 1.0, 3.0, 2.0], [0.0, 0.0, 0.0, 0.0]])
    eye = nn.Linear(4, 4, bias=False)
    with torch.no_grad():
        eye.weight.copy_(torch.eye(4))
    assert ASH(percentile=0.5, variant="p").shape(x).tolist() == [[4, 0, 3, 0], [0] * 4]
    assert ASH(percentile=0.5, variant="b").shape(x).tolist() == [[5, 0, 5, 0], [0] * 4]
    up = math.exp(10 / 7)
    assert ASH(percentile=0.5).shape(x)[0].tolist() == pytest.approx([4 * up, 0, 3 * up, 0])
    assert SCALE(percentile=0.5).shape(x)[0].tolist() == pytest.approx([4 * up, up, 3 * up, 2 * up])
    assert SCALE(percentile=0.5).shape(x)[1].tolist() == [0] * 4
    clipped = ReAct(MaxLogit(), percentile=0.75)
    clipped.fit(Outputs(x[:1], x[:1], eye), None)
    assert clipped.shape(x)[0].tolist() == [4, 1, 3, 2]
    clipped = ReAct(MaxLogit(), percentile=0.5)
    clipped.fit(Outputs(x[:1], x[:1], eye), None)
    assert clipped(Outputs(x, x, eye)).tolist() == [3, 0]


def test_shaping_passes_shaped_features_and_logits_to_a_score_that_learns():
    shaped, plain = ReAct(KLMatching(), percentile=0.7), KLMatching()
    (x, y), judged = clusters(100), strangers(40)
    shaped.fit(outputs(x), y)
    plain.fit(outputs(x.clamp(max=shaped.clip)), y)
    torch.testing.assert_close(shaped(outputs(judged)), plain(outputs(judged.clamp(max=shaped.clip))))
    assert shaped.fitted
    assert not ASH().fitted
    assert ASH(KNN()).fitted


class Small(nn.Module):
    """A network whose answer to an image does not depend on the others."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layers = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 9, CLASSES))

    def forward(self, x):
        return self.layers(x)


@pytest.mark.parametrize("temperature", [1.0, 1000.0])
def test_odin_steps_up_the_gradient_of_the_largest_log_probability(temperature):
    module, x, epsilon = Small(), draws(12, 2, 5, 5), 0.05
    expected = []
    for image in x:
        image = image[None].clone().requires_grad_()
        p = torch.softmax(module(image)[0] / temperature, 0)
        (-p.log()[p.argmax()]).backward()
        expected.append((image - epsilon * image.grad.sign()).detach()[0])
    module.zero_grad()
    score = ODIN(temperature, epsilon)
    with torch.no_grad():
        moved = score.perturb(module, x)
        z = module(moved)
    torch.testing.assert_close(moved, torch.stack(expected))
    assert not moved.requires_grad
    assert all(p.grad is None or not p.grad.any() for p in module.parameters())
    p = (z.double() / temperature).softmax(1).amax(1)
    torch.testing.assert_close(score(Outputs(z)), torch.log(p / (1 - p)).float(), rtol=1e-5, atol=1e-5)
    odin = detector("ODIN")(module, eps=epsilon, temperature=temperature)
    assert same_order(score(Outputs(z)), -odin.predict(x), slack=1e-3)


def test_odin_without_a_step_changes_nothing_and_with_one_gets_surer():
    module, x = Small(), draws(12, 2, 5, 5)
    assert torch.equal(ODIN(epsilon=0.0).perturb(module, x), x)
    score = ODIN(1.0, 0.01)
    with torch.no_grad():
        assert (score(Outputs(module(score.perturb(module, x)))) > score(Outputs(module(x)))).all()
