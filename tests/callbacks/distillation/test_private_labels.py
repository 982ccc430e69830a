"""Labels with noise: how probable every message is, how many bytes it takes, and that it is the same in every run."""

import itertools
import math
import struct

import numpy as np
import pytest
import torch
from four_nodes import real_run
from scipy import stats

from lightning_idkd.callbacks import IDKD, LaplaceLabels, RandomizedResponse, VanillaKD
from lightning_idkd.errors import UserError
from lightning_idkd.labels import Labels
from lightning_idkd.training.fit import describe_privacy

EPSILONS = (0.5, 2.0, 8.0)
both = pytest.mark.parametrize("encoding", [RandomizedResponse, LaplaceLabels])
every_epsilon = pytest.mark.parametrize("epsilon", EPSILONS)


def one_hot(classes, k):
    return Labels(torch.arange(len(classes)), torch.eye(k)[classes])


def grid(count):
    """``count`` numbers evenly in [0, 1), in place of random ones: probabilities are then exact up to 1 / count."""
    return lambda columns: ((torch.arange(count, dtype=torch.float64) + 0.5) / count)[:, None].expand(-1, columns)


def generator(count, seed=0):
    g = torch.Generator().manual_seed(seed)
    return lambda columns: torch.rand(count, columns, generator=g, dtype=torch.float64)


def reported(epsilon, true, k, count=100_000):
    """Frequency of every report for a true class."""
    labels = one_hot([true] * count, k)
    return RandomizedResponse(epsilon).perturb(labels, grid(count)).probabilities.double().mean(0).numpy()


# ---------------------------------------------------------------------- randomised response


@every_epsilon
@pytest.mark.parametrize("k", [2, 3, 10])
def test_the_true_class_is_reported_with_its_probability_and_the_others_evenly(epsilon, k):
    total = math.exp(epsilon) + k - 1
    for true in (0, k // 2, k - 1):
        expected = np.full(k, 1 / total)
        expected[true] = math.exp(epsilon) / total
        np.testing.assert_allclose(reported(epsilon, true, k), expected, atol=2e-5)


@every_epsilon
def test_no_report_is_more_than_e_to_the_epsilon_as_probable_for_another_class(epsilon):
    frequencies = [reported(epsilon, true, 3, 300_000) for true in range(3)]
    for one, other in itertools.permutations(frequencies, 2):
        assert (one / other).max() == pytest.approx(math.exp(epsilon), rel=0.02)  # and no more noise than that needs


def test_the_receivers_label_is_an_unbiased_estimate_once_its_shift_and_scale_are_undone():
    """z = q + (p - q) r, and (r - q) / (p - q) has the true class as its mean."""
    count, k, epsilon = 200_000, 5, 1.0
    true = torch.arange(count) % 2 * 3  # classes 0 and 3, half each
    labels, encoding = one_hot(true, k), RandomizedResponse(epsilon)
    message = encoding.encode(encoding.perturb(labels, generator(count)), count)
    z = encoding.decode(message, count, k, False).probabilities.double().mean(0).numpy()
    p, q = math.e / (math.e + 4), 1 / (math.e + 4)
    estimate = ((z - q) / (p - q) - q) / (p - q)
    sd = math.sqrt(0.25 / count) / (p - q)
    np.testing.assert_allclose(estimate, [0.5, 0, 0, 0.5, 0], atol=4 * sd)


def test_the_most_probable_class_of_a_soft_label_counts():
    soft = Labels(torch.arange(1), torch.tensor([[0.3, 0.36, 0.34]]))
    sent = RandomizedResponse(20.0).perturb(soft, lambda columns: torch.zeros(1, columns, dtype=torch.float64))
    assert sent.probabilities.tolist() == [[0, 1, 0]]


@pytest.mark.parametrize(("k", "width"), [(2, 1), (256, 1), (257, 2)])
def test_a_report_takes_a_byte_or_two(k, width):
    index = torch.tensor([1, 9])
    sent = Labels(index, torch.eye(k)[[k - 1, 0]])
    encoding = RandomizedResponse(3.0)
    message = encoding.encode(sent, 12)
    head = b"\0" + struct.pack("<I", 2) + bytes([0b01000000, 0b01000000])
    assert message == head + struct.pack("<2B" if width == 1 else "<2H", k - 1, 0)
    got = encoding.decode(message, 12, k, False)
    p, q = math.exp(3) / (math.exp(3) + k - 1), 1 / (math.exp(3) + k - 1)
    expected = torch.full((2, k), q)
    expected[0, k - 1] = expected[1, 0] = p
    torch.testing.assert_close(got.probabilities, expected)
    assert torch.equal(got.index, index)
    assert got.nbytes == len(message)


# ---------------------------------------------------------------------- Laplace noise


def projected(y):
    """The nearest distribution to ``y``: max(y - t, 0), with t by bisection."""
    low, high = min(y) - 1, max(y)
    for _ in range(100):
        t = (low + high) / 2
        low, high = (t, high) if sum(max(v - t, 0) for v in y) > 1 else (low, t)
    return [max(v - t, 0) for v in y]


@every_epsilon
def test_the_noise_is_laplace_of_scale_two_over_epsilon_and_then_projected(epsilon):
    y = [0.7, 0.2, 0.1]
    u = torch.tensor([[0.1, 0.5, 0.93], [0.6, 0.02, 0.3], [0.25, 0.25, 0.25]], dtype=torch.float64)
    sent = LaplaceLabels(epsilon).perturb(
        Labels(torch.arange(3), torch.tensor([y] * 3)), lambda columns: u[:, :columns]
    )
    noise = stats.laplace(scale=2 / epsilon).ppf(u.numpy())
    expected = [projected(row) for row in (np.array(y) + noise).tolist()]
    np.testing.assert_allclose(sent.probabilities, expected, atol=1e-6)


@every_epsilon
def test_no_noisy_label_is_more_than_e_to_the_epsilon_as_probable_for_another_one(epsilon):
    """Of two classes and opposite labels: frequencies of the first class's probability, 0 and 1 apart, over a grid of
    all pairs of random numbers."""
    side = 600
    u = (torch.arange(side, dtype=torch.float64) + 0.5) / side
    pairs = torch.cartesian_prod(u, u)
    counts = []
    for label in ([1.0, 0.0], [0.0, 1.0]):
        labels = Labels(torch.arange(side**2), torch.tensor(label).expand(side**2, 2))
        first = LaplaceLabels(epsilon).perturb(labels, lambda columns: pairs).probabilities[:, 0]
        inner = torch.histc(first[(first > 0) & (first < 1)], 8, 0, 1)
        counts.append(np.array([(first == 0).sum(), *inner, (first == 1).sum()]))
    enough = np.min(counts, axis=0) > 100
    ratios = counts[0][enough] / counts[1][enough]
    assert enough.sum() >= 2
    assert max(ratios.max(), (1 / ratios).max()) <= 1.03 * math.exp(epsilon)
    assert max(ratios.max(), (1 / ratios).max()) >= math.exp(0.5 * epsilon)


@both
def test_noisy_labels_are_distributions_in_the_format_of_the_encoding(encoding):
    labels = Labels(torch.arange(50), (3 * torch.randn(50, 7, generator=torch.Generator().manual_seed(1))).softmax(1))
    for epsilon in EPSILONS:
        noisy = encoding(epsilon).perturb(labels, generator(50))
        got = encoding(epsilon).decode(encoding(epsilon).encode(noisy, 50), 50, 7, False)
        assert (got.probabilities >= 0).all()
        np.testing.assert_allclose(got.probabilities.sum(1), 1, atol=1e-6)
        assert got.nbytes == 5 + 7 + 50 * (1 if encoding is RandomizedResponse else 2 * 7)


# ---------------------------------------------------------------------- in a run


def messages(distillation, seed=0, step=0):
    """What every node sends."""
    run = real_run(distillation, steps=0, seed=3)
    run.seed, run.progress.step = seed, step
    return [labels.probabilities for labels in distillation.label(run)]


@both
def test_noise_follows_from_seed_node_and_step_alone(encoding):
    def make():
        return VanillaKD(start=0, encoding=encoding(0.5))

    first = messages(make())
    assert all(torch.equal(a, b) for a, b in zip(first, messages(make()), strict=True))
    for other in (messages(make(), seed=1), messages(make(), step=1)):
        assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert not torch.equal(first[0], first[1])


@both
def test_a_run_sends_noisy_labels_and_averages_of_them_without_more_noise(encoding):
    """With two hops, the noise is drawn once a node."""
    kd, calls = VanillaKD(start=0, hops=2, encoding=encoding(1.0)), []
    perturb = kd.encoding.perturb
    kd.encoding.perturb = lambda labels, uniform: calls.append(len(labels)) or perturb(labels, uniform)
    run = real_run(kd, steps=0)
    run.call("on_epoch_start", epoch=0)
    assert calls == [11] * 4
    one_message = 5 + 2 + 11 * (1 if encoding is RandomizedResponse else 2 * 3)
    assert run.network.counts()["label_bytes"] == 2 * 8 * one_message


@both
def test_the_bound_is_composed_over_samples_and_exchanges(encoding):
    assert describe_privacy(VanillaKD(start=4, every=2, encoding=encoding(0.5)), 10, 600) == (
        "epsilon 0.5 per label, at most 900 for all 600 labels of 3 exchanges; not protected: the parameters"
    )
    assert describe_privacy(IDKD(start=4, encoding=encoding(2)), 10, 1000) == (
        "epsilon 2 per label, at most 2,000 for all 1,000 labels of 1 exchange; not protected: which samples a node "
        "labels, and the parameters"
    )
    assert describe_privacy(VanillaKD(), 10, 600) == describe_privacy(None, 10, 600) == ""


# ---------------------------------------------------------------------- mistakes


@both
@pytest.mark.parametrize("epsilon", [0, -1, math.nan, math.inf, 20.5])
def test_a_bound_that_is_none_is_refused_with_the_key(encoding, epsilon):
    with pytest.raises(UserError, match=rf"distillation\.encoding\.epsilon: {epsilon} given; allowed: above 0 to 20"):
        encoding(epsilon)


@both
def test_weights_which_have_no_noise_are_refused(encoding):
    with pytest.raises(UserError, match=r"distillation\.weighted: True given; allowed: only without noise of labels"):
        IDKD(weighted=True, encoding=encoding(1.0))
