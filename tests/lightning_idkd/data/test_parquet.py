"""Odd parquet folders: where files lie, what their columns are, and what their labels mean."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from image_sets import pictures, png, write_parquet

from lightning_idkd.data import parquet
from lightning_idkd.data.huggingface import HuggingFace
from lightning_idkd.errors import UserError


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("IDKD_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.delenv("IDKD_DATA", raising=False)


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path_factory, monkeypatch):
    monkeypatch.chdir(tmp_path_factory.mktemp("working"))


def load(root, split="train", key="data.private", size=None, **arguments):
    return HuggingFace(str(root), **arguments).load(split, size, key=key)


def refused(said, *arguments, **options):
    with pytest.raises(UserError, match=said) as error:
        load(*arguments, **options)
    assert "\n" not in str(error.value)


def of_level(file: Path, *levels: int, **columns) -> Path:
    """Grey 2x2 images of these levels, with labels 0, 1, ... unless ``columns`` has others."""
    images = [np.full((2, 2), level, np.uint8) for level in levels]
    write_parquet(file, images, **{"labels": list(range(len(levels))), **columns})
    return file


def levels(images):
    return images.pixels[:, 0, 0, 0].tolist()


def labels_by_name(images):
    return [images.classes[label] if label >= 0 else None for label in images.labels.tolist()]


def table(file: Path, label: list, type: pa.DataType | None = None, name: str = "label") -> Path:
    """Images of levels 0, 1, ... beside a column without class names."""
    column = pa.array(label, type=type)
    images = pa.array([{"bytes": png(np.full((2, 2), i, np.uint8)), "path": None} for i in range(len(label))])
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"image": images, name: column}), file)
    return file


# --- where files lie


@pytest.mark.parametrize(("train", "test"), [
    ("train-00000-of-00001.parquet", "test-00000-of-00001.parquet"),
    ("train-00000-of-00001-0a1b2c3d4e5f.parquet", "test-00000-of-00001-5f4e3d2c1b0a.parquet"),
    ("data/train-00000-of-00001.parquet", "data/validation-00000-of-00001.parquet"),
    ("plain_text/train-00000-of-00001.parquet", "plain_text/test-00000-of-00001.parquet"),
    ("train/0000.parquet", "test/0000.parquet"),
    ("data/train/0000.parquet", "data/valid/0000.parquet"),
    ("default/train/0000.parquet", "default/test/0000.parquet"),
    ("train/part-0.parquet", "test/part-0.parquet"),
    ("train.parquet/part-00000-0a1b.c000.snappy.parquet", "test.parquet/part-00000-2c3d.c000.snappy.parquet"),
    ("train/train-00000-of-00001.parquet", "val/val-00000-of-00001.parquet"),
    ("train.parquet", "test.PARQUET"),
])  # fmt: skip
def test_a_folder_as_the_hub_lays_it_out_is_read(tmp_path, train, test):
    of_level(tmp_path / train, 1, 2)
    of_level(tmp_path / test, 3, 4, 5, labels=[0, 1, 0])
    of_level(tmp_path / ".cache" / "train-00001-of-00002.parquet", 9)
    (tmp_path / "README.md").write_text("about it")
    assert (levels(load(tmp_path)), levels(load(tmp_path, "test"))) == ([1, 2], [3, 4, 5])


def test_several_configurations_are_named_with_the_key_that_chooses(tmp_path):
    for level, name in enumerate(("coarse", "fine"), 1):
        of_level(tmp_path / name / "train-0.parquet", level)
        of_level(tmp_path / name / "test-0.parquet", level + 2)
    refused(r"^data\.private\.config_name: '.*' holds several configurations; set it to one of coarse, fine$", tmp_path)
    assert levels(load(tmp_path, config_name="fine")) == [2]
    assert levels(load(tmp_path, "test", config_name="coarse")) == [3]
    refused(
        r"config_name: .* no folder 'fin'\. Did you mean 'fine'\? Allowed: coarse, fine$", tmp_path, config_name="fin"
    )


def test_files_of_the_folder_itself_come_before_those_of_configurations(tmp_path):
    of_level(tmp_path / "data" / "train-0.parquet", 1)
    of_level(tmp_path / "extra" / "train-0.parquet", 2)
    assert levels(load(tmp_path)) == [1]
    assert levels(load(tmp_path, config_name="extra")) == [2]


@pytest.mark.parametrize(("train", "test", "splits"), [
    ("unlabeled-00000-of-00001.parquet", "dev-0.parquet", "dev, unlabeled"),
    ("unlabeled/0000.parquet", "dev/0000.parquet", "dev, unlabeled"),
    ("fold_0.parquet", "fold_1.parquet", "fold"),
])  # fmt: skip
def test_keys_choose_among_the_stored_splits(tmp_path, train, test, splits):
    of_level(tmp_path / train, 1)
    of_level(tmp_path / test, 2)
    refused(
        rf"^data\.private\.path: no train images in .*; its splits: {splits} \(data\.private\.train_split chooses",
        tmp_path,
    )
    chosen = {
        k: name.split("-")[0].split("/")[0].split(".")[0] for k, name in (("train_split", train), ("test_split", test))
    }
    assert levels(load(tmp_path, **chosen)) == [1]
    assert levels(load(tmp_path, "test", **chosen)) == [2]


def test_a_key_for_the_test_split_comes_before_a_test_split(tmp_path):
    of_level(tmp_path / "test-0.parquet", 1)
    of_level(tmp_path / "validation-0.parquet", 2)
    assert levels(load(tmp_path, "test")) == [1]
    assert levels(load(tmp_path, "test", test_split="validation")) == [2]


@pytest.mark.parametrize(("names", "said"), [
    (("train-00000-of-00001", "train-00000-of-00002", "train-00001-of-00002"),
     r"more than once: train-00000-of-00001\.parquet and train-00000-of-00002\.parquet to "
     r"train-00001-of-00002\.parquet \(2 f"),
    (("train-00000-of-00001-aaaa", "train-00000-of-00001-bbbb"),
     r"train-00000-of-00001-aaaa\.parquet and train-0.*-bbbb\.parq"),
    (("train", "train-00000-of-00001"), r"train-00000-of-00001\.parquet and train\.parquet|train\.parquet and train-0"),
    (("train-0", "data/train-0"), r"train-0\.parquet and data/train-0\.parquet"),
    (("train-00000-of-00002",), r"1 of 2 shards \(train-00000-of-00002\.parquet\); number 1 is missing"),
    (("train-00001-of-00003", "train-00002-of-00003"), r"2 of 3 shards .*; number 0 is missing"),
    (("train/0000", "train/0002"), r"lacks 'train/0001\.parquet'"),
])  # fmt: skip
def test_files_that_are_not_one_whole_upload_are_refused_by_name(tmp_path, names, said):
    for name in names:
        of_level(tmp_path / f"{name}.parquet", 1)
    refused(rf"^data\.private\.path: '{tmp_path}' .*({said})", tmp_path)


@pytest.mark.parametrize("names", [("train-00001-of-00002", "train-00002-of-00002"), ("train-3", "train-7")])
def test_shards_may_be_numbered_from_one_or_freely(tmp_path, names):
    for level, name in enumerate(names, 1):
        of_level(tmp_path / f"{name}.parquet", level)
    assert levels(load(tmp_path)) == [1, 2]


def test_other_kinds_of_folders_are_pointed_to_what_reads_them(tmp_path):
    (tmp_path / "images" / "train" / "cat").mkdir(parents=True)
    (tmp_path / "images" / "train" / "cat" / "1.png").write_bytes(png(pictures(1)[0]))
    refused(
        r"holds no train-\*\.parquet; it holds image files, which data\.private: ImageFolder reads$",
        tmp_path / "images",
    )
    (tmp_path / "arrow" / "train").mkdir(parents=True)
    (tmp_path / "arrow" / "train" / "data-00000-of-00001.arrow").write_bytes(b"")
    refused(r"it holds arrow files; store the set by to_parquet of datasets$", tmp_path / "arrow")


def test_a_link_to_a_shard_is_read_and_a_link_to_nothing_is_refused(tmp_path):
    blob = of_level(tmp_path / "blobs" / "0a1b.parquet", 1)
    (tmp_path / "set").mkdir()
    link = tmp_path / "set" / "train-00000-of-00001.parquet"
    link.symlink_to(blob)
    assert levels(load(tmp_path / "set")) == [1]
    blob.unlink()
    refused(rf"^data\.private\.path: '{link}' is a broken link$", tmp_path / "set")


@pytest.mark.parametrize(("images", "said"), [
    ([b"", b"<svg/>"], r"^data\.private: image 0 of split 'train' cannot be decoded: not an image that Pillow knows$"),
])  # fmt: skip
def test_a_value_that_is_not_an_image_is_reported_without_python_terms(tmp_path, images, said):
    pq.write_table(pa.table({"image": images, "label": [0, 1]}), tmp_path / "train-0.parquet")
    refused(said, tmp_path)


def test_a_file_in_place_of_its_folder_is_reported(tmp_path):
    file = of_level(tmp_path / "train-0.parquet", 1)
    refused(rf"^data\.private\.path: '{file}' is a file; set it to its folder, '{tmp_path}'$", file)


# --- shards that differ


@pytest.mark.parametrize(
    "cut", [lambda b: b"", lambda b: b[:-30], lambda b: b[:99], lambda b: b[:8] + b"\0" * 40 + b[48:]]
)
def test_a_later_shard_that_is_damaged_is_named(tmp_path, cut):
    of_level(tmp_path / "train-00000-of-00002.parquet", 1)
    file = of_level(tmp_path / "train-00001-of-00002.parquet", 2)
    file.write_bytes(cut(file.read_bytes()))
    refused(r"^data\.private\.path: 'train-00001-of-00002\.parquet' cannot be read: ", tmp_path)


def test_a_later_shard_without_the_column_is_named_with_both_columns(tmp_path):
    of_level(tmp_path / "train-0.parquet", 1)
    of_level(tmp_path / "train-1.parquet", 2, image="img")
    refused(
        r"\.path: 'train-1\.parquet' has no column 'image', which 'train-0\.parquet' has; its columns: img, label$",
        tmp_path,
    )
    of_level(tmp_path / "train-1.parquet", 2, label="fine_label")
    images = load(tmp_path, key="data.public")
    assert (levels(images), images.labels.tolist()) == ([1, 2], [0, -1])
    lacks = "'train-1.parquet' has no column 'label', which 'train-0.parquet' has; its columns: image, fine_label"
    assert images.unlabelled == f".path: {lacks}"


def test_classes_in_another_order_are_matched_by_name_and_mentioned(tmp_path):
    of_level(tmp_path / "train-0.parquet", 1, 2, 3, names=["cat", "dog", "emu"])
    of_level(tmp_path / "train-1.parquet", 4, 5, 6, names=["emu", "cat", "dog"])
    images = load(tmp_path)
    assert images.classes == ("cat", "dog", "emu")
    assert labels_by_name(images) == ["cat", "dog", "emu", "emu", "cat", "dog"]
    assert images.notes == (
        ": 'train-1.parquet' lists its classes in another order than 'train-0.parquet'; labels go by name",
    )
    assert load(tmp_path).notes == images.notes  # from the cache


@pytest.mark.parametrize(
    ("names", "has"), [(["cat", "fox"], "names the classes cat, fox"), (None, "has no class names")]
)
def test_other_classes_in_a_later_shard_leave_it_unlabelled_with_the_file_named(tmp_path, names, has):
    of_level(tmp_path / "train-0.parquet", 1, 2, names=["cat", "dog"])
    of_level(tmp_path / "train-1.parquet", 3, names=names)
    images = load(tmp_path)
    assert labels_by_name(images) == ["cat", "dog", None]
    assert images.unlabelled == f".path: 'train-1.parquet' {has}, but what comes before it names the classes cat, dog"


def test_empty_shards_are_passed_over_whatever_their_columns(tmp_path):
    empty = pa.table({"image": pa.array([], pa.null()), "other": pa.array([], pa.string())})
    pq.write_table(empty, tmp_path / "train-0.parquet")
    of_level(tmp_path / "train-1.parquet", 7, 8, names=["a", "b"])
    pq.write_table(empty, tmp_path / "train-2.parquet")
    assert (levels(load(tmp_path)), labels_by_name(load(tmp_path))) == ([7, 8], ["a", "b"])
    for shard in (1, 2):
        (tmp_path / f"train-{shard}.parquet").unlink()
    refused(r"^data\.private\.path: .* holds no images; columns: image, other$", tmp_path)
    write_parquet(tmp_path / "train-0.parquet", [], [], names=["a", "b"])
    refused(r"^data\.private: split 'train' holds no images$", tmp_path)


# --- which column holds labels, and what they mean


@pytest.mark.parametrize("name", ["labels", "fine_labels", "target", "Targets", "class", "y"])
def test_a_plain_integer_column_with_a_usual_name_is_found(tmp_path, name):
    of_level(tmp_path / "train-0.parquet", 1, 2, labels=[1, 0], label=name)
    assert load(tmp_path).labels.tolist() == [1, 0]


def test_columns_that_may_be_labels_are_named(tmp_path):
    table(tmp_path / "train-0.parquet", [3, 4], name="index")
    images = load(tmp_path)
    assert (images.labels.tolist(), images.classes) == ([-1, -1], ())
    assert images.unlabelled.endswith("set it to the one that holds them: index (int64)")
    assert load(tmp_path, label="index").classes == ("3", "4")
    content = pq.read_table(tmp_path / "train-0.parquet")
    for name in ("target", "category"):
        content = content.append_column(name, pa.array([0, 1]))
    pq.write_table(content, tmp_path / "train-0.parquet")
    assert load(tmp_path).unlabelled.endswith("has several columns of labels; set it to one of target, category")
    assert load(tmp_path, label="category").labels.tolist() == [0, 1]


@pytest.mark.parametrize(("labels", "type", "classes", "wanted"), [
    ([1, 2, 3, 4], None, ("1", "2", "3", "4"), [0, 1, 2, 3]),
    ([10, 9, 10, 2], pa.uint8(), ("2", "9", "10"), [2, 1, 2, 0]),
    ([3.0, 1.0, 3.0], pa.float32(), ("1", "3"), [1, 0, 1]),
    ([True, False], None, ("0", "1"), [1, 0]),
    (["dog", "cat", "dog"], None, ("cat", "dog"), [1, 0, 1]),
    (["dog", "cat"], pa.dictionary(pa.int8(), pa.string()), ("cat", "dog"), [1, 0]),
    (["10", "9", "x", "007"], None, ("007", "9", "10", "x"), [2, 1, 3, 0]),
])  # fmt: skip
def test_without_class_names_the_values_that_occur_are_the_classes_in_order(tmp_path, labels, type, classes, wanted):
    table(tmp_path / "train-0.parquet", labels, type)
    images = load(tmp_path)
    assert (images.classes, images.labels.tolist()) == (classes, wanted)
    listed = f"the {len(classes)} values that occur ({', '.join(classes)}) are the classes"
    plain = classes == ("0", "1")
    assert images.notes == (() if plain else (f": labels have no class names; {listed}",))


@pytest.mark.parametrize(("labels", "type", "wanted", "why"), [
    ([0, None, 1], pa.int64(), [0, -1, 1],
     r"\.path: 1 of 3 images have no label \(null, blank or below 0\) in 'train-0"),
    ([1.0, float("nan")], None, [0, -1], r"\.path: 1 of 2 images"),
    (["cat", "", " "], None, [0, -1, -1], r"\.path: 2 of 3 images"),
    ([-1, -1], None, [-1, -1], r"\.path: 2 of 2 images"),
    ([None, None], None, [-1, -1], r"\.path: 2 of 2 images"),
    ([0.5, 1.0], None, [-1, 0], r"\.label: 'train-0\.parquet' holds 0\.5; allowed: integers or texts"),
    ([float("inf"), 1.0], None, [-1, 0], r"\.label: 'train-0\.parquet' holds inf"),
    ([[0, 1], [2]], None, [-1, -1],
     r"\.label: column 'label' holds list<.*>; allowed: integers, class labels or texts"),
])  # fmt: skip
def test_what_is_not_a_label_leaves_an_image_without_one_and_the_reason_is_kept(tmp_path, labels, type, wanted, why):
    table(tmp_path / "train-0.parquet", labels, type)
    for _ in ("decoded", "from the cache"):
        images = load(tmp_path, key="data.public")
        assert images.labels.tolist() == wanted
        assert re.match(why, images.unlabelled), images.unlabelled


def test_a_number_beyond_the_class_names_is_not_a_label(tmp_path):
    of_level(tmp_path / "train-0.parquet", 1, 2, labels=[1, 2], names=["a", "b"])
    assert load(tmp_path).labels.tolist() == [1, -1]
    assert load(tmp_path).unlabelled == ".label: 'train-0.parquet' holds 2; allowed: 0 to 1"


def test_numbers_in_one_shard_and_texts_in_another_are_not_mixed(tmp_path):
    table(tmp_path / "train-0.parquet", [0, 1])
    table(tmp_path / "train-1.parquet", ["0", "1"])
    images = load(tmp_path)
    assert images.labels.tolist() == [0, 1, -1, -1]
    assert (
        images.unlabelled == ".path: column 'label' holds numbers in 'train-0.parquet' and texts in 'train-1.parquet'"
    )


def test_class_names_are_equal_whatever_form_of_unicode_wrote_them(tmp_path):
    of_level(tmp_path / "train-0.parquet", 1, 2, names=["cafe\u0301", "tea"])
    of_level(tmp_path / "train-1.parquet", 3, 4, names=["caf\u00e9", "tea"])
    assert labels_by_name(load(tmp_path)) == ["caf\u00e9", "tea"] * 2


@pytest.mark.parametrize("feature", [{"names": ["a", "b"]}, {"names": {"1": "b", "0": "a"}}, {"num_classes": 2}])
def test_class_names_are_read_in_every_form_that_files_have(tmp_path, feature):
    file = of_level(tmp_path / "train-0.parquet", 1, 2)
    noted = {"info": {"features": {"label": {"_type": "ClassLabel", **feature}}}}
    content = pq.read_table(file)
    pq.write_table(content.replace_schema_metadata({"huggingface": json.dumps(noted)}), file)
    assert load(tmp_path).classes == (("0", "1") if "num_classes" in feature else ("a", "b"))


@pytest.mark.parametrize("noted", [
    "no json", "[]", '{"info": null}', '{"info": {"features": []}}',
    '{"info": {"features": {"label": {"_type": "ClassLabel"}, "image": 3}}}',
])  # fmt: skip
def test_odd_notes_of_a_file_about_its_columns_are_passed_over(tmp_path, noted):
    file = of_level(tmp_path / "train-0.parquet", 1, 2)
    pq.write_table(pq.read_table(file).replace_schema_metadata({"huggingface": noted}), file)
    assert load(tmp_path).classes == ("0", "1")


def test_images_may_be_plain_bytes(tmp_path):
    array = pictures(1)[0]
    pq.write_table(pa.table({"img": [png(array)], "label": [0]}), tmp_path / "train-0.parquet")
    assert np.array_equal(load(tmp_path).pixels[0].numpy(), array.transpose(2, 0, 1))


# --- images beside the table


def beside(file: Path, *paths: str | None) -> None:
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    images = pa.array([path and {"bytes": None, "path": path} for path in paths], kind)
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"image": images, "label": [0] * len(paths)}), file)


def test_an_image_beside_the_table_is_looked_for_there_and_not_in_the_working_folder(tmp_path):
    Path("1.png").write_bytes(png(np.full((2, 2), 99, np.uint8)))
    beside(tmp_path / "data" / "train-0.parquet", "1.png", "../images/2.png")
    refused(rf"^data\.private\.path: row 0 of 'train-0\.parquet' names the image '1\.png', "
            rf"but there is no '{tmp_path}/data/1\.p", tmp_path)  # fmt: skip
    (tmp_path / "images").mkdir()
    for level, name in ((1, "data/1.png"), (2, "images/2.png")):
        (tmp_path / name).write_bytes(png(np.full((2, 2), level, np.uint8)))
    assert levels(load(tmp_path)) == [1, 2]
    # no file of the set's tables says this
    (tmp_path / "data" / "1.png").write_bytes(png(np.full((2, 2), 3, np.uint8)))
    assert levels(load(tmp_path)) == [3, 2]


@pytest.mark.parametrize("path", ["../../outside.png", "{outside}", "a/../../../outside.png"])
def test_an_image_outside_the_sets_folder_is_refused(tmp_path, path):
    outside = tmp_path / "outside.png"
    outside.write_bytes(png(pictures(1)[0]))
    beside(tmp_path / "set" / "data" / "train-0.parquet", path.format(outside=outside))
    refused(r"^data\.private\.path: row 0 of 'train-0\.parquet' names the image '.*outside\.png', "
            r"which lies outside '.*set'$", tmp_path / "set")  # fmt: skip


@pytest.mark.parametrize("path", ["https://example.org/1.png", "zip://1.png::a.zip"])
def test_an_address_is_never_followed(tmp_path, path):
    beside(tmp_path / "train-0.parquet", path)
    refused(r"names the image '.*', but there is no", tmp_path)


def test_a_row_without_an_image_is_named(tmp_path):
    (tmp_path / "1.png").write_bytes(png(pictures(1)[0]))
    beside(tmp_path / "train-0.parquet", "1.png", None)
    refused(r"^data\.private\.path: row 1 of 'train-0\.parquet' has no image$", tmp_path)


def test_a_sets_folder_may_be_given_relative_to_the_working_folder(tmp_path):
    write_parquet(Path("set") / "train-0.parquet", pictures(2), [0, 1])
    beside(Path("other") / "train-0.parquet", "1.png")
    (Path("other") / "1.png").write_bytes(png(np.full((2, 2), 5, np.uint8)))
    assert len(load("set")) == 2
    assert levels(load("other")) == [5]


# --- which splits have labels


def test_the_labelled_splits_are_named_with_their_key(tmp_path):
    of_level(tmp_path / "train-0.parquet", 1, names=["a", "b"])
    of_level(tmp_path / "test-0.parquet", 2, labels=[-1], names=["a", "b"])
    source = HuggingFace(str(tmp_path))
    assert source.labelled_splits("test", None, "data.private") == "no other split has labels"
    of_level(tmp_path / "validation-0.parquet", 3, names=["a", "b"])
    of_level(tmp_path / "extra-0.parquet", 4, labels=[-1], names=["a", "b"])
    assert (
        source.labelled_splits("test", None, "data.private")
        == "set data.private.test_split to a labelled split: validation"
    )


def test_a_folder_that_may_not_be_read_is_one_sentence(tmp_path, monkeypatch):
    def forbidden(path):
        raise PermissionError(13, "Permission denied", str(path))

    of_level(tmp_path / "train-0.parquet", 1)
    monkeypatch.setattr(os, "scandir", forbidden)
    refused(rf"^data\.private: '{tmp_path}' cannot be read \(Permission denied\)$", tmp_path)


def test_files_are_found_in_the_order_of_their_numbers(tmp_path):
    for i in range(11):
        of_level(tmp_path / f"train-{i}-of-11.parquet", i)
    assert levels(load(tmp_path)) == list(range(11))
    assert [*parquet.find_files(tmp_path)] == [""]
