"""Concat: images, labels and class names of its parts, in their order."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
import yaml

from lightning_idkd.config.parse import configure
from lightning_idkd.data import Concat, Digits, Glyphs, Noise, Source
from lightning_idkd.errors import UserError


@dataclass
class Plain(Source):
    """One image for each of ``labels``, of that grey value, with three channels if ``colour``."""

    names: tuple[str, ...]
    labels: tuple[int, ...]
    side: int = 4
    colour: bool = False

    def read(self, split, size, key):
        shape = (self.side, self.side, 3) if self.colour else (self.side, self.side)
        return self.names, (
            (np.full(shape, max(label, 0) + 100 * self.colour, np.uint8), label) for label in self.labels
        )


def load(*parts, split="train", size=None, channels=None):
    return Concat(list(parts)).load(split, size, channels, key="data.public")


def test_images_are_those_of_the_parts_in_their_order():
    parts = Glyphs(20), Noise("gaussian", 7), Digits(limit=5)
    joined, alone = load(*parts, size=8, channels=1), [part.load("train", 8, 1) for part in parts]
    assert torch.equal(joined.pixels, torch.cat([images.pixels for images in alone]))
    assert joined.pixels.shape == (32, 1, 8, 8)
    assert joined.stored == ", ".join(dict.fromkeys(images.stored for images in alone))


def test_classes_of_one_name_are_one_class_and_no_label_stays_none():
    joined = load(Plain(("cat", "dog"), (1, 0)), Plain((), (-1,)), Plain(("frog", "dog", "cat"), (0, 1, 2, -1)))
    assert joined.classes == ("cat", "dog", "frog")
    assert joined.labels.tolist() == [1, 0, -1, 2, 1, 0, -1]


def test_grey_images_beside_coloured_ones_have_three_equal_channels():
    joined = load(Plain(("a",), (0,)), Plain(("a", "b"), (1,), colour=True))
    assert joined.pixels.shape == (2, 3, 4, 4)
    assert joined.pixels[:, :, 0, 0].tolist() == [[0] * 3, [101] * 3]
    assert load(Plain(("a",), (0,)), Plain(("a",), (0,))).channels == 1


def test_every_part_gives_the_split_asked_for():
    assert len(load(Digits(), Digits(), split="test")) == 2 * len(Digits().load("test"))
    with pytest.raises(UserError, match=r"^data\.public\.parts\[1\]: Noise is a public set"):
        load(Digits(), Noise(), split="test")


@pytest.mark.parametrize(("parts", "said"), [
    ([], r"parts: \[\] given; allowed: one set or more"),
    ([Plain(("a",), (0,)), Plain(("a",), (0,), side=5)],
     r"parts: images differ in size \(4x4, 5x5\); set data\.image_size"),
    ([Noise(), Noise(samples=0)], r"parts\[1\]\.samples: 0 given"),
])  # fmt: skip
def test_what_does_not_go_together_is_refused(parts, said):
    with pytest.raises(UserError, match=rf"^data\.public\.{said}"):
        load(*parts)


def test_parts_are_named_in_a_config(tmp_path):
    parts = [{"class_path": "Glyphs", "init_args": {"samples": 9}}, {"class_path": "Noise"}]
    (tmp_path / "joined.yaml").write_text(
        yaml.safe_dump({"data": {"public": {"class_path": "Concat", "init_args": {"parts": parts}}}})
    )
    config = configure(["--data.private", "Digits", "--config", str(tmp_path / "joined.yaml")])
    assert config.data.public == Concat([Glyphs(9), Noise()])
