import hashlib
import json
from dataclasses import dataclass

import numpy as np
import pytest

from lightning_idkd.data.partition import IID, Dirichlet, Partition, QGMDirichlet, Unsplittable, partition
from lightning_idkd.errors import UserError

RULES = [IID(), Dirichlet(0.1), Dirichlet(10), QGMDirichlet(0.01), QGMDirichlet(1)]


def balanced(samples=50_000, classes=10):
    return np.random.default_rng(0).permutation(np.arange(samples) % classes)


def classes_held(histogram, share=0.01):
    """Classes with more than 1 % of a node's data, mean over nodes."""
    return (histogram > share * histogram.sum(1, keepdims=True)).sum(1).mean()


def reference_qgm(labels, alpha, nodes, rng):
    """The authors' scheme written plainly: one try at a time, one class at a time."""
    order = rng.permutation(len(labels))
    line = []
    for first in range(0, nodes, 10):
        group = min(10, nodes - first)
        members = order[first * len(order) // nodes : (first + group) * len(order) // nodes]
        average = len(members) / group
        while True:
            held = [[] for _ in range(group)]
            for label in np.unique(labels):
                samples = members[labels[members] == label]
                p = rng.dirichlet([alpha] * group)
                p = np.array([p_j if len(h) < average else 0.0 for p_j, h in zip(p, held, strict=True)])
                if p.sum() == 0:
                    break
                cuts = (np.cumsum(p / p.sum())[:-1] * len(samples)).astype(int)
                for h, piece in zip(held, np.split(samples, cuts), strict=True):
                    h.extend(piece)
            if min(map(len, held)) >= 0.5 * average and sum(map(len, held)) == len(members):
                break
        for h in held:
            line.extend(h)
    return np.array_split(np.array(line), nodes)


@pytest.mark.parametrize("rule", RULES, ids=repr)
@pytest.mark.parametrize("nodes", [1, 7, 16])
def test_every_sample_is_at_exactly_one_node(rule, nodes):
    labels = balanced(5000)
    split = partition(rule, labels, nodes, seed=1, validation=0.2)
    assert len(split.train) == len(split.validation) == nodes
    everything = np.concatenate(split.train + split.validation)
    assert np.array_equal(np.sort(everything), np.arange(5000))
    assert all(i.dtype == np.int64 and (np.diff(i) > 0).all() for i in split.train + split.validation)
    for node in range(nodes):
        own = labels[np.concatenate([split.train[node], split.validation[node]])]
        assert split.histogram[node].tolist() == [int((own == label).sum()) for label in range(10)]
    assert split.histogram.dtype == np.int64


@pytest.mark.parametrize(("alpha", "quoted"), [(1, 8.3), (0.1, 4.1), (0.05, 3.3), (0.01, 2.4)])
def test_qgm_partition_is_as_skewed_as_the_authors(alpha, quoted):
    labels = balanced()
    held = [classes_held(partition(QGMDirichlet(alpha), labels, 16, seed).histogram) for seed in range(10)]
    assert np.mean(held) == pytest.approx(quoted, abs=0.4)


@pytest.mark.parametrize("alpha", [1, 0.1])
def test_qgm_partition_is_as_skewed_as_a_plain_loop(alpha):
    labels = balanced(5000)
    ours, plain = [], []
    for seed in range(20):
        ours.append(classes_held(partition(QGMDirichlet(alpha), labels, 16, seed).histogram))
        parts = reference_qgm(labels, alpha, 16, np.random.default_rng(seed))
        plain.append(classes_held(np.stack([np.bincount(labels[p], minlength=10) for p in parts])))
    error = np.hypot(np.std(ours), np.std(plain)) / np.sqrt(20)
    assert abs(np.mean(ours) - np.mean(plain)) < 3.5 * error


def test_qgm_nodes_have_equal_sizes_and_hopeless_draws_end():
    split = partition(QGMDirichlet(0.05), balanced(1003), 16, seed=0)
    assert set(split.histogram.sum(1)) == {62, 63}
    labels = np.repeat([0, 1], 1000)  # two classes reach at most a few of 10 nodes at once when alpha is small
    with pytest.raises(Unsplittable):
        QGMDirichlet(0.001).split(labels, 10, np.random.default_rng(0))


def test_qgm_first_split_gives_every_node_half_the_average():
    rule, rng = QGMDirichlet(0.01), np.random.default_rng(0)
    sizes = np.full(10, 100)
    for _ in range(5):
        counts = rule._counts(sizes, 10, rng)
        assert counts.sum(1).tolist() == sizes.tolist()
        assert counts.sum(0).min() >= 50
        before = np.cumsum(counts, axis=0) - counts  # what a node held when a class was dealt out
        assert (counts[before >= 100] <= 1).all()  # a full node gets none (1: a cut rounded down)


def test_qgm_loses_no_class_whose_whole_share_fell_to_a_full_node():
    sizes = np.array([50, 30, 20])  # of two nodes the first is full after one class, and alpha puts all on one of them
    for seed in range(20):
        assert QGMDirichlet(1e-4)._counts(sizes, 2, np.random.default_rng(seed)).sum(1).tolist() == [50, 30, 20]


@pytest.mark.parametrize("alpha", [0.3, 5.0])
def test_dirichlet_shares_have_the_moments_of_the_distribution(alpha):
    n, k, per_class = 4, 50, 200
    labels = np.repeat(np.arange(k), per_class)
    draws = [Dirichlet(alpha).split(labels, n, np.random.default_rng(seed)) for seed in range(20)]
    shares = np.concatenate([[np.bincount(labels[p], minlength=k) / per_class for p in parts] for parts in draws], 1)
    np.testing.assert_allclose(shares.mean(1), 1 / n, atol=0.04)
    expected = (1 / n) * (1 - 1 / n) / (n * alpha + 1)
    assert shares.var() == pytest.approx(expected, rel=0.1)


def test_iid_sizes_differ_by_at_most_one_and_labels_are_mixed():
    split = partition(IID(), balanced(1003), 10, seed=0)
    assert set(split.histogram.sum(1)) == {100, 101}
    assert split.histogram.min() > 0


@pytest.mark.parametrize(
    ("samples", "validation", "expected"),
    [
        (100, 0.2, 20),
        (50, 0.2, 16),
        (32, 0.2, 16),
        (31, 0.2, 6),
        (1, 0.2, 0),
        (2, 0.9, 1),
        (100, 0.0, 0),
        (100, 0.29, 29),
    ],
)
def test_validation_size(samples, validation, expected):
    split = partition(IID(), np.zeros(samples, int), 1, seed=0, validation=validation)
    assert (len(split.validation[0]), len(split.train[0])) == (expected, samples - expected)


def test_the_validation_share_moves_no_sample_to_another_node():
    labels = balanced(2000)
    small, large = (partition(Dirichlet(0.2), labels, 8, seed=5, validation=v) for v in (0.1, 0.5))
    assert np.array_equal(small.histogram, large.histogram)
    assert all(set(a) <= set(b) for a, b in zip(small.validation, large.validation, strict=True))


def test_validation_samples_have_the_labels_of_their_node():
    labels = balanced()
    split = partition(QGMDirichlet(0.1), labels, 16, seed=0, validation=0.5)
    for train, held_out in zip(split.train, split.validation, strict=True):
        shares = [np.bincount(labels[i], minlength=10) / len(i) for i in (train, held_out)]
        np.testing.assert_allclose(*shares, atol=0.06)  # 1,560 samples each: 5 standard errors


def test_the_same_seed_gives_the_same_split_and_another_seed_another():
    labels = balanced(2000)
    first, again, other = (partition(Dirichlet(0.1), labels, 8, seed) for seed in (0, 0, 1))
    assert first.to_dict() == again.to_dict()
    assert first.hash != other.hash


def test_the_hash_is_sha256_of_lengths_and_indices():
    split = partition(IID(), np.zeros(100, int), 2, seed=0)
    data = b""
    for part in (*split.train, *split.validation):
        data += len(part).to_bytes(8, "little") + b"".join(int(i).to_bytes(8, "little") for i in part)
    assert split.hash == hashlib.sha256(data).hexdigest()[:16]


def test_the_json_holds_the_whole_split():
    split = partition(Dirichlet(0.5), balanced(500), 4, seed=0)
    stored = json.loads(json.dumps(split.to_dict()))
    assert (stored["hash"], stored["rule"], stored["alpha"]) == (split.hash, "Dirichlet", 0.5)
    assert stored["histogram"] == split.histogram.tolist()
    assert stored["indices"]["train"][3] == split.train[3].tolist()
    assert stored["indices"]["validation"][3] == split.validation[3].tolist()
    assert stored["sizes"] == {"train": [*map(len, split.train)], "validation": [*map(len, split.validation)]}
    assert partition(IID(), balanced(500), 4, seed=0).to_dict()["alpha"] is None


def test_a_draw_that_leaves_a_node_empty_is_repeated_with_the_next_attempt():
    attempts = []

    class SecondTry(Partition):
        def split(self, labels, nodes, rng):
            attempts.append(rng.random())
            parts = np.array_split(np.arange(len(labels)), nodes)
            if len(attempts) == 1:
                raise Unsplittable
            if len(attempts) == 2:
                return [np.concatenate(parts), *[parts[0][:0]] * (nodes - 1)]
            return parts

    split = partition(SecondTry(), np.zeros(40, int), 4, seed=0)
    assert len(set(attempts)) == 3
    assert split.rule == "SecondTry"
    assert split.histogram.tolist() == [[10]] * 4


def test_an_alpha_that_leaves_nodes_empty_is_refused_with_one_that_works():
    labels = balanced(5000)
    with pytest.raises(UserError) as error:
        partition(Dirichlet(0.003), labels, 16, seed=0)
    text = str(error.value)
    assert text.startswith("data.partition.alpha: 0.003 leaves some of 16 nodes without training samples in each of 50")
    advised = float(text.rpartition(" ")[2])
    for candidate in (float(f"{0.003 * 1.5**j:.3g}") for j in range(1, 61)):
        if candidate == advised:
            break
        with pytest.raises(UserError):
            partition(Dirichlet(candidate), labels, 16, seed=0)
    partition(Dirichlet(advised), labels, 16, seed=0)


def test_two_classes_on_ten_nodes_are_refused_not_tried_for_ever():
    with pytest.raises(
        UserError, match=r"data\.partition\.alpha: 0\.01 leaves .* the smallest alpha that worked is 0\.\d+"
    ):
        partition(QGMDirichlet(0.01), np.repeat([0, 1], 500), 10, seed=0)


@dataclass
class Greedy(Partition):
    """Everything to the first node."""

    def split(self, labels, nodes, rng):
        return [np.arange(len(labels)), *[np.arange(0)] * (nodes - 1)]


class Overlapping(Partition):
    def split(self, labels, nodes, rng):
        return [np.arange(len(labels))] * nodes


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Dirichlet(0.0), "data.partition.alpha: 0.0 given; allowed: above 0 (smaller is more skewed)"),
        (lambda: QGMDirichlet(-1), "data.partition.alpha: -1 given; allowed: above 0 (smaller is more skewed)"),
        (lambda: Dirichlet(float("nan")), "data.partition.alpha: nan given; allowed: above 0 (smaller is more skewed)"),
        (
            lambda: partition(IID(), np.zeros(10, int), 11, 0),
            "graph.nodes: 11 given; allowed: at most 10, the number of training samples",
        ),
        (
            lambda: partition(IID(), np.zeros(10, int), 2, 0, validation=1.0),
            "data.validation: 1.0 given; allowed: 0 (none held out) to below 1 (a share)",
        ),
        (
            lambda: partition(IID(), np.zeros(10, int), 2, 0, validation=-0.1),
            "data.validation: -0.1 given; allowed: 0 (none held out) to below 1 (a share)",
        ),
        (
            lambda: partition(Dirichlet(0.3), np.arange(20) % 10, 16, 0),
            "data.partition.alpha: 0.3 leaves some of 16 nodes without training samples in each of 50 draws; "
            "lower graph.nodes",
        ),
        (
            lambda: partition(Greedy(), np.zeros(10, int), 2, 0),
            "data.partition: Greedy leaves some of 2 nodes without training samples in each of 50 draws; "
            "lower graph.nodes",
        ),
        (
            lambda: partition(Overlapping(), np.zeros(10, int), 2, 0),
            "data.partition: Overlapping must give 2 nodes every sample exactly once, and did not",
        ),
    ],
)
def test_a_mistake_is_named_with_its_key_and_what_is_allowed(build, message):
    with pytest.raises(UserError) as error:
        build()
    assert str(error.value) == message


def test_a_class_without_samples_keeps_its_column_in_the_histogram():
    labels = np.array([0, 1, 0, 1, 0, 1])
    assert partition(IID(), labels, 2, 0, 0.0, classes=4).histogram.sum(0).tolist() == [3, 3, 0, 0]
    assert partition(IID(), labels, 2, 0, 0.0).histogram.sum(0).tolist() == [3, 3]
