"""A run that meets data again: the same, in another order, changed, or with their classes in another order."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from image_sets import quadrants, write_parquet

import lightning_idkd
from lightning_idkd.cli import main

NAMES = ["ant", "bee", "cat", "dog"]
LABELS = [i % 4 for i in range(80)]
SHORT = ["--logger", "null", "--graph.nodes", "2", "--train.batch_size", "8", "--run.engine", "loop",
         "--run.threads", "1", "--run.pictures", "false", "--data.augment", "none"]  # fmt: skip


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("IDKD_CACHE", str(tmp_path_factory.mktemp("cache")))


def write(folder, part, labels=LABELS, seed=0, names=NAMES, rows=None, values=None):
    """A parquet file of images whose bright quadrant says their class, which is named by ``names`` whatever its number;
    ``values`` are written instead of the labels."""
    arrays, named = quadrants(labels, seed), [NAMES[label] for label in labels]
    rows = list(range(len(labels))) if rows is None else rows
    numbers = [names.index(named[row]) for row in rows] if values is None else values
    write_parquet(folder / f"{part}-00000-of-00001.parquet", arrays[rows], numbers, names=names)


def both(folder, **changes):
    write(folder, "train", **changes)
    write(folder, "test", seed=1, **{"labels": LABELS[:40], **{k: v for k, v in changes.items() if k == "names"}})
    return folder


@pytest.fixture
def idkd(tmp_path, capsys):
    def call(command, *arguments, epochs=2, runs="runs"):
        common = [*SHORT, "--train.epochs", str(epochs), "--run.dir", str(tmp_path / runs)] if command == "fit" else []
        capsys.readouterr()
        status = main([command, *common, *arguments])
        call.said = capsys.readouterr()
        return status

    return call


def given(folder, key="private"):
    return [f"--data.{key}", "HuggingFace", f"--data.{key}.path", str(folder)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IDKD_CACHE", str(tmp_path_factory.mktemp("cache")))
        folder = tmp_path_factory.mktemp("trained")
        both(folder / "set")
        place = ["--run.dir", str(folder / "runs")]
        assert main(["fit", *SHORT, *given(folder / "set"), "--train.epochs", "12", *place]) == 0
    return latest(folder).resolve()


def latest(tmp_path, runs="runs"):
    return tmp_path / runs / "idkd" / "latest"


def accuracy(idkd, run, *arguments):
    assert idkd("evaluate", str(run), "--json", *arguments) == 0, idkd.said.err
    return json.loads(idkd.said.out)["accuracy"]["consensus"]


def rows_of(tmp_path, runs):
    return torch.load(latest(tmp_path, runs) / "checkpoints" / "last.ckpt", weights_only=True)["X"]


# --- what a run keeps


def test_class_names_and_digests_go_into_the_partition_and_the_checkpoints(idkd, tmp_path):
    both(tmp_path / "set")
    write(tmp_path / "public", "train", [0] * 24, seed=5, values=[-1] * 24)
    distil = ["--distillation", "IDKD", "--distillation.start", "1"]
    assert idkd("fit", *given(tmp_path / "set"), *given(tmp_path / "public", "public"), *distil) == 0, idkd.said.err
    data = json.loads((latest(tmp_path) / "partition.json").read_text())["data"]
    assert data["classes"] == NAMES
    assert [data[part]["images"] for part in ("train", "test", "public")] == [80, 40, 24]
    assert data["train"]["stored"] == "8x8 grey"
    assert "labels" not in data["public"]
    for name in ("last.ckpt", "final.ckpt"):
        saved = torch.load(latest(tmp_path) / "checkpoints" / name, weights_only=True)
        assert saved["images"]["data"] == data
    assert lightning_idkd.load(latest(tmp_path)).classes == tuple(NAMES)


# --- a run that goes on


@pytest.mark.parametrize(("change", "said", "how"), [
    ({"seed": 3}, "data.private: the training images are not those of", "folder"),
    ({"rows": [*range(1, 80), 0]}, "data.private: the training images are not those of", "auto"),
    ({"rows": [*range(1, 80), 0]}, "data.private: the training images are not those of", "from"),
    ({"labels": LABELS[:76]}, "(76 images, not 80)", "auto"),
    ({"names": ["ant", "bee", "cat", "dog", "emu"]}, "this set has emu", "auto"),
])  # fmt: skip
def test_training_images_that_changed_are_refused(idkd, tmp_path, change, said, how):
    both(tmp_path / "set")
    assert idkd("fit", *given(tmp_path / "set"), "--run.until", "1") == 0
    shutil.rmtree(tmp_path / "set")
    write(tmp_path / "set", "train", **change)
    write(tmp_path / "set", "test", LABELS[:40], seed=1, names=change.get("names", NAMES))
    option = {"auto": ["--run.resume", "auto"], "folder": ["--run.resume", str(latest(tmp_path))],
              "from": ["--run.from", str(latest(tmp_path))]}[how]  # fmt: skip
    assert idkd("fit", *given(tmp_path / "set"), *option) == 2
    assert said in idkd.said.err
    assert len(idkd.said.err.splitlines()) == 1
    assert len(list((tmp_path / "runs" / "idkd").glob("2*"))) == 1


def test_test_and_public_images_that_changed_are_refused_where_they_count(idkd, tmp_path):
    both(tmp_path / "set")
    write(tmp_path / "public", "train", seed=5)
    sets = [*given(tmp_path / "set"), *given(tmp_path / "public", "public")]
    assert idkd("fit", *sets, "--distillation", "VanillaKD", "--distillation.start", "1", "--run.until", "1") == 0
    distil = ["--distillation", "VanillaKD", "--distillation.start", "1"]
    write(tmp_path / "public", "train", seed=6)
    assert idkd("fit", *sets, *distil, "--run.resume", "auto") == 2
    assert "data.public: the images are not those of" in idkd.said.err
    other = ["--distillation", "IDKD", "--distillation.start", "1"]  # which begins with public images of its own
    assert idkd("fit", *sets, *other, "--run.from", str(latest(tmp_path)), runs="fork") == 0, idkd.said.err
    write(tmp_path / "public", "train", seed=5)
    write(tmp_path / "set", "test", LABELS[:40], seed=2)
    assert idkd("fit", *sets, *distil, "--run.resume", "auto") == 2
    assert "data.private: the test images are not those of" in idkd.said.err


def test_a_run_goes_on_where_only_the_order_of_its_classes_changed(idkd, tmp_path):
    both(tmp_path / "set")
    assert idkd("fit", *given(tmp_path / "set"), runs="whole") == 0
    assert idkd("fit", *given(tmp_path / "set"), "--run.until", "1", runs="cut") == 0
    both(tmp_path / "set", names=NAMES[::-1])
    assert idkd("fit", *given(tmp_path / "set"), "--run.resume", "auto", runs="cut") == 0, idkd.said.err
    assert len(list((tmp_path / "cut" / "idkd").glob("2*"))) == 1
    assert torch.equal(rows_of(tmp_path, "whole"), rows_of(tmp_path, "cut"))


def forget(run):
    """Make a run older than the identity of its data."""
    for file in (run / "checkpoints").glob("*.ckpt"):
        saved = torch.load(file, weights_only=True)
        saved["images"].pop("data", None)
        torch.save(saved, file)
    held = json.loads((run / "partition.json").read_text())
    held.pop("data", None)
    (run / "partition.json").write_text(json.dumps(held))


def test_runs_from_before_the_identity_was_kept_go_on_and_are_evaluated(idkd, tmp_path):
    both(tmp_path / "set")
    assert idkd("fit", *given(tmp_path / "set"), "--run.until", "1") == 0
    forget(latest(tmp_path))
    assert idkd("fit", *given(tmp_path / "set"), "--run.resume", "auto") == 0, idkd.said.err
    run = latest(tmp_path).resolve()
    forget(run)
    assert lightning_idkd.load(run).classes is None
    assert accuracy(idkd, run) == json.loads((run / "summary.json").read_text())["accuracy"]["consensus"]
    assert idkd("fit", *given(tmp_path / "set"), "--run.from", str(run), "--train.epochs", "3") == 0, idkd.said.err
    file = ["--data.partition", "FromFile", "--data.partition.path", str(run / "partition.json")]
    assert idkd("fit", *given(tmp_path / "set"), *file) == 0, idkd.said.err
    write(tmp_path / "set", "test", LABELS[:40], seed=1, names=["ant", "bee", "cat", "dog", "emu"])
    assert idkd("evaluate", str(run)) == 2
    assert "data.private: classes: 5 given; allowed: 4, as trained" in idkd.said.err


# --- a run's partition for other data


@pytest.mark.parametrize(("change", "size", "allowed", "command"), [
    ({}, None, True, "fit"),
    ({"names": NAMES[::-1]}, None, True, "partition"),
    ({}, "4", True, "partition"),
    ({"names": NAMES[::-1]}, "4", True, "partition"),
    ({"values": [0, 1] * 40}, None, True, "partition"),
    ({"rows": [*range(1, 80), 0]}, None, False, "fit"),
    ({"rows": [*range(1, 80), 0]}, None, False, "partition"),
    ({"rows": [*range(1, 80), 0]}, "4", False, "partition"),
    ({"seed": 4}, None, False, "partition"),
    ({"labels": LABELS + LABELS}, None, False, "partition"),
])  # fmt: skip
def test_a_partition_file_is_for_the_rows_it_was_made_for(idkd, trained, tmp_path, change, size, allowed, command):
    """Other class order, size or labels leave the rows what they are; the same rows in another order are others."""
    file = trained / "partition.json"
    both(tmp_path / "set", **change)
    arguments = [*given(tmp_path / "set"), "--data.partition", "FromFile", "--data.partition.path", str(file)]
    arguments += ["--data.image_size", size] if size else []
    arguments += (
        ["--graph.nodes", "2", "--out", str(tmp_path / "x.png")] if command == "partition" else ["--train.epochs", "1"]
    )
    assert idkd(command, *arguments) == (0 if allowed else 2), idkd.said.err
    if not allowed:
        assert idkd.said.err.startswith(f"error: data.partition.path: '{file}' was made for ")
        assert len(idkd.said.err.splitlines()) == 1
        held = json.loads(file.read_text())
        plain = tmp_path / "plain.json"
        plain.write_text(json.dumps([a + b for a, b in zip(*held["indices"].values(), strict=True)]))
        arguments[arguments.index(str(file))] = str(plain)
        # the plain file lacks indices of a larger set
        assert idkd(command, *arguments) == (2 if "labels" in change else 0), idkd.said.err


@pytest.mark.parametrize("data", [{"classes": None}, {"classes": NAMES}, {"classes": NAMES, "train": 3}, 7])
def test_a_damaged_description_in_a_partition_file_is_a_sentence(idkd, tmp_path, data):
    both(tmp_path / "set")
    file = tmp_path / "partition.json"
    file.write_text(json.dumps({"indices": {"train": [[0], [1]], "validation": [[], []]}, "data": data}))
    arguments = ["--data.partition", "FromFile", "--data.partition.path", str(file)]
    assert idkd("partition", *given(tmp_path / "set"), *arguments) == 2
    assert f"data.partition.path: '{file}' is damaged where it describes its data" in idkd.said.err


# --- evaluate


def test_evaluate_goes_by_the_names_of_classes(idkd, trained, tmp_path):
    right = json.loads((trained / "summary.json").read_text())["accuracy"]["consensus"]
    assert right > 0.9
    for shift in range(4):
        write(tmp_path / str(shift), "test", LABELS[:40], seed=1, names=NAMES[shift:] + NAMES[:shift])
        assert accuracy(idkd, trained, *given(tmp_path / str(shift))) == pytest.approx(right)
        moved = "the classes come in another order than in training; labels go by name"
        assert (moved in idkd.said.err) == (shift > 0)


def test_evaluate_counts_a_part_of_the_classes_and_says_which_lack(idkd, trained, tmp_path):
    labels = [i % 2 for i in range(40)]  # ants and bees
    write(tmp_path / "set", "test", labels, seed=1, names=["bee", "ant"])
    assert accuracy(idkd, trained, *given(tmp_path / "set")) > 0.9
    assert "note: data.private: the test images have 2 classes of 4, without cat, dog" in idkd.said.err
    images, notes = lightning_idkd.load(trained).test_images()
    assert (images.classes, notes) == (tuple(NAMES), [])


@pytest.mark.parametrize(("names", "said"), [
    (["ant", "bee", "cat", "emu"],
     "has classes that are not trained on: emu and lacks dog; trained on: ant, bee, cat, dog"),
    (["a", "b", "c", "d"],
     "has classes that are not trained on: a, b, c, d and lacks ant, bee, cat, dog; trained on: ant, bee"),
])  # fmt: skip
def test_evaluate_refuses_other_classes_by_name(idkd, trained, tmp_path, names, said):
    write(tmp_path / "set", "test", LABELS[:40], seed=1, names=names, values=LABELS[:40])
    assert idkd("evaluate", str(trained), *given(tmp_path / "set")) == 2
    assert idkd.said.err.startswith(f"error: data.private: the test part {said}")


def test_evaluate_says_where_images_are_stored_in_another_shape(idkd, trained, tmp_path):
    arrays = quadrants(LABELS[:40], seed=1).repeat(2, axis=1).repeat(2, axis=2)
    write_parquet(tmp_path / "test-0.parquet", np.repeat(arrays[..., None], 3, axis=3), LABELS[:40], names=NAMES)
    right = json.loads((trained / "summary.json").read_text())["accuracy"]["consensus"]
    assert accuracy(idkd, trained, *given(tmp_path)) == pytest.approx(right)
    stored = "the images are stored as 16x16 RGB, those of the run's test as 8x8 grey; both are brought to 8x8 grey"
    assert idkd.said.err == f"note: data.private: {stored}\n"


def test_evaluate_says_where_the_runs_own_test_images_have_changed(idkd, tmp_path):
    both(tmp_path / "set")
    assert idkd("fit", *given(tmp_path / "set"), epochs=1) == 0
    accuracy(idkd, latest(tmp_path))
    assert idkd.said.err == ""
    write(tmp_path / "set", "test", LABELS[:40], seed=9)
    accuracy(idkd, latest(tmp_path))
    assert idkd.said.err.startswith("note: data.private: the test images have changed since the run (other pixels")


def test_evaluate_says_where_the_runs_public_images_have_changed(idkd, tmp_path):
    both(tmp_path / "set")
    write(tmp_path / "public", "train", seed=5)
    sets = [*given(tmp_path / "set"), *given(tmp_path / "public", "public")]
    assert idkd("fit", *sets, "--distillation", "VanillaKD", "--distillation.start", "1") == 0, idkd.said.err
    accuracy(idkd, latest(tmp_path))
    assert idkd.said.err == ""
    write(tmp_path / "public", "train", seed=6)
    accuracy(idkd, latest(tmp_path))
    assert idkd.said.err.startswith("note: data.public: the images have changed since the run (other pixels")


# --- labels that are there or not


def test_numbers_from_one_are_four_classes_in_both_parts_and_said_once(idkd, tmp_path):
    write(tmp_path, "train", names=None, values=[label + 1 for label in LABELS])
    write(tmp_path, "test", LABELS[:3], seed=1, names=None, values=[1, 2, 3])
    assert idkd("fit", *given(tmp_path)) == 0, idkd.said.err
    assert "80 test" not in idkd.said.out
    assert idkd.said.out.count("labels have no class names; the 4 values that occur (1, 2, 3, 4) are the classes") == 1
    assert json.loads((latest(tmp_path) / "partition.json").read_text())["data"]["classes"] == ["1", "2", "3", "4"]
    assert idkd("partition", *given(tmp_path), "--graph.nodes", "2", "--out", str(tmp_path / "x.png")) == 0
    assert idkd.said.out.count("the 4 values that occur (1, 2, 3, 4) are the classes") == 1


def test_an_unlabelled_test_split_names_the_labelled_one_and_its_key(idkd, tmp_path):
    both(tmp_path)
    write(tmp_path, "validation", LABELS[:20], seed=1)
    write(tmp_path, "test", LABELS[:20], seed=2, values=[-1] * 20)
    assert idkd("fit", *given(tmp_path)) == 2
    assert "set data.private.test_split to a labelled split: validation\n" in idkd.said.err
    assert idkd("fit", *given(tmp_path), "--data.private.test_split", "validation") == 0, idkd.said.err
    assert " 20 test" in idkd.said.out


@pytest.mark.parametrize(("values", "said"), [
    ([-1] * 80,
     "data.private.path: 80 of 80 images have no label (null, blank or below 0) in 'train-00000-of-00001.parquet'"),
    ([*LABELS[:79], None],
     "data.private.path: 1 of 80 images have no label (null, blank or below 0) in 'train-00000-of-00001.parquet'"),
    ([*LABELS[:79], 4], "data.private.label: 'train-00000-of-00001.parquet' holds 4; allowed: 0 to 3"),
])  # fmt: skip
def test_a_private_set_needs_a_label_for_every_image(idkd, tmp_path, values, said):
    both(tmp_path)
    write(tmp_path, "train", values=values)
    assert idkd("fit", *given(tmp_path)) == 2
    assert idkd.said.err == f"error: {said}; only a public set does without labels\n"


def test_classes_of_one_name_are_refused_in_a_private_set(idkd, tmp_path):
    import datasets

    both(tmp_path)
    assert datasets  # which itself refuses to write such names
    import pyarrow.parquet as pq

    file = tmp_path / "train-00000-of-00001.parquet"
    table = pq.read_table(file)
    noted = table.schema.metadata[b"huggingface"].replace(b'"bee"', b'"ant"')
    pq.write_table(table.replace_schema_metadata({b"huggingface": noted}), file)
    assert idkd("fit", *given(tmp_path)) == 2
    assert idkd.said.err == "error: data.private: several classes have the same name: ant; classes go by name\n"


@pytest.mark.parametrize(
    "kind", ["minus one", "null", "texts", "two columns", "none", "fractions", "lists", "mixed shards"]
)
def test_a_public_set_needs_no_labels(idkd, tmp_path, kind):
    import pyarrow as pa
    import pyarrow.parquet as pq

    both(tmp_path / "set")
    write(tmp_path / "public", "train", LABELS[:24], seed=5)
    file = tmp_path / "public" / "train-00000-of-00001.parquet"
    table = pq.read_table(file)
    columns = {
        "minus one": {"label": [-1] * 24},
        "null": {"label": pa.nulls(24)},
        "texts": {"label": [f"a caption of image {i}" for i in range(24)]},
        "two columns": {"target": [0] * 24, "category": [1] * 24},
        "none": {},
        "fractions": {"label": [0.5] * 24},
        "lists": {"labels": [[0, 1]] * 24},
        "mixed shards": {"label": [0] * 24},
    }[kind]
    images = table.select(["image"]).replace_schema_metadata()
    for name, values in columns.items():
        images = images.append_column(name, values if isinstance(values, pa.Array) else pa.array(values))
    pq.write_table(images, file)
    if kind == "mixed shards":
        for shard, content in enumerate((table, images)):
            pq.write_table(content, tmp_path / "public" / f"train-0000{shard}-of-00002.parquet")
        file.unlink()
    sets = [*given(tmp_path / "set"), *given(tmp_path / "public", "public")]
    assert idkd("fit", *sets, "--distillation", "VanillaKD", "--distillation.start", "1") == 0, idkd.said.err
    assert f"public     {48 if kind == 'mixed shards' else 24} images" in idkd.said.out
