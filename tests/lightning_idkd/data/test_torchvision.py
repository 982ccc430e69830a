"""Every set of torchvision, read from a few pictures in torchvision's own files; nothing is downloaded."""

from __future__ import annotations

import hashlib
import pickle
import struct
import urllib.request

import numpy as np
import pytest
import torchvision.datasets as tv
from PIL import Image

from lightning_idkd.config.parse import configure
from lightning_idkd.data import torchvision as module
from lightning_idkd.data.torchvision import SETS, Torchvision
from lightning_idkd.errors import UserError


@pytest.fixture(autouse=True)
def _alone(tmp_path, monkeypatch):
    def refused(*args, **kwargs):
        raise ConnectionError("the tests have no network")

    monkeypatch.setenv("IDKD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(urllib.request, "urlopen", refused)
    monkeypatch.setattr(urllib.request, "urlretrieve", refused)


def pictures(n: int, size: int, seed: int, grey: bool = False) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, size, size) if grey else (n, size, size, 3), np.uint8)


def md5(file) -> str:
    return hashlib.md5(file.read_bytes()).hexdigest()


def write_cifar(kind, root, patch):
    folder, train, test = root / kind.base_folder, pictures(5, 32, 0), pictures(2, 32, 1)
    folder.mkdir()
    names, fine = [f"kind {i}" for i in range(10)], kind is tv.CIFAR100

    def write(name, content):
        (folder / name).write_bytes(pickle.dumps(content))
        return [name, md5(folder / name)]

    def batch(pixels, labels):  # a row is all red, then all green, then all blue
        other = {"coarse_labels": [0] * len(labels)} if fine else {}
        return {
            "data": pixels.transpose(0, 3, 1, 2).reshape(len(pixels), -1),
            "fine_labels" if fine else "labels": labels,
        } | other

    parts = [slice(0, 5)] if fine else [slice(i, i + 1) for i in range(5)]
    labels = [3, 0, 9, 1, 1]
    files = [
        write(name, batch(train[part], labels[part])) for (name, _), part in zip(kind.train_list, parts, strict=True)
    ]
    patch.setattr(kind, "train_list", files)
    patch.setattr(kind, "test_list", [write(kind.test_list[0][0], batch(test, [2, 0]))])
    meta = write(kind.meta["filename"], {kind.meta["key"]: names, "coarse_label_names": ["all"]})
    patch.setattr(kind, "meta", kind.meta | {"md5": meta[1]})
    return names, {"train": (train, labels), "test": (test, [2, 0])}


def write_mnist(kind, root, patch):
    folder = root / kind.__name__ / "raw"
    folder.mkdir(parents=True)
    parts = {"train": (pictures(4, 28, 2, grey=True), [9, 0, 3, 3]), "test": (pictures(2, 28, 3, grey=True), [1, 7])}
    for name, (pixels, labels) in zip(("train", "t10k"), parts.values(), strict=True):
        (folder / f"{name}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 2051, *pixels.shape) + pixels.tobytes())
        (folder / f"{name}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, len(labels)) + bytes(labels))
    return kind.classes, parts


def write_svhn(root, patch):
    from scipy.io import savemat

    parts = {"train": (pictures(4, 32, 4), [9, 0, 3, 0]), "test": (pictures(2, 32, 5), [9, 0])}
    files = {}
    for split, (pixels, labels) in parts.items():
        file = root / f"{split}_32x32.mat"
        stored = np.array([[label or 10] for label in labels], np.uint8)  # the digit 0 is class 10
        savemat(file, {"X": pixels.transpose(1, 2, 3, 0), "y": stored})
        files[split] = ["", file.name, md5(file)]
    patch.setattr(tv.SVHN, "split_list", files)
    return list("0123456789"), parts


def write_files(files, pixels):
    """PNG content, so that pixels can be compared; Pillow does not mind the ending."""
    for file, array in zip(files, pixels, strict=True):
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(file, "png")


def write_imagenette(root, patch):
    parts, kinds = {}, ["n01440764", "n02102040", "n03394916"]
    for seed, (split, stored) in enumerate({"train": "train", "test": "val"}.items(), 6):
        parts[split] = (pictures(6, 8, seed), [0, 0, 1, 1, 2, 2])
        folder = root / "imagenette2-160" / stored
        write_files([folder / kind / f"{kind}_{i}.JPEG" for kind in kinds for i in range(2)], parts[split][0])
    patch.setattr(module, "IMAGENETTE", {"train": 6, "test": 6})
    return ["tench", "English springer", "French horn"], parts


def write_textures(root, patch):
    pixels, kinds, base = pictures(6, 8, 8), ["dotted", "banded"], root / "dtd" / "dtd"
    (base / "labels").mkdir(parents=True)
    for i, split in enumerate(("train", "val", "test")):
        names = [f"{kind}/{kind}_{i:04}.jpg" for kind in kinds]
        write_files([base / "images" / name for name in names], pixels[2 * i : 2 * i + 2])
        (base / "labels" / f"{split}1.txt").write_text("".join(f"{name}\n" for name in names))
    return ["banded", "dotted"], {"train": (pixels[:4], [1, 0, 1, 0]), "test": (pixels[4:], [1, 0])}


def write_places(root, patch):
    pixels, labels = pictures(3, 8, 9), [2, 0, 2]
    names = [f"Places365_val_0000000{i + 1}.jpg" for i in range(3)]
    write_files([root / "val_256" / name for name in names], pixels)
    categories, val = root / "categories_places365.txt", root / "places365_val.txt"
    categories.write_text("/a/airfield 0\n/a/alley 1\n/z/zen_garden 2\n")
    val.write_text("".join(f"{name} {label}\n" for name, label in zip(names, labels, strict=True)))
    patch.setattr(tv.Places365, "_CATEGORIES_META", (categories.name, md5(categories)))
    patch.setattr(tv.Places365, "_FILE_LIST_META", {"val": (val.name, md5(val))})
    return ["/a/airfield", "/a/alley", "/z/zen_garden"], {"train": (pixels, labels)}


WRITERS = {
    "cifar10": lambda root, patch: write_cifar(tv.CIFAR10, root, patch),
    "cifar100": lambda root, patch: write_cifar(tv.CIFAR100, root, patch),
    "mnist": lambda root, patch: write_mnist(tv.MNIST, root, patch),
    "fashion_mnist": lambda root, patch: write_mnist(tv.FashionMNIST, root, patch),
    "svhn": write_svhn,
    "imagenette": write_imagenette,
    "textures": write_textures,
    "places365": write_places,
}


@pytest.mark.parametrize("download", [False, True])
@pytest.mark.parametrize("name", SETS)
def test_a_set_that_is_there_is_read_as_it_is_without_a_network(name, download, tmp_path, monkeypatch):
    classes, parts = WRITERS[name](tmp_path, monkeypatch)
    for split, (pixels, labels) in parts.items():
        images = Torchvision(name, str(tmp_path), download).load(split)
        wanted = pixels[:, None] if pixels.ndim == 3 else pixels.transpose(0, 3, 1, 2)
        assert np.array_equal(images.pixels.numpy(), wanted)
        assert (images.labels.tolist(), images.classes) == (labels, tuple(classes))


def test_classes_and_limit_cut_a_set_down(tmp_path, monkeypatch):
    _, parts = write_mnist(tv.FashionMNIST, tmp_path, monkeypatch)
    source = Torchvision("fashion_mnist", str(tmp_path), False, classes=["Dress", "Ankle boot"], limit=2)
    images = source.load("train")
    assert images.classes == ("Dress", "Ankle boot")
    assert len(images) == 2
    chosen = [parts["train"][0].tolist().index(pixels) for pixels in images.pixels[:, 0].tolist()]
    assert [{3: 0, 9: 1}[parts["train"][1][i]] for i in chosen] == images.labels.tolist()


@pytest.mark.parametrize("name", SETS)
def test_missing_files_are_explained(name, tmp_path):
    with pytest.raises(UserError, match=rf"^data\.public\.path: .* {name} files .* set data\.public\.download to true"):
        Torchvision(name, str(tmp_path), download=False).load("train", key="data.public")


# places365 asks for its lists before it looks for a network
@pytest.mark.parametrize("name", sorted(set(SETS) - {"places365"}))
def test_a_download_without_a_network_is_explained_in_one_line(name, tmp_path):
    with pytest.raises(UserError, match=r"^data\.private\.path: .* cannot be downloaded \(") as told:
        Torchvision(name, str(tmp_path)).load("train")
    assert "\n" not in str(told.value)


def test_a_changed_file_is_refused_where_torchvision_knows_its_checksum(tmp_path, monkeypatch):
    write_svhn(tmp_path, monkeypatch)
    with (tmp_path / "train_32x32.mat").open("ab") as file:
        file.write(b"x")
    with pytest.raises(UserError, match=r"does not hold the complete svhn files"):
        Torchvision("svhn", str(tmp_path), download=False).load("train")


def test_an_archive_that_was_unpacked_half_way_is_refused(tmp_path, monkeypatch):
    write_imagenette(tmp_path, monkeypatch)
    (tmp_path / "imagenette2-160" / "train" / "n03394916" / "n03394916_1.JPEG").unlink()
    with pytest.raises(UserError, match=r"^data\.private\.path: .*imagenette2-160.* 5 of 6 .*delete"):
        Torchvision("imagenette", str(tmp_path)).load("train")
    assert len(Torchvision("imagenette", str(tmp_path)).load("test")) == 6


@pytest.mark.parametrize("name", ["textures", "places365"])
def test_a_broken_file_is_named(name, tmp_path, monkeypatch):
    WRITERS[name](tmp_path, monkeypatch)
    file = sorted(tmp_path.rglob("*.jpg"))[0]
    file.write_bytes(b"no image")
    with pytest.raises(UserError, match=rf"^data\.public: '{file}' cannot be decoded"):
        Torchvision(name, str(tmp_path)).load("train", key="data.public")


def test_a_wrong_name_is_reported_with_the_nearest():
    with pytest.raises(
        UserError, match=r"no set 'cifar-100'\. Did you mean 'cifar100'\? Allowed: cifar10, .*, places365"
    ):
        Torchvision("cifar-100")


def test_places365_has_no_test_part(tmp_path, monkeypatch):
    write_places(tmp_path, monkeypatch)
    with pytest.raises(UserError, match=r"^data\.private\.name: places365 has no test part"):
        Torchvision("places365", str(tmp_path)).load("test")


def test_sets_are_chosen_on_the_command_line():
    private = ["--data.private", "Torchvision", "--data.private.name", "svhn", "--data.private.classes", "['0', '7']"]
    public = ["--data.public", "Torchvision", "--data.public.name", "places365", "--data.public.limit", "100"]
    config = configure([*private, *public])
    assert config.data.private == Torchvision("svhn", classes=["0", "7"])
    assert config.data.public == Torchvision("places365", limit=100)
    with pytest.raises(UserError, match=r"no set 'svnh'.*Did you mean 'svhn'"):
        configure(["--data.private", "Torchvision", "--data.private.name", "svnh"])
