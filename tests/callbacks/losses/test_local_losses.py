"""Losses of private samples: closed forms, numpy, engines, batches of private and distilled samples, bad input."""

import numpy as np
import pytest
import torch
from torch import nn

from lightning_idkd import Loss, NodeModule, UserError
from lightning_idkd.callbacks import (
    BalancedSoftmax,
    CalibratedLogits,
    CentredLogits,
    CrossEntropy,
    Focal,
    LabelSmoothing,
    RestrictedSoftmax,
)
from lightning_idkd.nodes.stack import NodeStack

COUNTS = np.array([6.0, 0.0, 1.0, 3.0])
PRIVATE = np.array([True, True, False, True, False])
K, B = 4, 5


def softmax(z):
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def case(seed=0, soft=False):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(B, K)) * 2
    targets = rng.dirichlet(np.ones(K), B) if soft else np.eye(K)[[0, 3, 2, 0, 3]]
    return logits, targets


def balanced(z, y, tau=0.7):
    """Menon et al., equation 10, as a loop: -log of pi_y^tau e^z_y over the sum of the same of all classes."""
    losses = np.zeros(len(z))
    prior = (COUNTS + 1) / (COUNTS + 1).sum()
    for i in range(len(z)):
        weights = [prior[c] ** tau * np.exp(z[i, c]) for c in range(K)]
        losses[i] = -sum(y[i, c] * np.log(weights[c] / sum(weights)) for c in range(K))
    return losses


def calibrated(z, y, tau=0.2):
    """Zhang et al., equation 8: margins tau n^(-1/4), with n = 1e-8 for a class that is absent."""
    margins = [tau * (n if n > 0 else 1e-8) ** -0.25 for n in COUNTS]
    return -(y * np.log(softmax(z - np.array(margins)))).sum(1)


def restricted(z, y, scale=0.3):
    """Li and Zhan, equation 8: logits of absent classes are multiplied by the scale."""
    factors = np.array([1 if n > 0 else scale for n in COUNTS])
    return -(y * np.log(softmax(z * factors))).sum(1)


def smoothed(z, y, epsilon=0.2):
    return -(((1 - epsilon) * y + epsilon / K) * np.log(softmax(z))).sum(1)


def focal(z, y, gamma=1.5):
    p = softmax(z)
    return -(y * (1 - p) ** gamma * np.log(p)).sum(1)


def centred(z, y, tau=0.4):
    """Softmax of the logits minus the mean of those of the public samples, times the prior to the power tau."""
    centre = (z[2] + z[4]) / 2
    prior = (COUNTS + 1) / (COUNTS + 1).sum()
    return -(y * np.log(softmax(z - centre + tau * np.log(prior)))).sum(1)


FORMS = {
    "centred": (CentredLogits(0.4), centred),
    "balanced": (BalancedSoftmax(0.7), balanced),
    "calibrated": (CalibratedLogits(0.2), calibrated),
    "restricted": (RestrictedSoftmax(0.3), restricted),
    "smoothed": (LabelSmoothing(0.2), smoothed),
    "focal": (Focal(1.5), focal),
    "cross-entropy": (CrossEntropy(), lambda z, y: -(y * np.log(softmax(z))).sum(1)),
}


def compute(loss, logits, targets):
    """The losses and the gradient of their sum by the logits."""
    z = torch.tensor(logits, requires_grad=True)
    losses = loss(z, torch.from_numpy(targets), torch.from_numpy(COUNTS), torch.from_numpy(PRIVATE))
    losses.sum().backward()
    return losses.detach().numpy(), z.grad.numpy()


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("name", FORMS)
def test_losses_and_gradients_are_those_of_the_formula(name, soft):
    loss, formula = FORMS[name]
    logits, targets = case(soft=soft)
    losses, gradient = compute(loss, logits, targets)
    np.testing.assert_allclose(losses, formula(logits, targets), rtol=1e-12)
    numeric = np.zeros_like(logits)
    for i in range(B):
        for c in range(K):
            step = np.zeros_like(logits)
            step[i, c] = 1e-6
            numeric[i, c] = (formula(logits + step, targets) - formula(logits - step, targets)).sum() / 2e-6
    np.testing.assert_allclose(gradient, numeric, atol=1e-8)


def test_the_gradient_of_the_balanced_softmax_is_that_of_the_corrected_probabilities():
    logits, targets = case()
    _, gradient = compute(BalancedSoftmax(1.0), logits, targets)
    prior = np.log((COUNTS + 1) / (COUNTS + 1).sum())
    np.testing.assert_allclose(gradient, softmax(logits + prior) - targets, rtol=1e-12, atol=1e-14)


def test_an_absent_class_gets_no_gradient_where_it_is_left_out():
    logits, targets = case()
    for loss in (RestrictedSoftmax(0.0), CalibratedLogits(10.0)):
        _, gradient = compute(loss, logits, targets)
        assert np.abs(gradient[:, 1]).max() < 1e-12
        assert np.isfinite(gradient).all()


@pytest.mark.parametrize(
    "loss", [BalancedSoftmax(0.0), CalibratedLogits(0.0), RestrictedSoftmax(1.0), LabelSmoothing(0.0), Focal(0.0)]
)
def test_without_its_change_a_loss_is_the_cross_entropy_bit_for_bit(loss):
    for soft in (False, True):
        logits, targets = case(soft=soft)
        ours, theirs = compute(loss, logits, targets), compute(CrossEntropy(), logits, targets)
        assert all(np.array_equal(*pair) for pair in zip(ours, theirs, strict=True))


def test_a_focal_loss_of_a_certain_sample_has_a_finite_gradient():
    z = torch.tensor([[200.0, 0.0]], requires_grad=True)
    Focal(0.5)(z, torch.tensor([[1.0, 0.0]]), torch.ones(2), torch.tensor([True])).sum().backward()
    assert z.grad.isfinite().all()


def test_centred_logits_do_not_push_a_class_for_all_images():
    """A constant that is added to the logits of all samples changes nothing, so the gradient has no such direction."""
    logits, targets = case()
    private_alone = targets * PRIVATE[:, None]
    _, gradient = compute(CentredLogits(), logits, private_alone)
    np.testing.assert_allclose(gradient.sum(0), 0, atol=1e-14)
    assert np.abs(gradient).max() > 0.1


def test_without_public_samples_centred_logits_are_the_balanced_softmax():
    logits, targets = (torch.from_numpy(a) for a in case())
    counts, private = torch.from_numpy(COUNTS), torch.ones(B, dtype=torch.bool)
    pair = [loss(logits, targets, counts, private) for loss in (CentredLogits(0.4), BalancedSoftmax(0.4))]
    torch.testing.assert_close(*pair, rtol=1e-14, atol=0)


# ---------------------------------------------------------------------- nodes


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, K)

    def features(self, x):
        return x

    def forward(self, x):
        return self.head(x)


def node(loss=None):
    torch.manual_seed(0)
    module = NodeModule(Net())
    module.loss = loss
    return module


def batch(n):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(n, B, 3, generator=g, dtype=torch.float64)
    y = torch.rand(n, B, K, generator=g, dtype=torch.float64).softmax(2)
    counts = torch.tensor([[6.0, 0, 1, 3], [0, 2, 0, 0], [1, 1, 5, 0]], dtype=torch.float64)
    private = torch.tensor([[1, 1, 0, 0, 1], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)
    temperature = torch.ones(n, B, dtype=torch.float64).where(private, 2.0)
    return x, y, counts, private, temperature


@pytest.mark.parametrize("engine", ["loop", "vmap", "parallel"])
@pytest.mark.parametrize("name", FORMS)
def test_every_node_has_its_own_counts_and_distilled_samples_keep_their_loss(name, engine):
    loss = FORMS[name][0]
    stack = NodeStack(lambda: node(None if loss.plain else loss), range(3), dtype=torch.float64, engine=engine)
    x, y, counts, private, temperature = batch(3)
    for _ in range(2):  # the first step of `parallel` runs the nodes in order
        losses = stack.step(x, y, 0, counts, private, temperature)
    for i in range(3):
        module = node().double()
        module.network.load_state_dict(stack.modules[i].network.state_dict())
        z = module(x[i])
        own = loss(z, y[i], counts[i], private[i])
        others = -4 * (y[i] * (z / 2).log_softmax(1)).sum(1)
        expected = torch.stack([own[b] if private[i, b] else others[b] for b in range(B)]).mean()
        torch.testing.assert_close(losses[i], expected, rtol=1e-12, atol=1e-14)
        expected.backward()
        gradient = torch.cat([p.grad.flatten() for p in module.network.parameters()])
        torch.testing.assert_close(stack.G[i], gradient, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("indices", [False, True])
def test_a_plain_trainer_takes_the_counts_from_the_node(indices):
    module = node(BalancedSoftmax(0.7)).double()
    module.counts = torch.from_numpy(COUNTS)
    x, labels = torch.randn(B, 3, dtype=torch.float64), torch.tensor([0, 3, 2, 0, 3])
    targets = labels if indices else torch.eye(K, dtype=torch.float64)[labels]
    expected = balanced(module(x).detach().numpy(), np.eye(K)[labels]).mean()
    assert module.training_step((x, targets)).item() == pytest.approx(expected, rel=1e-12)


# ---------------------------------------------------------------------- bad input


class Mean(Loss):
    def __call__(self, logits, targets, counts, private):
        return CrossEntropy()(logits, targets, counts, private).mean()


class Text(Loss):
    def __call__(self, logits, targets, counts, private):
        return "low"


@pytest.mark.parametrize(("loss", "said"), [
    (Mean(), r"node\.loss: Mean returns \[\]; allowed: one number a sample, \[5\]"),
    (Text(), r"node\.loss: Text returns str; allowed: one number a sample, \[5\]"),
])  # fmt: skip
def test_a_loss_without_a_number_for_every_sample_is_refused(loss, said):
    module = node(loss)
    module.counts = torch.ones(K)
    with pytest.raises(UserError, match=f"^{said}"):
        module.training_step((torch.randn(B, 3), torch.zeros(B, dtype=torch.int64)))


def test_a_node_without_counts_says_where_they_belong():
    with pytest.raises(
        UserError, match=r"^node\.loss: BalancedSoftmax needs the node's label counts; set the attribute"
    ):
        node(BalancedSoftmax()).training_step((torch.randn(B, 3), torch.zeros(B, dtype=torch.int64)))


@pytest.mark.parametrize(("make", "said"), [
    (lambda: BalancedSoftmax(-0.1), r"node\.loss\.tau: -0\.1 given; allowed: 0 or more"),
    (lambda: CalibratedLogits(float("inf")), r"node\.loss\.tau: inf given; allowed: 0 or more"),
    (lambda: RestrictedSoftmax(1.1), r"node\.loss\.scale: 1\.1 given; allowed: 0 to 1"),
    (lambda: LabelSmoothing(1.0), r"node\.loss\.epsilon: 1\.0 given; allowed: 0 to below 1"),
    (lambda: Focal(-1.0), r"node\.loss\.gamma: -1\.0 given; allowed: 0 or more"),
])  # fmt: skip
def test_arguments_out_of_range_are_refused_with_their_key(make, said):
    with pytest.raises(UserError, match=f"^{said}"):
        make()


def test_a_node_of_one_class_is_remarked_where_others_are_left_out():
    one, two = torch.tensor([0, 5, 0]), torch.tensor([1, 5, 0])
    for loss in (CalibratedLogits(), RestrictedSoftmax(0.0)):
        assert loss.remark(one).startswith("one class only")
        assert loss.remark(two) == ""
    for loss in (CalibratedLogits(0.0), RestrictedSoftmax(0.5), BalancedSoftmax(), CrossEntropy()):
        assert loss.remark(one) == ""


def test_a_loss_of_other_arguments_is_refused_where_it_is_defined():
    with pytest.raises(
        UserError, match=r"node\.loss: Old\.__call__ takes \(logits, targets, counts\); allowed: \(logits, "
    ):

        class Old(Loss):
            def __call__(self, logits, targets, counts):
                return logits
