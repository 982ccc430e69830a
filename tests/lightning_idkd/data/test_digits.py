from __future__ import annotations

import time

import numpy as np
import pytest
import torch

from lightning_idkd.data import digits
from lightning_idkd.data.digits import CHARACTERS, Digits, Glyphs
from lightning_idkd.errors import UserError


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("IDKD_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def glyphs():
    classes, samples = Glyphs(1800).read("train", None, "data.public")
    pixels, labels = zip(*samples, strict=True)
    assert classes == tuple(CHARACTERS)
    return np.stack(pixels), np.array(labels)


def flat(pixels):
    return np.asarray(pixels).reshape(len(pixels), 64) / 255


def test_digits_are_those_of_scikit_learn_each_in_exactly_one_split():
    from sklearn.datasets import load_digits

    train, test = Digits().load("train"), Digits().load("test")
    images = torch.cat([train.pixels, test.pixels]).flatten(1).int().tolist()
    labels = torch.cat([train.labels, test.labels]).tolist()
    stored = load_digits()
    ink = [[int(v * 255 / 16 + 0.5) for v in image] for image in stored.data]  # ink of 8 is 127.5 and rounds to 128
    assert sorted(zip(images, labels, strict=True)) == sorted(zip(ink, stored.target.tolist(), strict=True))
    assert (train.pixels.shape[1:], train.channels, train.size) == ((1, 8, 8), 1, 8)
    assert train.classes == tuple("0123456789")


def test_a_fifth_of_every_digit_is_for_testing():
    train, test = Digits().load("train").labels.bincount(), Digits().load("test").labels.bincount()
    assert torch.all((test - 0.2 * (train + test)).abs() <= 0.5)


def test_limit_takes_some_training_digits_of_all_classes_and_all_test_digits():
    few, test = Digits(limit=100).load("train"), Digits(limit=100).load("test")
    assert len(few) == 100
    assert len(test) == len(Digits().load("test"))
    assert few.labels.bincount().min() >= 3


def test_some_digits_alone_are_renumbered():
    threes, eights = (Digits(classes=[name]).load("test").pixels for name in "38")
    both = Digits(classes=["8", "3"], limit=20).load("test")
    assert both.classes == ("8", "3")
    assert torch.equal(both.pixels[both.labels == 0], eights)
    assert torch.equal(both.pixels[both.labels == 1], threes)
    with pytest.raises(UserError, match=r"^data\.private\.classes: this set has no class 'eight'\. It has: 0, 1, "):
        Digits(classes=["eight"]).load("train")


def test_glyphs_are_a_third_digits_letters_and_signs(glyphs):
    names = np.array(list(CHARACTERS))[glyphs[1]]
    thirds = [sum(map(test, names)) for test in (str.isdigit, str.isalpha, lambda c: not c.isalnum())]
    assert thirds == [600, 600, 600]
    assert set(names) == set(CHARACTERS)


def test_glyph_images_do_not_depend_on_how_many_there_are(glyphs):
    some = Glyphs(120).load("train", key="data.public")
    assert np.array_equal(some.pixels[:, 0].numpy(), glyphs[0][:120])
    assert np.array_equal(some.labels.numpy(), glyphs[1][:120])


def test_every_glyph_is_bright_ink_on_black(glyphs):
    assert glyphs[0].max(axis=(1, 2)).min() > 60
    assert np.median(glyphs[0][:, :, 0]) == 0
    assert (glyphs[0] == 0).mean() > 0.3


def test_printed_digits_look_like_handwritten_ones(glyphs):
    from sklearn.neighbors import KNeighborsClassifier

    handwritten, printed = Digits().load("train"), glyphs[1] < 10
    assert abs(glyphs[0][printed].mean() - handwritten.pixels.float().mean().item()) < 15
    model = KNeighborsClassifier(3).fit(flat(handwritten.pixels), handwritten.labels)
    assert 0.6 < model.score(flat(glyphs[0][printed]), glyphs[1][printed]) < 0.95


def test_fonts_have_every_character():
    from pathlib import Path

    import matplotlib
    from matplotlib.ft2font import FT2Font

    for name in digits.FONTS:
        font = FT2Font(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf"))
        assert all(font.get_char_index(ord(c)) for c in CHARACTERS), name


def test_six_thousand_glyphs_take_a_few_seconds():
    start = time.process_time()
    assert len(Glyphs().load("train", key="data.public")) == 6000
    assert time.process_time() - start < 6  # 2 s on a 2-core machine


def test_glyphs_have_no_test_split():
    with pytest.raises(UserError, match=r"^data\.private: Glyphs is a public set"):
        Glyphs().load("test", key="data.private")


def test_what_is_skipped_is_what_another_source_has_by_its_limit():
    few, others, some = (
        Digits(**part).load("train") for part in ({"limit": 100}, {"skip": 100}, {"skip": 100, "limit": 50})
    )
    of = [
        {image.tobytes() for image in images.pixels.numpy()} for images in (few, others, some, Digits().load("train"))
    ]
    assert (len(few), len(others), len(some)) == (100, 1338, 50)
    assert not of[0] & of[1]
    assert of[0] | of[1] == of[3]
    assert of[2] < of[1]
    assert len(Digits(skip=100).load("test")) == len(Digits().load("test"))
    with pytest.raises(UserError, match=r"^data\.public\.skip: 1438 given; allowed: below 1438, the number of images$"):
        Digits(skip=1438).load("train", key="data.public")


@pytest.mark.parametrize(("source", "key"), [(Glyphs(samples=0), "samples"), (Glyphs(limit=0), "limit")])
def test_numbers_of_glyphs_below_one_are_refused(source, key):
    with pytest.raises(UserError, match=rf"^data\.public\.{key}: 0 given; allowed: 1 or more"):
        source.load("train", key="data.public")
