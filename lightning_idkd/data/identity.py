"""Which images and classes a run has seen, and the comparison wherever it meets data again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lightning_idkd.errors import UserError

if TYPE_CHECKING:
    from lightning_idkd.data.images import Images

SETS = {
    "train": "data.private: the training images",
    "test": "data.private: the test images",
    "public": "data.public: the images",
}


def record(train: Images, test: Images, public: Images | None) -> dict:
    """What goes into a run's ``partition.json`` and checkpoints: the class names in the order of their numbers, and the identity
    of each set as it was read (:attr:`Images.identity`), for the public set without its labels, which no run uses."""
    common = None if public is None else {k: v for k, v in public.identity.items() if k != "labels"}
    return {"classes": list(train.classes), "train": train.identity, "test": test.identity, "public": common}


def changed(now: dict | None, before: dict | None) -> str | None:
    """What differs between two identities of a set, in words; None where nothing does, or one of them is not known."""
    if now is None or before is None:
        return None
    if now["images"] != before["images"]:
        return f"{now['images']:,} images, not {before['images']:,}"
    shapes = [f"{i['size']}x{i['size']} with {i['channels']} channels" for i in (now, before)]
    if shapes[0] != shapes[1]:
        return f"{shapes[0]}, not {shapes[1]}"
    for part in ("pixels", "labels"):
        if now.get(part, before.get(part)) != before.get(part, now.get(part)):
            return f"other {part}, or the same in another order"
    return None


def check(now: dict, before: dict | None, sets: Sequence[str], where: str) -> None:
    """Refuse data other than those of the run ``before``.

    Args:
        now, before: what `record` gives; None for a run that is older than this.
        sets: which of train, test and public to compare.
        where: the run, for the message.

    Raises:
        UserError: a set has other images or labels.
    """
    for name in sets if before else ():
        if found := changed(now[name], before[name]):
            raise UserError(f"{SETS[name]} are not those of '{where}' ({found}); its files have changed")


def by_name(images: Images, classes: Sequence[str], what: str) -> Images:
    """The images with their labels numbered by ``classes``, whatever their own order is.

    Raises:
        UserError: an image has a class that is not among them. ``what`` names the set after its config key.
    """
    if images.classes == tuple(classes):
        return images
    if extra := [name for name in images.occurring() if name not in classes]:
        missing = [name for name in classes if name not in images.classes]
        lacks = f" and lacks {listed(missing)}" if missing else ""
        raise UserError(f"{what} has classes that are not trained on: {listed(extra)}{lacks}; trained on: {listed(classes)}")
    return images.named(classes)


def notes(*sets: tuple[str, Images | None]) -> list[str]:
    """What is odd about some sets, each oddity once; every set with the config key that named it."""
    return list(dict.fromkeys(f"{key}{note}" for key, images in sets if images is not None for note in images.notes))


def listed(names: Sequence[str]) -> str:
    """The first few of many names."""
    return ", ".join(names[:5]) + ", ..." * (len(names) > 5)
