import json

import numpy as np
import pytest
import torch

from lightning_idkd.cli import main
from lightning_idkd.config.parse import configure
from lightning_idkd.data.images import Images
from lightning_idkd.data.partition import Dirichlet, partition
from lightning_idkd.data.skews import ClassesPerNode, FeatureSkew, FromFile, QuantitySkew, Regions, Shards
from lightning_idkd.errors import UserError
from lightning_idkd.training.build import load_samples

RULES = [Shards(2), Shards(1), ClassesPerNode(2), ClassesPerNode(3), QuantitySkew(1.0), FeatureSkew(), Regions(2)]


def balanced(samples=5000, classes=10):
    return np.random.default_rng(0).permutation(np.arange(samples) % classes)


@pytest.mark.parametrize("rule", RULES, ids=repr)
@pytest.mark.parametrize("nodes", [10, 16])
def test_every_sample_is_at_exactly_one_node_and_the_seed_says_which(rule, nodes):
    labels = balanced()
    split, again, other = (partition(rule, labels, nodes, seed) for seed in (1, 1, 2))
    assert np.array_equal(np.sort(np.concatenate(split.train + split.validation)), np.arange(5000))
    assert split.hash == again.hash != other.hash


def test_shards_give_equal_sizes_and_few_classes():
    # 20 shards of 250 in 10 classes of 500: none has two classes
    histogram = partition(Shards(2), balanced(), 10, 0).histogram
    assert set(histogram.sum(1)) == {500}
    assert set(np.unique(histogram)) <= {0, 250, 500}
    assert (histogram > 0).sum(1).max() == 2
    uneven = partition(Shards(2), balanced(1003), 16, 0).histogram
    assert uneven.sum(1).min() >= 2 * (1003 // 32)
    assert (uneven > 0).sum(1).max() <= 4  # a shard may hold the end of a class and the beginning of the next


def test_dealt_shards_are_random():
    first, second = (partition(Shards(2), balanced(), 10, seed).histogram for seed in (0, 1))
    assert not np.array_equal(first, second)


def test_regions_share_their_classes_and_no_others():
    histogram = partition(Regions(2), balanced(), 20, 0).histogram
    assert not histogram[:10, 5:].any()
    assert not histogram[10:, :5].any()
    assert set(histogram.sum(1)) == {250}
    assert 0 < histogram[:10, :5].std() < 10, "a region's samples are divided at random"
    three = partition(Regions(3), balanced(), 7, 0).histogram  # 3, 2 and 2 nodes; 4, 3 and 3 classes
    assert [sorted(np.flatnonzero(row)) for row in three[[0, 3, 5]]] == [[0, 1, 2, 3], [4, 5, 6], [7, 8, 9]]


@pytest.mark.parametrize(("nodes", "classes"), [(10, 2), (16, 2), (5, 2), (4, 10), (7, 3), (1, 10)])
def test_every_node_holds_its_number_of_classes_and_every_class_as_many_nodes(nodes, classes):
    histogram = partition(ClassesPerNode(classes), balanced(), nodes, 0).histogram
    assert set((histogram > 0).sum(1)) == {classes}
    holders = (histogram > 0).sum(0)
    assert holders.sum() == nodes * classes
    assert np.ptp(holders) <= 1
    for c, count in enumerate(holders):  # equal parts of the class
        held = histogram[:, c][histogram[:, c] > 0]
        assert np.ptp(held) <= 1
        assert held.sum() == 500
        assert len(held) == count


@pytest.mark.parametrize("alpha", [0.5, 5.0])
def test_node_sizes_have_the_moments_of_the_distribution(alpha):
    n = 5
    sizes = [
        [len(p) / 5000 for p in QuantitySkew(alpha).split(balanced(), n, np.random.default_rng(s))] for s in range(400)
    ]
    expected = (1 / n) * (1 - 1 / n) / (n * alpha + 1)
    assert np.mean(sizes) == pytest.approx(1 / n)
    assert np.var(sizes) == pytest.approx(expected, rel=0.1)


def test_nodes_of_different_sizes_have_the_same_labels():
    histogram = partition(QuantitySkew(5.0), balanced(50_000), 8, 0).histogram
    shares = histogram / histogram.sum(1, keepdims=True)
    assert np.ptp(histogram.sum(1)) > 1000
    np.testing.assert_allclose(shares, 0.1, atol=0.03)


# ------------------------------------------------------------------ features


def images(pixels):
    return Images(pixels, torch.arange(len(pixels)) % 2, ("a", "b"), "8x8 grey")


def test_brightness_is_a_factor_spread_evenly_over_nodes():
    rule, seed = FeatureSkew(brightness=0.5, rotation=0), 3
    given = images(torch.full((60, 3, 4, 4), 100, dtype=torch.uint8))
    split = partition(rule, given.labels.numpy(), 5, seed)
    found = rule.transform(given, split, seed)
    assert (given.pixels == 100).all()  # it may be mapped from a file
    assert (found.labels is given.labels, found.classes, found.stored) == (True, given.classes, given.stored)
    levels = []
    for train, validation in zip(split.train, split.validation, strict=True):
        (level,) = found.pixels[np.concatenate([train, validation])].unique().tolist()
        levels.append(level)
    assert sorted(levels) == [50, 75, 100, 125, 150]
    factors, _ = rule.looks(5, seed)
    assert levels == [round(100 * f) for f in factors]
    assert not np.array_equal(factors, rule.looks(5, seed + 1)[0])


def test_rotation_turns_the_images_of_a_node():
    rule, seed = FeatureSkew(brightness=0, rotation=90), 0
    pixels = torch.randint(256, (30, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    split = partition(rule, np.arange(30) % 2, 3, seed)
    found = rule.transform(images(pixels), split, seed).pixels
    for train, validation, angle in zip(split.train, split.validation, rule.looks(3, seed)[1], strict=True):
        own = np.concatenate([train, validation])
        turned = torch.rot90(pixels[own], round(angle / 90), (2, 3))
        assert (found[own].int() - turned.int()).abs().max() <= 1
    assert sorted(rule.looks(3, seed)[1]) == [-90, 0, 90]


def test_a_single_node_sees_the_images_as_they_are():
    pixels = torch.arange(2 * 64, dtype=torch.uint8).view(2, 1, 8, 8)
    rule = FeatureSkew()
    assert torch.equal(rule.transform(images(pixels), partition(rule, np.arange(2), 1, 0), 0).pixels, pixels)


def test_a_run_trains_on_what_its_nodes_see_and_tests_on_what_there_is():
    common = ["--data.private", "Digits", "--graph.nodes", "4"]
    plain = load_samples(configure(common))
    skewed = load_samples(configure([*common, "--data.partition", "FeatureSkew", "--data.partition.rotation", "45"]))
    assert torch.equal(plain[1].pixels, skewed[1].pixels)
    assert not torch.equal(plain[0].pixels, skewed[0].pixels)
    assert plain[3].hash == skewed[3].hash  # who has which sample is IID's draw


# ------------------------------------------------------------------ from a file


def test_a_partition_of_another_run_is_taken_whole(tmp_path):
    labels = balanced(500)
    there = partition(Dirichlet(0.3), labels, 6, seed=1, validation=0.3)
    (tmp_path / "partition.json").write_text(json.dumps(there.to_dict()))
    here = partition(FromFile(str(tmp_path / "partition.json")), labels, 6, seed=9, validation=0.0)
    assert here.hash == there.hash
    assert np.array_equal(here.histogram, there.histogram)
    assert here.rule == "FromFile"


def test_lists_of_indices_leave_the_held_out_part_to_the_config(tmp_path):
    parts = [list(range(0, 60)), list(range(60, 100))]
    (tmp_path / "mine.json").write_text(json.dumps(parts))
    split = partition(FromFile(str(tmp_path / "mine.json")), np.zeros(100, int), 2, seed=0, validation=0.5)
    assert [len(v) for v in split.validation] == [30, 20]
    assert [sorted([*t, *v]) for t, v in zip(split.train, split.validation, strict=True)] == parts


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([[0, 1, 2], [3, 4, 2]], "sample 2 is twice or more in '{}'; every sample must be in one list"),
        ([[0, 1, 2], [3, 4]], "sample 5 is in no list in '{}'; every sample must be in one list"),
        ([[0, 1, 2], [3, 4, 6]], "index 6 in '{}'; allowed: 0 to 5, the training set"),
        ([[0, 1, 2], [3, 4, -1]], "index -1 in '{}'; allowed: 0 to 5, the training set"),
        ([[0, 1, 2, 3, 4, 5], []], "node 1 has no training samples in '{}'"),
        ([[0, 1, 2, 3, 4, 5]], "'{}' is for 1 nodes, but graph.nodes is 2"),
        ([[0, 1.5], [2]], "'{}' holds neither a run's partition nor a list with one list of indices per node"),
        ([0, 1, 2], "'{}' holds neither a run's partition nor a list with one list of indices per node"),
        (
            {"indices": {"train": [[0, 1], [2, 3, 4, 5]], "validation": [[]]}},
            "'{}' holds neither a run's partition nor a list with one list of indices per node",
        ),
        ([[0, 10**30], [1]], "'{}' holds neither a run's partition nor a list with one list of indices per node"),
        ({"train": []}, "'{}' holds neither a run's partition nor a list with one list of indices per node"),
    ],
)
def test_a_file_without_a_valid_partition_is_refused(content, said, tmp_path):
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(content))
    with pytest.raises(UserError) as error:
        partition(FromFile(str(file)), np.zeros(6, int), 2, seed=0)
    assert str(error.value) == "data.partition.path: " + said.format(file)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Shards(0), "data.partition.shards_per_node: 0 given; allowed: 1 or more"),
        (
            lambda: partition(Shards(3), np.zeros(40, int), 16, 0),
            "data.partition.shards_per_node: 3 given; allowed: 1 to 2, for 40 samples on 16 nodes",
        ),
        (
            lambda: partition(ClassesPerNode(11), balanced(), 16, 0),
            "data.partition.classes: 11 given; allowed: 1 to 10, for 10 classes on 16 nodes",
        ),
        (
            lambda: partition(ClassesPerNode(1), balanced(), 4, 0),
            "data.partition.classes: 1 given; allowed: 3 to 10, for 10 classes on 4 nodes",
        ),
        (lambda: QuantitySkew(0), "data.partition.alpha: 0 given; allowed: above 0 (smaller is more skewed)"),
        (
            lambda: partition(Regions(11), balanced(), 16, 0),
            "data.partition.regions: 11 given; allowed: 1 to 10, for 10 classes on 16 nodes",
        ),
        (lambda: FeatureSkew(1.0), "data.partition.brightness: 1.0 given; allowed: 0 to below 1"),
        (lambda: FeatureSkew(0.1, -1), "data.partition.rotation: -1 given; allowed: 0 to 180 degrees"),
        (
            lambda: partition(FromFile("none.json"), np.zeros(6, int), 2, 0),
            "data.partition.path: cannot read 'none.json' (No such file or directory)",
        ),
    ],
)
def test_a_mistake_is_named_with_its_key_and_what_is_allowed(build, message):
    with pytest.raises(UserError) as error:
        build()
    assert str(error.value) == message


def test_sizes_too_skewed_are_refused_with_an_alpha_that_works():
    with pytest.raises(
        UserError, match=r"data\.partition\.alpha: 0\.001 leaves .* the smallest alpha that worked is 0\.\d+"
    ):
        partition(QuantitySkew(0.001), np.zeros(1000, int), 16, 0)


def test_a_file_without_valid_json_is_reported(tmp_path, capsys):
    (tmp_path / "mine.json").write_text("[[0, 1")
    arguments = ["partition", "--data.private", "Digits", "--data.partition", "FromFile", "--data.partition.path"]
    assert main([*arguments, str(tmp_path / "mine.json")]) == 2
    said = capsys.readouterr().err
    assert "is not JSON" in said
    assert len(said.splitlines()) == 1
