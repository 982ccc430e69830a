"""Which images and classes a set has, and how two sets are told apart."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np
import pytest
import torch

from lightning_idkd.data import Concat, Digits, Images, identity
from lightning_idkd.errors import UserError


def images(labels=(0, 1, 2, 1), classes=("a", "b", "c"), seed=0, **more):
    pixels = torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (len(labels), 1, 2, 2)).astype(np.uint8))
    return Images(pixels, torch.tensor(labels), classes, "2x2 grey", **more)


def test_the_identity_is_the_sha_256_of_pixels_and_of_labels_with_names():
    found = images().identity
    content = np.random.default_rng(0).integers(0, 256, (4, 1, 2, 2)).astype(np.uint8).tobytes()
    assert found["pixels"] == hashlib.sha256(content).hexdigest()
    numbers = b"".join(label.to_bytes(8, "little") for label in (0, 1, 2, 1))
    assert found["labels"] == hashlib.sha256(b"a\0b\0c" + numbers).hexdigest()
    assert (found["images"], found["channels"], found["size"], found["stored"]) == (4, 1, 2, "2x2 grey")


def test_identity_does_not_depend_on_the_layout_in_memory():
    one = images()
    transposed = one.pixels.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1)
    assert not transposed.is_contiguous()
    assert replace(one, values=transposed).identity == one.identity


@pytest.mark.parametrize(("other", "said"), [
    (images(), None),
    (images(seed=1), "other pixels, or the same in another order"),
    (images()[[1, 0, 2, 3]], "other pixels, or the same in another order"),
    (images((0, 1, 2, 2)), "other labels, or the same in another order"),
    (images(classes=("a", "b", "d")), "other labels, or the same in another order"),
    (images()[:3], "3 images, not 4"),
    (replace(images(), values=torch.zeros(4, 3, 2, 2, dtype=torch.uint8)), "3x2x2, not 1x2x2"),
])  # fmt: skip
def test_a_change_is_described(other, said):
    assert identity.describe_change(other.identity, images().identity) == said


def test_an_unknown_set_is_like_any():
    assert identity.describe_change(None, images().identity) is None
    assert identity.describe_change(images().identity, None) is None


def test_only_the_sets_that_count_are_compared_and_the_public_one_without_its_labels():
    before = identity.record(images(), images(), images())
    relabelled = identity.record(images(), images(), images((1, 1, 1, 1), ("x", "y")))
    identity.check(relabelled, before, ("train", "test", "public"), "runs/x")
    now = identity.record(images(), images(seed=2), images(seed=3))
    identity.check(now, before, ("train",), "runs/x")
    identity.check(now, None, ("train", "test"), "runs/x")
    for name, key in (("test", "data.private: the test images"), ("public", "data.public: the images")):
        with pytest.raises(
            UserError, match=rf"^{key} are not those of 'runs/x' \(other pixels, .*\); its files have changed$"
        ):
            identity.check(now, before, ("train", name), "runs/x")


def test_labels_go_by_name():
    one = images((0, 1, 2, -1))
    other = one.renumber(("c", "a", "x", "b"))
    assert (other.labels.tolist(), other.classes) == ([1, 3, 0, -1], ("c", "a", "x", "b"))
    assert other.renumber(one.classes).identity == one.identity
    assert one.renumber(one.classes) is one


def test_a_test_part_may_lack_classes_but_has_no_others():
    test = images((0, 1), ("c", "a"))
    assert identity.renumber(test, ("a", "b", "c"), "the test part").labels.tolist() == [2, 0]
    unused = images((0, 0), ("c", "x"))
    assert identity.renumber(unused, ("a", "b", "c"), "the test part").labels.tolist() == [2, 2]
    with pytest.raises(
        UserError, match=r"^the test part has classes that are not trained on: x and lacks a; trained on: a, c$"
    ):
        identity.renumber(images((0, 1), ("c", "x")), ("a", "c"), "the test part")


def test_a_set_of_several_keeps_their_notes_and_reasons():
    class Odd(Digits):
        def load(self, *arguments, **options):
            return replace(super().load(*arguments, **options), notes=(": odd",), unlabelled=".label: why")

    parts = Concat([Digits(limit=3), Odd(limit=3)]).load("train")
    assert parts.notes == (".parts[1]: odd",)
    assert parts.unlabelled == ".parts[1].label: why"
