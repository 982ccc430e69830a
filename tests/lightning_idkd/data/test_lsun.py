"""LSUN's databases, made here from a few pictures."""

from __future__ import annotations

import io

import lmdb
import numpy as np
import pytest
from PIL import Image

from lightning_idkd.data import LSUN
from lightning_idkd.errors import UserError

PIXELS = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), np.uint8)


def write(root, category, pictures, part="val"):
    with (
        lmdb.open(str(root / f"{category}_{part}_lmdb"), map_size=1 << 20) as database,
        database.begin(write=True) as writing,
    ):
        for i, picture in enumerate(pictures):
            writing.put(f"{i:04}".encode(), picture)


def encoded(array) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "webp", lossless=True)  # LSUN's images are webp
    return buffer.getvalue()


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("IDKD_CACHE", str(tmp_path / "cache"))
    write(tmp_path, "tower", [encoded(PIXELS[2])])
    write(tmp_path, "bedroom", [encoded(PIXELS[0]), encoded(PIXELS[1])])
    return tmp_path


def test_every_category_below_the_folder_is_read(root):
    for _ in range(2):  # the second time from the cache
        images = LSUN(str(root)).load("train", 8, key="data.public")
        assert (images.classes, images.labels.tolist()) == (("bedroom", "tower"), [0, 0, 1])
        assert np.array_equal(images.pixels.numpy(), PIXELS.transpose(0, 3, 1, 2))
    write(root, "bridge", [encoded(PIXELS[1])], "train")
    assert LSUN(str(root), "train").load("train", 8).classes == ("bridge",)


@pytest.mark.parametrize(
    ("path", "part", "split", "said"),
    [
        (".", "val", "test", r"^data\.public: LSUN has no labelled test part, so it can be a public set only"),
        (".", "validation", "train", r"^data\.public\.part: 'validation' given; allowed: val, train"),
        ("cache", "val", "train", r"^data\.public\.path: '.*cache' holds no CATEGORY_val_lmdb/data\.mdb"),
    ],
)
def test_wrong_use_is_explained(root, path, part, split, said):
    with pytest.raises(UserError, match=said):
        LSUN(str(root / path), part).load(split, 8, key="data.public")


def test_broken_files_are_named(root):
    write(root, "tower", [b"no image"])
    with pytest.raises(UserError, match=r"^data\.public: image 2 of split 'train' cannot be decoded"):
        LSUN(str(root)).load("train", 8, key="data.public")
    (root / "tower_val_lmdb" / "data.mdb").write_bytes(b"no database")
    with pytest.raises(UserError, match=r"^data\.public\.path: '.*tower_val_lmdb' cannot be read"):
        LSUN(str(root)).load("train", 8, key="data.public")
