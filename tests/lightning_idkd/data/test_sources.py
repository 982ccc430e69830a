from __future__ import annotations

import errno
import io
import os
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from image_sets import pictures, png, write_parquet
from PIL import Image

from lightning_idkd.data.huggingface import HuggingFace
from lightning_idkd.data.images import Images
from lightning_idkd.data.samples import Remarks
from lightning_idkd.data.source import Source, Subset
from lightning_idkd.errors import UserError
from lightning_idkd.machine import cache_folder


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("IDKD_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("IDKD_DATA", raising=False)
    return tmp_path / "cache"


class Given(Subset):
    """Images handed over in memory."""

    def __init__(self, images, labels=None, classes=None, limit=None, name=None, only=None):
        super().__init__(limit=limit, classes=only)
        self.images, self.labels, self.names, self.name = images, labels, classes, name
        self.reads = 0

    def identity(self, split, size, key):
        return self.name

    def read(self, split, size, key):
        self.reads += 1
        return self.names, zip(self.images, self.labels or range(len(self.images)), strict=True)


# --- from encoded images to tensors


def test_colour_images_become_channels_first_and_keep_their_values():
    arrays = pictures(3)
    images = Given([png(a) for a in arrays], [2, 0, 1], ("a", "b", "c")).load("train")
    assert images.pixels.dtype == torch.uint8
    assert images.pixels.is_contiguous()
    assert np.array_equal(images.pixels.numpy(), arrays.transpose(0, 3, 1, 2))
    assert images.labels.dtype == torch.int64
    assert images.labels.tolist() == [2, 0, 1]
    assert (len(images), images.channels, images.size, images.classes) == (3, 3, 4, ("a", "b", "c"))


def test_arrays_and_files_of_the_same_picture_agree():
    arrays = list(pictures(2))
    assert torch.equal(Given(arrays).load("train").pixels, Given([png(a) for a in arrays]).load("train").pixels)


def test_more_images_than_a_block_stay_in_order():
    values = np.arange(2500) % 251
    images = Given([np.full((1, 1), v, np.uint8) for v in values]).load("train")
    assert images.pixels.flatten().tolist() == values.tolist()
    assert images.labels.tolist() == list(range(2500))


def test_grey_images_have_one_channel_unless_colour_is_asked_for_or_present():
    grey, colour = pictures(1)[0, :, :, 0], pictures(1)[0]
    assert Given([grey]).load("train").pixels.shape == (1, 1, 4, 4)
    bilevel = Image.fromarray(grey).convert("1")
    assert set(Given([png(bilevel)]).load("train").pixels.unique().tolist()) == {0, 255}
    assert Given([grey]).load("train", channels=3).pixels.shape == (1, 3, 4, 4)
    mixed = Given([grey, colour]).load("train").pixels.numpy()
    assert np.array_equal(mixed[0], np.stack([grey] * 3))
    assert np.array_equal(mixed[1], colour.transpose(2, 0, 1))


def test_one_channel_of_a_colour_image_is_its_luma():
    red, green = np.zeros((2, 2, 3), np.uint8), np.zeros((2, 2, 3), np.uint8)
    red[..., 0], green[..., 1] = 255, 255
    pixels = Given([red, green]).load("train", channels=1).pixels
    assert pixels[:, 0, 0, 0].tolist() == [76, 150]  # ITU-R 601: 0.299 and 0.587 of 255


@pytest.mark.parametrize("mode", ["P", "RGBA", "CMYK"])
def test_palette_transparent_and_cmyk_images_become_rgb(mode):
    red, file = Image.new("RGB", (2, 2), (255, 0, 0)), io.BytesIO()
    red.convert(mode).save(file, "tiff")
    assert Given([file.getvalue()]).load("train").pixels[0, :, 0, 0].tolist() == [255, 0, 0]


def test_a_palette_with_transparency_decodes_without_a_warning():
    palette = Image.new("RGB", (2, 2), (0, 255, 0)).convert("P")
    encoded = png(palette, transparency=bytes([0, 255, 128]))
    assert Given([encoded]).load("train").pixels[0, :, 0, 0].tolist() == [0, 255, 0]


def test_a_whole_ratio_averages_blocks():
    array = pictures(1, 8)[0]
    small = Given([array]).load("train", size=2).pixels[0].numpy()
    blocks = array.astype(float).reshape(2, 4, 2, 4, 3).mean((1, 3)).transpose(2, 0, 1)
    assert np.abs(small - blocks).max() <= 1  # Pillow rounds after rows and after columns


def test_another_ratio_is_resized_by_antialiased_bicubic():
    array = pictures(1, 8)[0, :, :, 0]
    got = Given([array]).load("train", size=5).pixels[0, 0].numpy()
    ratio = 8 / 5
    distance = (np.arange(8) + 0.5 - (np.arange(5)[:, None] + 0.5) * ratio) / ratio  # the kernel widens with the ratio
    x, a = np.abs(distance), -0.5
    near, far = (a + 2) * x**3 - (a + 3) * x**2 + 1, a * (x**3 - 5 * x**2 + 8 * x - 4)
    weights = np.where(x < 1, near, np.where(x < 2, far, 0))
    weights /= weights.sum(1, keepdims=True)
    rows = np.clip(np.rint(array @ weights.T), 0, 255)  # Pillow rounds between the two passes
    assert np.abs(got - np.clip(weights @ rows, 0, 255)).max() <= 1


def test_the_middle_square_is_taken():
    wide = np.zeros((4, 8), np.uint8)
    wide[:, 2:6] = 200
    for array in (wide, wide.T):
        assert Given([np.ascontiguousarray(array)]).load("train", size=4).pixels.unique().tolist() == [200]


def test_mixed_or_oblong_sizes_need_an_image_size():
    mixed = [pictures(1, 4)[0], pictures(1, 6)[0]]
    for images in (mixed, [np.zeros((4, 6), np.uint8)]):
        with pytest.raises(UserError, match=r"^data\.public: .*set data\.image_size"):
            Given(images).load("train", key="data.public")
    assert Given(mixed).load("train", size=4).size == 4


def test_a_photograph_is_turned_as_its_camera_says():
    array, exif, file = np.array([[0, 0], [255, 255]], np.uint8), Image.Exif(), io.BytesIO()
    exif[0x0112] = 3  # upside down
    Image.fromarray(array).save(file, "png", exif=exif)
    assert Given([file.getvalue()]).load("train").pixels[0, 0].tolist() == [[255, 255], [0, 0]]


def test_deep_broken_and_missing_images_are_refused():
    deep = png(np.full((2, 2), 40000, np.uint16))
    for images, said in (([deep], "more than 8 bits"), ([b"no image"], "cannot be decoded"), ([], "holds no images")):
        with pytest.raises(UserError, match=said):
            Given(images).load("train")


@pytest.mark.parametrize(("at", "n"), [(17, 20), (1500, 1600)])
def test_a_broken_image_is_named_by_its_number_or_path(at, n, tmp_path):
    images = [np.zeros((1, 1), np.uint8)] * n
    images[at] = b"no image"
    with pytest.raises(UserError, match=f"^data.public: image {at} of split 'train' cannot be decoded"):
        Given(images).load("train", key="data.public")
    images[at] = tmp_path / "broken.png"
    images[at].write_bytes(png(pictures(1, 64)[0])[:2000])
    with pytest.raises(UserError, match=f"^data.public: '{tmp_path}/broken.png' cannot be decoded"):
        Given(images).load("train", key="data.public")


def test_a_png_file_with_a_wrong_chunk_length_is_named():
    encoded = png(pictures(1, 64)[0])
    at = encoded.index(b"IDAT") - 4
    length = int.from_bytes(encoded[at : at + 4], "big")
    torn = encoded[:at] + (length // 2).to_bytes(4, "big") + encoded[at + 4 :]  # which Pillow calls a SyntaxError
    with pytest.raises(UserError, match=r"^data\.private: image 1 of split 'train' cannot be decoded: broken PNG"):
        Given([encoded, torn]).load("train")


def test_a_file_is_read_by_its_path(tmp_path):
    array = pictures(1)[0]
    (tmp_path / "one.png").write_bytes(png(array))
    assert np.array_equal(Given([tmp_path / "one.png"]).load("train").pixels[0].numpy(), array.transpose(2, 0, 1))


# --- metadata that are damaged while pixels are not


def chunked(encoded: bytes, kind: bytes, content: bytes, wrong: int = 0) -> bytes:
    """A PNG file with a further chunk after its head, whose checksum may be wrong."""
    body = kind + content
    chunk = len(content).to_bytes(4, "big") + body + (zlib.crc32(body) ^ wrong).to_bytes(4, "big")
    return encoded[:33] + chunk + encoded[33:]


def with_exif(array: np.ndarray, orientation: int) -> bytes:
    """A JPEG file with this orientation, and a white point that is a text where numbers belong."""
    fields = struct.pack(">HHIHH", 0x0112, 3, 1, orientation, 0) + struct.pack(">HHI4s", 0x013E, 2, 1, b"no\0\0")
    exif = b"Exif\0\0MM\0*" + struct.pack(">IH", 8, 2) + fields + bytes(4)
    file = io.BytesIO()
    Image.fromarray(array).save(file, "jpeg", quality=100, exif=exif)
    return file.getvalue()


ROTATED = {1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud, 5: np.transpose,
           6: lambda a: np.rot90(a, -1), 7: lambda a: np.rot90(a, 2).T, 8: np.rot90, 99: lambda a: a}  # fmt: skip


@pytest.mark.parametrize("orientation", ROTATED)
def test_a_damaged_exif_field_is_ignored_and_the_camera_still_turns_the_picture(orientation):
    array = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    images = Given([array, with_exif(array, orientation)], [0, 0], ("a",)).load("train")
    assert np.abs(images.pixels[1, 0].numpy().astype(int) - ROTATED[orientation](array)).max() <= 3  # JPEG
    if orientation in (1, 99):  # nothing to turn, so nothing is written anew
        return
    assert images.notes == (": damaged metadata, such as EXIF, is ignored in 1 of 2 train images",)


@pytest.mark.parametrize(("kind", "content", "wrong"), [
    (b"tEXt", b"k\0v", 1),
    (b"iCCP", b"name\0\0damaged", 1),
    (b"pHYs", b"ab", 0),
    (b"gAMA", b"", 0),
    (b"eXIf", b"MM\0*", 1),
    (b"zTXt", b"k\0\0" + zlib.compress(bytes(2**21)), 0),
])  # fmt: skip
def test_a_damaged_metadata_chunk_of_a_png_file_is_ignored(kind, content, wrong, tmp_path):
    array = pictures(1)[0]
    damaged = chunked(png(array), kind, content, wrong)
    (tmp_path / "1.png").write_bytes(damaged)
    for first in (damaged, tmp_path / "1.png"):
        images = Given([first, png(array), damaged]).load("train")
        assert all(np.array_equal(pixels, array.transpose(2, 0, 1)) for pixels in images.pixels.numpy())
        assert images.notes == (": damaged metadata, such as EXIF, is ignored in 2 of 3 train images",)
        assert images.stored == "4x4 RGB"


def test_a_transparent_palette_keeps_its_colours_without_its_metadata():
    palette = Image.new("RGB", (2, 2), (0, 255, 0)).convert("P")
    damaged = chunked(png(palette, transparency=bytes([0, 255, 128])), b"tEXt", b"k", 1)
    assert Given([damaged]).load("train").pixels[0, :, 0, 0].tolist() == [0, 255, 0]


@pytest.mark.parametrize("segment", [b"\xff\xe0\0\x07JFIF\0", b"\xff\xe2\0\x0eICC_PROFILE\0", b"\xff\xee\0\x08Adobe\0"])
@pytest.mark.parametrize("mode", ["RGB", "CMYK"])
def test_a_damaged_segment_of_a_jpeg_file_is_ignored(segment, mode):
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (200, 100, 0)).convert(mode).save(file, "jpeg", quality=100)
    whole, damaged = file.getvalue(), file.getvalue()[:2] + segment + file.getvalue()[2:]
    images = Given([whole, damaged]).load("train")
    assert torch.equal(*images.pixels)
    assert len(images.notes) == 1


def test_a_pixel_chunk_that_is_damaged_stays_an_error():
    encoded = png(pictures(1, 32)[0])
    at = encoded.index(b"IDAT") + 40
    torn = encoded[:at] + bytes([encoded[at] ^ 255]) + encoded[at + 1 :]
    for damaged in (torn, chunked(torn, b"tEXt", b"k", 1)):
        with pytest.raises(UserError, match=r"image 0 of split 'train' cannot be decoded"):
            Given([damaged]).load("train")


def test_warnings_while_decoding_are_counted_in_one_note(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 15)  # Pillow warns above, and raises above twice as many
    images = Given([png(a) for a in pictures(3)]).load("train")
    (note,) = images.notes
    assert note.startswith(": 3 warnings while decoding, the first: Image size (16 pixels) exceeds limit of 15 pixels")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 7)
    with pytest.raises(
        UserError, match=r"image 0 of split 'train' cannot be decoded: Image size \(16 pixels\) exceeds"
    ):
        Given([png(a) for a in pictures(3)]).load("train")


def test_notes_and_reasons_come_from_the_cache_too():
    given = Given([chunked(png(a), b"tEXt", b"k", 1) for a in pictures(2)], [7, -1], name="two")
    first, second = given.load("train"), given.load("train")
    assert given.reads == 1
    assert first.notes == second.notes
    assert len(first.notes) == 2
    assert (first.classes, first.labels.tolist()) == (second.classes, second.labels.tolist()) == (("7",), [0, -1])


def test_what_the_cache_cannot_know_is_read_again(cache):
    class Beside(Given):
        def read(self, split, size, key):
            return *super().read(split, size, key), Remarks(cacheable=False)

    given = Beside(list(pictures(2)), name="beside")
    for _ in range(2):
        given.load("train")
    assert given.reads == 2
    assert not cache.exists()


def test_stored_is_the_size_and_mode_of_the_first_image():
    grey, palette = np.zeros((6, 8), np.uint8), Image.new("P", (5, 5))
    for image, stored in ((pictures(1, 64)[0], "64x64 RGB"), (grey, "8x6 grey"), (png(palette), "5x5 P")):
        given = Given([image] * 3, [0, 1, 1], ("a", "b"), limit=1, name=stored, only=["b"])
        for _ in ("decoded", "from the cache"):
            assert given.load("train", size=4, channels=3).stored == stored


def test_a_source_of_ones_own_needs_to_read_alone(cache):
    class Own(Source):
        def read(self, split, size, key):
            return ("only",), [(array, 0) for array in pictures(3)]

    assert len(Own().load("test")) == 3
    assert not cache.exists()


@pytest.mark.parametrize(("limit", "size", "key"), [(0, None, "data.private.limit"), (None, 0, "data.image_size")])
def test_numbers_below_one_are_refused(limit, size, key):
    with pytest.raises(UserError, match=f"^{key}: 0 given; allowed: 1 or more"):
        Given(pictures(1), limit=limit).load("train", size=size)


def test_indexing_images_gives_a_subset():
    images = Images(torch.arange(4, dtype=torch.uint8).view(4, 1, 1, 1), torch.arange(4), tuple("abcd"))
    assert images[1:3].labels.tolist() == [1, 2]
    assert images[torch.tensor([3, 0])].pixels.flatten().tolist() == [3, 0]
    assert images[:2].classes == tuple("abcd")


# --- some of the classes


@pytest.mark.parametrize("split", ["train", "test"])
def test_classes_are_kept_in_the_sets_order_and_renumbered_in_the_order_asked_for(split):
    arrays = pictures(6)
    images = Given(arrays, [0, 1, 2, 2, 1, 0], ("ant", "bee", "cat"), only=["cat", "ant"]).load(split)
    assert np.array_equal(images.pixels.numpy(), arrays[[0, 2, 3, 5]].transpose(0, 3, 1, 2))
    assert (images.labels.tolist(), images.classes) == ([1, 0, 0, 1], ("cat", "ant"))


def test_an_image_without_a_label_is_in_none_of_the_classes():
    images = Given(pictures(3), [0, -1, 1], ("a", "b"), only=["a", "b"]).load("train")
    assert images.labels.tolist() == [0, 1]


def test_a_limit_counts_the_images_of_the_kept_classes():
    arrays, labels = pictures(300), [0, 1, 2] * 100
    both = Given(arrays, labels, ("a", "b", "c"), limit=20, only=["b"])
    alone = Given(arrays[1::3], [0] * 100, ("b",), limit=20).load("train")
    assert torch.equal(both.load("train").pixels, alone.pixels)
    assert both.load("train").labels.tolist() == [0] * 20
    assert len(both.load("test")) == 100


def test_all_selections_of_classes_share_one_cache_file(cache):
    arrays, labels = pictures(4), [0, 1, 0, 1]
    Given(arrays, labels, ("a", "b"), name="two", only=["b"]).load("train")
    assert Given(None, name="two", only=["b", "a"]).load("train").labels.tolist() == [1, 0, 1, 0]
    assert len(list(cache.iterdir())) == 1


@pytest.mark.parametrize(
    ("names", "only", "said"),
    [
        (
            ("airplane", "ship"),
            ["shop"],
            r"this set has no class 'shop'\. Did you mean 'ship'\? It has: airplane, ship$",
        ),
        (("airplane", "ship"), ["ship", "ship"], r"ship, ship: a class is named twice$"),
        (("airplane", "ship"), [], r"\[\] given; allowed: one class or more, or null for all$"),
        (("airplane", "ship", "void"), ["void"], r"split 'train' has no images of void$"),
        (tuple(map(str, range(30))), ["x"], r".* It has: 0, 1, .* 19, \.\.\.$"),
        ((), ["ship"], r"this set has no class 'ship'\. It has: no labels$"),
    ],
)
def test_classes_that_are_not_there_are_named(names, only, said):
    given = Given(pictures(2), [0, 1] if names else [-1, -1], names, only=only)
    with pytest.raises(UserError, match=rf"^data\.private\.classes: {said}"):
        given.load("train")


# --- the cache


def test_a_second_load_comes_from_the_cache_and_is_equal():
    given = Given(list(pictures(5)), classes=tuple("abcde"), name="five")
    first, second = given.load("train"), given.load("train")
    assert given.reads == 1
    assert torch.equal(first.pixels, second.pixels)
    assert torch.equal(first.labels, second.labels)
    assert first.classes == second.classes


def test_split_size_and_channels_are_cached_apart():
    given = Given(list(pictures(2)), name="five")
    for kwargs in ({}, {"size": 2}, {"channels": 1}):
        given.load("train", **kwargs)
    assert (given.reads, given.load("train", size=2).size, given.load("train", channels=1).channels) == (3, 2, 1)
    given.load("test")
    assert given.reads == 4


def test_a_limit_chooses_from_all_over_the_set_in_its_order_and_grows_by_adding():
    arrays = pictures(200)
    few, more = (Given(list(arrays), list(range(200)), limit=n).load("train") for n in (20, 60))
    chosen = few.labels.tolist()
    assert np.array_equal(few.pixels.numpy(), arrays[chosen].transpose(0, 3, 1, 2))
    assert chosen == sorted(set(chosen))
    assert chosen[-1] > 100
    assert set(chosen) < set(more.labels.tolist())
    assert len(Given(list(arrays), limit=20).load("test")) == 200


def test_limit_is_applied_after_the_cache():
    Given(list(pictures(5)), name="five", limit=2).load("train")
    assert len(Given(None, name="five").load("train")) == 5  # None: reading again would fail


def test_writing_to_loaded_images_leaves_the_cache_alone():
    given = Given(list(pictures(2)), name="two")
    before = given.load("train").pixels.clone()
    given.load("train").pixels.zero_()
    assert torch.equal(given.load("train").pixels, before)


@pytest.mark.parametrize("damage", [lambda b: b"", lambda b: b[: len(b) // 2], lambda b: b"\0" * len(b)])
def test_a_torn_cache_file_is_built_anew(cache, damage):
    given = Given(list(pictures(2)), name="two")
    whole = given.load("train").pixels.clone()
    (file,) = cache.iterdir()
    file.write_bytes(damage(file.read_bytes()))
    assert torch.equal(given.load("train").pixels, whole)
    assert given.reads == 2
    given.load("train")
    assert given.reads == 2


def test_a_damaged_cache_file_is_built_anew_with_one_warning(cache, caplog):
    """A flipped bit of a pixel is nothing that torch notices."""
    given = Given(list(pictures(2)), name="two")
    whole = given.load("train").pixels.clone()
    (file,) = cache.iterdir()
    content = bytearray(file.read_bytes())
    content[content.index(whole.numpy().tobytes())] ^= 1
    file.unlink()  # the first set still maps it
    file.write_bytes(content)
    for _ in range(2):
        assert torch.equal(given.load("train").pixels, whole)
    assert given.reads == 2
    assert [r.message for r in caplog.records] == [f"the decoded samples in '{file}' are damaged; decoding them again"]


def test_a_cache_file_from_before_checksums_is_built_anew_without_a_word(cache, caplog):
    given = Given(list(pictures(2)), name="two")
    whole = given.load("train").pixels.clone()
    (file,) = cache.iterdir()
    torch.save(torch.load(file, weights_only=True), file)
    for _ in range(2):
        assert torch.equal(given.load("train").pixels, whole)
    assert given.reads == 2
    assert not caplog.records


def test_a_full_disk_of_the_cache_is_one_warning_and_the_set_is_used(cache, monkeypatch, caplog):
    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    assert len(Given(list(pictures(2)), name="two").load("train")) == 2
    (record,) = caplog.records
    said = f"decoded samples are not kept for the next run: cannot write to {cache} (No space left on device); "
    assert record.message == f"{said}set IDKD_CACHE to another folder"
    assert not list(cache.iterdir())


def test_what_a_killed_process_left_in_the_cache_goes_after_an_hour(cache):
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    cache.mkdir()
    for name, seconds in (("old", 3700), ("young", 3500)):
        part = cache / f".{name}.pt.{process.pid}-0123abcd.part"
        part.write_text("half")
        os.utime(part, (time.time() - seconds,) * 2)
    Given(list(pictures(2)), name="two").load("train")
    assert [part.name.split(".")[1] for part in cache.glob(".*.part")] == ["young"]


def test_nothing_but_the_finished_file_is_left(cache, monkeypatch):
    Given(list(pictures(2)), name="two").load("train")
    assert [f.suffix for f in cache.iterdir()] == [".pt"]

    def full(*args):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert len(Given(list(pictures(3)), name="three").load("train")) == 3
    assert len(list(cache.iterdir())) == 1


def test_a_cache_folder_that_cannot_be_written_is_one_warning(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("IDKD_CACHE", str(tmp_path / "file" / "cache"))
    assert len(Given(list(pictures(2)), name="two").load("train")) == 2
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "IDKD_CACHE" in record.message
    assert "\n" not in record.message


def test_the_cache_folder_follows_the_environment(monkeypatch):
    assert cache_folder() == Path(os.environ["IDKD_CACHE"])
    monkeypatch.delenv("IDKD_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache_folder() == Path("/x/lightning_idkd")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "lightning_idkd"


# --- Hugging Face folders


def test_a_folder_of_parquet_files_is_read_in_order_with_its_class_names(tmp_path):
    arrays = pictures(5)
    write_parquet(tmp_path / "set" / "train-00001-of-00002.parquet", arrays[3:], [1, 0], names=["cat", "dog"])
    write_parquet(tmp_path / "set" / "train-00000-of-00002.parquet", arrays[:3], [0, 1, 1], names=["cat", "dog"])
    images = HuggingFace(str(tmp_path / "set")).load("train")
    assert np.array_equal(images.pixels.numpy(), arrays.transpose(0, 3, 1, 2))
    assert (images.labels.tolist(), images.classes) == ([0, 1, 1, 1, 0], ("cat", "dog"))
    assert len(HuggingFace(str(tmp_path / "set"), limit=4).load("train")) == 4


def test_validation_stands_in_for_a_missing_test_split(tmp_path):
    write_parquet(tmp_path / "data" / "validation-0.parquet", pictures(2), [0, 1])
    assert len(HuggingFace(str(tmp_path)).load("test")) == 2
    write_parquet(tmp_path / "data" / "test-0.parquet", pictures(3), [0, 1, 0])
    assert len(HuggingFace(str(tmp_path)).load("test")) == 3


def test_a_changed_file_of_the_same_size_is_read_again(tmp_path):
    file, sizes = tmp_path / "train-0.parquet", []
    for labels in ([0, 1], [1, 0]):
        write_parquet(file, pictures(2), labels)
        os.utime(file, ns=(len(sizes), len(sizes)))
        sizes.append(file.stat().st_size)
        assert HuggingFace(str(tmp_path)).load("train").labels.tolist() == labels
    assert sizes[0] == sizes[1]


def test_columns_of_any_name_are_found_by_their_type(tmp_path):
    write_parquet(tmp_path / "train-0.parquet", pictures(2), [1, 0], image="img", label="kind", names=["a", "b"])
    assert HuggingFace(str(tmp_path)).load("train").labels.tolist() == [1, 0]


def test_label_is_preferred_to_fine_label_and_that_to_others(tmp_path):
    import datasets

    labels = {"coarse_label": [0, 0], "fine_label": [0, 1], "other": [1, 1]}
    kinds = {"img": datasets.Image(), **{k: datasets.ClassLabel(names=["a", "b"]) for k in labels}}
    for extra, wanted in (({}, [0, 1]), ({"label": [1, 0]}, [1, 0])):
        folder = tmp_path / str(len(extra))
        folder.mkdir()
        columns = {"img": [{"bytes": png(a), "path": None} for a in pictures(2)], **labels, **extra}
        types = datasets.Features(kinds | {k: datasets.Value("int64") for k in extra})
        pq.write_table(pa.table(columns).cast(types.arrow_schema), folder / "train-0.parquet")
        assert HuggingFace(str(folder)).load("train").labels.tolist() == wanted
        assert HuggingFace(str(folder), label="other").load("train").labels.tolist() == [1, 1]


def test_a_plain_schema_works_and_numbers_name_the_classes(tmp_path):
    write_parquet(tmp_path / "train-0.parquet", pictures(3), [0, 2, 1], features=False)
    images = HuggingFace(str(tmp_path)).load("train")
    assert (images.labels.tolist(), images.classes) == ([0, 2, 1], ("0", "1", "2"))


def test_images_stored_beside_the_table_are_read(tmp_path):
    (tmp_path / "one.png").write_bytes(png(pictures(1)[0]))
    table = pa.table({"image": [{"bytes": None, "path": str(tmp_path / "one.png")}], "label": [0]})
    types = pa.schema([("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])), ("label", pa.int64())])
    pq.write_table(table.cast(types), tmp_path / "train-0.parquet")
    assert np.array_equal(HuggingFace(str(tmp_path)).load("train").pixels[0].numpy(), pictures(1)[0].transpose(2, 0, 1))


def test_a_set_without_labels_has_no_classes(tmp_path):
    write_parquet(tmp_path / "train-0.parquet", pictures(2))
    images = HuggingFace(str(tmp_path)).load("train", key="data.public")
    assert (images.labels.tolist(), images.classes) == ([-1, -1], ())


def test_the_data_folder_of_the_environment_is_searched_by_the_last_part_of_the_name(tmp_path, monkeypatch):
    monkeypatch.setenv("IDKD_DATA", str(tmp_path))
    for size in (8, 16, 32):
        write_parquet(tmp_path / f"tiny-{size}" / "train-0.parquet", pictures(1, size), [0])
    assert HuggingFace("somebody/tiny").load("train").size == 32
    chosen = {size: HuggingFace("somebody/tiny")._folder(size).name for size in (4, 8, 9, 16, 64)}
    assert chosen == {4: "tiny-8", 8: "tiny-8", 9: "tiny-16", 16: "tiny-16", 64: "tiny-32"}
    write_parquet(tmp_path / "tiny" / "train-0.parquet", pictures(1, 4), [0])
    assert HuggingFace("somebody/tiny").load("train").size == 4
    write_parquet(tmp_path / "elsewhere" / "tiny" / "train-0.parquet", pictures(1, 2), [0])
    assert HuggingFace(str(tmp_path / "elsewhere" / "tiny")).load("train").size == 2


def test_a_missing_data_folder_of_the_environment_is_reported(tmp_path, monkeypatch):
    monkeypatch.setenv("IDKD_DATA", str(tmp_path / "dta"))
    with pytest.raises(UserError, match=r"IDKD_DATA: '.*dta' is not a folder, so it cannot hold 'uoft-cs/cifar100'"):
        HuggingFace("uoft-cs/cifar100").load("train")


@pytest.mark.parametrize(
    ("write", "given", "said"),
    [
        ({"image": "x", "features": False}, {"image": "y"}, r"data\.private\.image: 'y' is not a column"),
        ({}, {"label": "labl"}, r"data\.private\.label: 'labl' is not a column .* Did you mean 'label'\?"),
    ],
)
def test_wrong_columns_are_named(tmp_path, write, given, said):
    write_parquet(tmp_path / "train-0.parquet", pictures(2), **{"labels": [0, 1], **write})
    with pytest.raises(UserError, match=said):
        HuggingFace(str(tmp_path), **given).load("train")


def test_tables_without_images_labels_or_train_files_are_refused_with_what_is_there(tmp_path):
    (tmp_path / "a").mkdir()
    pq.write_table(pa.table({"text": ["x"], "label": [0]}), tmp_path / "a" / "train-0.parquet")
    with pytest.raises(UserError, match=r"data\.private\.path: .* holds no images; columns: text, label"):
        HuggingFace(str(tmp_path / "a")).load("train")
    with pytest.raises(UserError, match=r"data\.private\.path: no test images in .* test-\*\.parquet"):
        HuggingFace(str(tmp_path / "a")).load("test")
    (tmp_path / "a" / "train-0.parquet").write_bytes(b"torn")
    with pytest.raises(UserError, match=r"data\.private\.path: .* cannot be read: "):
        HuggingFace(str(tmp_path / "a")).load("train")


# --- the hub


def test_without_a_network_missing_data_are_explained_at_once(monkeypatch, tmp_path):
    import huggingface_hub

    def unreachable(*args, **kwargs):
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", unreachable)
    monkeypatch.setenv("IDKD_DATA", str(tmp_path))
    (tmp_path / "cifar10").mkdir()
    start = time.perf_counter()
    with pytest.raises(UserError) as error:
        HuggingFace("uoft-cs/cifar100").load("train")
    assert time.perf_counter() - start < 5
    first, second = str(error.value).splitlines()
    assert first == (
        "data.private.path: 'uoft-cs/cifar100' is neither a folder nor reachable on the Hugging Face hub (offline?)."
    )
    assert "set data.private.path to it, or set IDKD_DATA to a folder that holds 'cifar100/'." in second
    assert "Did you mean 'cifar10'?" in second


def test_a_hub_set_is_streamed_once_and_then_needs_no_network(monkeypatch):
    import datasets
    import huggingface_hub

    def rows():
        yield from ({"img": {"bytes": png(a), "path": None}, "fine_label": i} for i, a in enumerate(pictures(3)))

    kinds = datasets.Features({"img": datasets.Image(), "fine_label": datasets.ClassLabel(names=["a", "b", "c"])})
    stream = datasets.IterableDataset.from_generator(rows, features=kinds)
    calls = []

    def load_dataset(path, *, streaming):
        calls.append((path, streaming))
        return datasets.IterableDatasetDict({"train": stream, "valid": stream})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *args, **kwargs: None)
    for split in ("train", "test", "train", "test"):
        images = HuggingFace("somebody/some").load(split)
        assert np.array_equal(images.pixels.numpy(), pictures(3).transpose(0, 3, 1, 2))
        assert (images.labels.tolist(), images.classes) == ([0, 1, 2], ("a", "b", "c"))
    assert calls == [("somebody/some", True)] * 2


@pytest.fixture
def hub(monkeypatch):
    """A hub that serves what a test gives it: rows of some splits, or an error."""
    import datasets
    import huggingface_hub

    served = {}

    def load_dataset(path, *name, streaming):
        if isinstance(served["rows"], Exception):
            raise served["rows"]
        served["name"] = name
        kinds = datasets.Features({"img": datasets.Image(), "kind": datasets.Value(served.get("type", "int64"))})
        rows = served["rows"]
        splits = {
            split: datasets.IterableDataset.from_generator(lambda: rows(), features=kinds) for split in served["splits"]
        }
        return datasets.IterableDatasetDict(splits)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *args, **kwargs: None)
    return served


def hub_rows(labels, path=None):
    def rows():
        for array, label in zip(pictures(len(labels)), labels, strict=True):
            yield {"img": {"bytes": None if path else png(array), "path": path}, "kind": label}

    return rows


def test_splits_and_configuration_of_a_hub_set_are_chosen_by_keys(hub):
    hub |= {"rows": hub_rows([3, 1]), "splits": ("unlabeled", "dev")}
    with pytest.raises(UserError, match=r"its splits: unlabeled, dev \(data\.private\.train_split chooses one\)$"):
        HuggingFace("somebody/some").load("train")
    images = HuggingFace("somebody/some", label="kind", train_split="unlabeled", config_name="small").load("train")
    assert (images.labels.tolist(), images.classes, hub["name"]) == ([1, 0], ("1", "3"), ("small",))
    assert len(HuggingFace("somebody/some", test_split="dev").load("test")) == 2


def test_several_configurations_of_a_hub_set_are_named_with_their_key(hub):
    hub["rows"] = ValueError(
        "Config name is missing.\nPlease pick one among the available configs: ['coarse', 'fine']\nExample"
    )
    with pytest.raises(
        UserError, match=r"^data\.private\.config_name: 'somebody/some' .*; set it to one of coarse, fine$"
    ):
        HuggingFace("somebody/some").load("train")


def test_an_error_while_rows_of_the_hub_are_read_is_a_sentence(hub):
    def breaks():
        yield from hub_rows([0])()
        raise ConnectionResetError("reset by peer")

    hub |= {"rows": breaks, "splits": ("train",)}
    with pytest.raises(UserError, match=r"^data\.private\.path: 'somebody/some' cannot be read: .*"):
        HuggingFace("somebody/some", label="kind").load("train")


def test_a_hub_set_never_reads_a_file_of_this_machine(hub, tmp_path):
    (tmp_path / "1.png").write_bytes(png(pictures(1)[0]))
    hub |= {"rows": hub_rows([0], str(tmp_path / "1.png")), "splits": ("train",)}
    with pytest.raises(UserError, match=r"names the image '.*1\.png', which is not on the hub$"):
        HuggingFace("somebody/some", label="kind").load("train")


def test_a_hub_set_without_sound_labels_does_as_a_public_set(hub):
    hub |= {"rows": hub_rows([0.5, 1.0]), "splits": ("train",), "type": "float64"}
    images = HuggingFace("somebody/some", label="kind").load("train", key="data.public")
    assert images.labels.tolist() == [-1, 0]
    assert images.unlabelled == ".label: 'somebody/some' holds 0.5; allowed: integers or texts"


# --- configs


def test_sources_are_configured_by_class_path_and_import_nothing_heavy():
    code = """
import sys
from jsonargparse import ArgumentParser
from lightning_idkd.data import Source
parser = ArgumentParser(exit_on_error=False)
parser.add_argument("--source", type=Source)
sources = {
    "HuggingFace": {"path": "x", "limit": 3, "classes": ["a", "b"]},
    "ImageFolder": {"path": "x"},
    "Torchvision": {"name": "svhn"},
    "Digits": {"classes": ["3", "8"]},
    "Glyphs": {"samples": 9},
    "Noise": {"kind": "gaussian"},
}
for name, init in sources.items():
    cfg = parser.parse_object({"source": {"class_path": f"lightning_idkd.data.{name}", "init_args": init}})
    assert vars(parser.instantiate_classes(cfg).source).items() >= init.items()
heavy = {"torch", "torchvision", "datasets", "sklearn", "matplotlib", "lightning"} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


# --- real data


@pytest.mark.data
@pytest.mark.skipif("IDKD_DATA" not in os.environ, reason="IDKD_DATA is not set")
class TestRealData:
    root = os.environ.get("IDKD_DATA", "")

    @pytest.fixture(autouse=True)
    def _real(self, monkeypatch):
        monkeypatch.setenv("IDKD_DATA", self.root)

    def test_cifar10_has_the_known_counts_and_channel_means(self):
        images = HuggingFace("uoft-cs/cifar10").load("test")
        assert images.pixels.shape == (10000, 3, 32, 32)
        assert images.labels.bincount().tolist() == [1000] * 10
        assert images.classes[:2] == ("airplane", "automobile")
        means = images.pixels.float().mean((0, 2, 3)) / 255  # of the original test files: 0.4942 0.4851 0.4504
        assert torch.allclose(means, torch.tensor([0.4942, 0.4851, 0.4504]), atol=5e-4)

    def test_a_public_set_without_test_files_says_so(self):
        with pytest.raises(UserError, match="no test images in 'tiny-imagenet'"):
            HuggingFace("tiny-imagenet").load("test", size=32)
