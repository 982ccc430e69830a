"""Image files in folders: what is found, how it is labelled, and what is refused."""

from __future__ import annotations

import os

import numpy as np
import pytest
from PIL import Image

from lightning_idkd.config.parse import configure
from lightning_idkd.data.folder import ImageFolder
from lightning_idkd.errors import UserError


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("IDKD_CACHE", str(tmp_path_factory.mktemp("cache")))


def write(root, *names):
    """A 4x4 image of one grey level a name; the levels 1, 2, ... tell which file an image came from."""
    for level, name in enumerate(names, 1):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4), level).save(root / name, lossless=True)


def levels(images):
    return images.pixels[:, 0, 0, 0].tolist()


def load(root, split="train", key="data.private", **arguments):
    return ImageFolder(str(root), **arguments).load(split, key=key)


def test_classes_and_files_are_in_sorted_order(tmp_path):
    write(
        tmp_path, "train/dog/b.png", "train/cat/2.png", "train/dog/a.bmp", "train/cat/10.PNG", "train/ant/deep/er.tif"
    )
    write(tmp_path, "test/dog/x.png", "test/cat/x.png", "test/ant/x.png")
    train, test = load(tmp_path), load(tmp_path, "test")
    assert train.classes == ("ant", "cat", "dog")
    assert (train.labels.tolist(), levels(train)) == ([0, 1, 1, 2, 2], [5, 4, 2, 3, 1])
    assert (test.classes, test.labels.tolist(), levels(test)) == (("ant", "cat", "dog"), [0, 1, 2], [3, 2, 1])


@pytest.mark.parametrize("name", ["val", "validation", "valid"])
def test_a_validation_folder_stands_in_for_a_missing_test_folder(tmp_path, name):
    write(tmp_path, "train/a/1.png", f"{name}/a/2.png")
    assert levels(load(tmp_path, "test")) == [2]
    write(tmp_path, "train/a/1.png", f"{name}/a/2.png", "test/a/3.png")
    assert levels(load(tmp_path, "test")) == [3]


def test_test_images_are_numbered_by_the_training_classes(tmp_path):
    write(tmp_path, "train/a/1.png", "train/b/1.png", "train/c/1.png", "test/c/1.png", "test/b/1.png")
    test = load(tmp_path, "test")
    assert (test.classes, test.labels.tolist(), levels(test)) == (("a", "b", "c"), [1, 2], [5, 4])
    write(tmp_path, "test/aa/1.png")
    with pytest.raises(
        UserError, match=r"^data\.private\.path: .*/test/aa' is not a class of the training part.*Did you mean 'a'\?"
    ):
        load(tmp_path, "test")


def test_test_images_without_classes_are_refused(tmp_path):
    write(tmp_path, "train/a/1.png", "train/b/1.png", "test/1.png")
    with pytest.raises(UserError, match=r"^data\.private\.path: .*test' have no class folders"):
        load(tmp_path, "test")


def test_keys_choose_among_the_folders(tmp_path):
    write(tmp_path, "train/a/1.png", "more/a/2.png", "test/a/3.png", "val/a/4.png")
    assert [levels(load(tmp_path, split)) for split in ("train", "test")] == [[1], [3]]
    chosen = {"train_split": "more", "test_split": "val"}
    assert [levels(load(tmp_path, split, **chosen)) for split in ("train", "test")] == [[2], [4]]
    for split in ("train", "test"):
        with pytest.raises(
            UserError, match=rf"no x folder with {split} images; it has more, test, train, val \(.*{split}_split"
        ):
            load(tmp_path, split, train_split="x", test_split="x")


def test_an_unlabelled_test_folder_is_refused_with_the_labelled_ones_and_their_key(tmp_path):
    write(tmp_path, "train/a/1.png", "train/b/2.png", "test/3.png", "val/a/4.png", "val/b/5.png", "extra/6.png")
    with pytest.raises(
        UserError, match=r"no class folders; set data\.private\.test_split to a folder with class folders: val$"
    ):
        load(tmp_path, "test")
    assert load(tmp_path, "test", test_split="val").labels.tolist() == [0, 1]


def test_a_folder_of_tables_is_pointed_to_what_reads_it(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train-0.parquet").write_bytes(b"")
    with pytest.raises(UserError, match=r"it holds parquet files, which data\.private: HuggingFace reads$"):
        load(tmp_path)


def test_linked_folders_and_files_are_read_and_a_link_to_nothing_is_named(tmp_path):
    write(tmp_path / "elsewhere", "a/1.png", "2.png")
    (tmp_path / "set" / "train" / "b").mkdir(parents=True)
    (tmp_path / "set" / "train" / "a").symlink_to(tmp_path / "elsewhere" / "a")
    (tmp_path / "set" / "train" / "b" / "2.png").symlink_to(tmp_path / "elsewhere" / "2.png")
    images = load(tmp_path / "set")
    assert (images.classes, levels(images)) == (("a", "b"), [1, 2])
    (tmp_path / "elsewhere" / "2.png").unlink()
    with pytest.raises(
        UserError, match=r"^data\.private: '.*/train/b/2\.png' cannot be read \(No such file or directory\)$"
    ):
        load(tmp_path / "set")


def test_folders_may_begin_with_a_capital_and_hold_what_macos_adds(tmp_path):
    write(tmp_path, "Train/a/1.PNG", "Train/b/2.JPG".replace("JPG", "png"), "Test/a/3.png", "Train/__MACOSX/a/._1.png")
    assert (load(tmp_path).classes, levels(load(tmp_path)), levels(load(tmp_path, "test"))) == (("a", "b"), [1, 2], [3])


def test_image_files_that_are_not_read_are_counted_in_a_note(tmp_path):
    write(tmp_path, "train/a/1.png", "train/a/2.jfif")
    for name in ("3.heic", "4.HEIC", "notes.txt"):
        (tmp_path / "train" / "a" / name).write_bytes(b"")
    (note,) = load(tmp_path).notes
    assert note.startswith(": 2 train files are left out, such as '")
    assert len(load(tmp_path)) == 2


def test_class_names_are_text_that_can_be_printed_and_compared(tmp_path):
    write(tmp_path, "train/cafe\u0301/1.png", "train/tea/2.png", "test/caf\u00e9/3.png", "test/tea/4.png")
    (tmp_path / "train" / os.fsdecode(b"caf\xe9 noir")).mkdir()
    write(tmp_path, f"train/{os.fsdecode(bytes([99, 97, 102, 233]))} noir/5.png")
    train, test = load(tmp_path), load(tmp_path, "test")
    assert set(train.classes) == {"caf\u00e9", r"caf\xe9 noir", "tea"}
    assert test.classes == train.classes
    named = [train.classes[label] for label in test.labels.tolist()]
    assert dict(zip(levels(test), named, strict=True)) == {3: "caf\u00e9", 4: "tea"}


@pytest.mark.parametrize(
    "names", [("b.png", "a.png"), ("train/b.png", "train/a.png"), ("b.png", "a/a.png"), ("val/b.png", "val/a.png")]
)
def test_a_flat_folder_is_a_public_set_without_labels(tmp_path, names):
    write(tmp_path, *names)
    images = load(tmp_path, key="data.public")
    assert (images.classes, images.labels.tolist(), levels(images)) == ((), [-1, -1], [2, 1])


def test_class_folders_without_a_train_level_do_and_the_test_part_stays_apart(tmp_path):
    write(tmp_path, "a/1.png", "b/1.png", "test/a/1.png")
    assert (load(tmp_path).classes, levels(load(tmp_path))) == (("a", "b"), [1, 2])
    assert levels(load(tmp_path, "test")) == [3]


def test_classes_and_limit_cut_a_folder_down(tmp_path):
    write(tmp_path, *(f"train/{name}/{i}.png" for name in "abc" for i in range(5)), "test/a/1.png", "test/c/1.png")
    images = load(tmp_path, classes=["c", "a"], limit=8)
    assert images.classes == ("c", "a")
    assert [0 if level > 10 else 1 for level in levels(images)] == images.labels.tolist()
    assert len(images) == 8
    assert load(tmp_path, "test", classes=["c", "a"], limit=1).labels.tolist() == [1, 0]


def test_other_and_hidden_files_are_passed_over(tmp_path):
    write(tmp_path, "train/a/1.png", "train/.thumbnails/2.png", "train/a/.cache/3.png", "train/a/._4.png")
    (tmp_path / "train" / "a" / "notes.txt").write_text("no image")
    (tmp_path / "train" / "readme.md").write_text("no image")
    images = load(tmp_path)
    assert (images.classes, levels(images)) == (("a",), [1])


def test_grey_palette_transparent_and_animated_files_are_decoded(tmp_path):
    red = Image.new("RGB", (4, 4), (255, 0, 0))
    red.convert("L").save(tmp_path / "1.png")
    red.convert("P").save(tmp_path / "2.png")
    red.convert("P").save(tmp_path / "3.png", transparency=bytes(256))
    red.convert("RGBA").save(tmp_path / "4.webp", lossless=True)
    red.save(tmp_path / "5.gif", save_all=True, append_images=[Image.new("RGB", (4, 4), (0, 255, 0))])
    red.save(tmp_path / "6.tif", save_all=True, append_images=[red])
    images = load(tmp_path, key="data.public")
    assert images.stored == "4x4 grey"  # the first file
    assert images.pixels[:, :, 0, 0].tolist() == [[76] * 3] + [[255, 0, 0]] * 5  # the luma of red is 0.299 of 255


def test_grey_files_alone_have_one_channel(tmp_path):
    write(tmp_path, "1.png", "2.pgm")
    assert load(tmp_path, key="data.public").pixels.shape == (2, 1, 4, 4)


def test_a_changed_a_new_and_a_removed_file_are_seen(tmp_path):
    write(tmp_path, "train/a/1.png", "train/a/2.png")
    assert levels(load(tmp_path)) == [1, 2]
    file = tmp_path / "train" / "a" / "2.png"
    before = file.stat()
    Image.new("L", (4, 4), 9).save(file)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert file.stat().st_size == before.st_size
    assert levels(load(tmp_path)) == [1, 9]
    Image.new("L", (4, 4), 5).save(tmp_path / "train" / "a" / "3.png")
    assert levels(load(tmp_path)) == [1, 9, 5]
    file.unlink()
    assert levels(load(tmp_path)) == [1, 5]


def test_an_unchanged_folder_comes_from_the_cache(tmp_path, monkeypatch):
    write(tmp_path, "train/a/1.png")
    first = load(tmp_path)
    monkeypatch.setattr(ImageFolder, "read", None)
    again = load(tmp_path)
    assert np.array_equal(first.pixels, again.pixels)
    assert (again.classes, again.stored) == (("a",), "4x4 grey")


def test_the_same_files_seen_from_another_folder_are_not_mixed_up(tmp_path):
    write(tmp_path, "a/b/1.png")
    labelled, flat = load(tmp_path / "a"), load(tmp_path / "a" / "b")
    assert (labelled.classes, labelled.labels.tolist()) == (("b",), [0])
    assert (flat.classes, flat.labels.tolist()) == ((), [-1])


@pytest.mark.parametrize(
    ("names", "split", "said"),
    [
        ((), "train", r"no images below '.*'; allowed endings: \.png "),
        (("train/a/1.png",), "test", r"has no test or val folder"),
        (("train/1.png", "test/.x/1.png"), "test", r"no images below '.*test'"),
    ],
)
def test_what_is_missing_is_named(tmp_path, names, split, said):
    write(tmp_path, *names)
    with pytest.raises(UserError, match=rf"^data\.private\.path: .*{said}"):
        load(tmp_path, split)


def test_an_empty_class_folder_is_refused(tmp_path):
    write(tmp_path, "train/a/1.png")
    (tmp_path / "train" / "b").mkdir()
    with pytest.raises(UserError, match=rf"^data\.public\.path: the class folder '{tmp_path}/train/b' holds no images"):
        load(tmp_path, key="data.public")


@pytest.mark.parametrize("path", ["", "nowhere"])
def test_a_missing_folder_is_refused(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=rf"^data\.private\.path: '{path}' is not a folder"):
        ImageFolder(path).load("train")


@pytest.mark.parametrize("ending", ["png", "jpg", "gif", "bmp", "tif", "webp", "ppm"])
@pytest.mark.parametrize(
    "damage", [lambda b: b"", lambda b: b[: len(b) // 2], lambda b: b[:40] + b"\xff" * 20 + b[60:]]
)
def test_a_broken_file_is_named_with_its_path(tmp_path, ending, damage):
    for name in ("1", "2"):
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)).save(
            tmp_path / f"{name}.{ending}"
        )
    file = tmp_path / f"2.{ending}"
    file.write_bytes(damage(file.read_bytes()))
    try:
        load(tmp_path, key="data.public")
    except UserError as error:
        assert str(error).startswith(f"data.public: '{file}' cannot be decoded: ")  # noqa: PT017
    else:
        # pixels, not structure
        assert damage(bytes(range(100))) == bytes(range(40)) + b"\xff" * 20 + bytes(range(60, 100))


def test_a_folder_is_chosen_on_the_command_line():
    private = ["--data.private", "ImageFolder", "--data.private.path", "x", "--data.private.classes", "[a, b]"]
    public = ["--data.public", "ImageFolder", "--data.public.path", "y"]
    config = configure([*private, "--data.private.limit", "5", *public])
    assert config.data.private == ImageFolder("x", classes=["a", "b"], limit=5)
    assert config.data.public == ImageFolder("y")
