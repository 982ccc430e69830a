"""The identity of a run's data: which images and classes it uses, compared wherever it reads data again."""

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
    """The identity that goes into a run's ``partition.json`` and checkpoints.

    It has the class names in the order of their numbers, and the identity of each set as it was read
    (:attr:`Images.identity`). The public set's is without labels, since a run does not use them.
    """
    of_public = None if public is None else {k: v for k, v in public.identity.items() if k != "labels"}
    return {"classes": list(train.classes), "train": train.identity, "test": test.identity, "public": of_public}


def describe_change(now: dict | None, before: dict | None) -> str | None:
    """The difference between two identities of a set, in words; None where there is none, or where one is not known."""
    if now is None or before is None:
        return None
    if now["images"] != before["images"]:
        return f"{now['images']:,} images, not {before['images']:,}"
    shape, before_shape = (f"{i['size']}x{i['size']} with {i['channels']} channels" for i in (now, before))
    if shape != before_shape:
        return f"{shape}, not {before_shape}"
    for part in ("pixels", "labels"):
        if now.get(part, before.get(part)) != before.get(part, now.get(part)):
            return f"other {part}, or the same in another order"
    return None


def check(now: dict, before: dict | None, sets: Sequence[str], where: str) -> None:
    """Refuse data that are not those of an earlier run.

    Args:
        now: what `record` returns for the data.
        before: what it returned for the run's data; None for a run from before identities were recorded.
        sets: which of train, test and public to compare.
        where: the run, for the message.

    Raises:
        UserError: a set has other images or labels.
    """
    for name in sets if before else ():
        if change := describe_change(now[name], before[name]):
            raise UserError(f"{SETS[name]} are not those of '{where}' ({change}); its files have changed")


def renumber(images: Images, classes: Sequence[str], what: str) -> Images:
    """The images with their labels numbered by ``classes``, whatever the order of their own classes is.

    Raises:
        UserError: an image has a class that is not among them. ``what`` names the set, after its config key.
    """
    if images.classes == tuple(classes):
        return images
    if extra := [name for name in images.occurring() if name not in classes]:
        missing = [name for name in classes if name not in images.classes]
        has = f"{what} has classes that are not trained on: {abridge(extra)}"
        lacks = f" and lacks {abridge(missing)}" if missing else ""
        raise UserError(f"{has}{lacks}; trained on: {abridge(classes)}")
    return images.named(classes)


def collect_notes(*sets: tuple[str, Images | None]) -> list[str]:
    """The notes of some sets, each note once and after the set's config key."""
    notes: dict[str, None] = {}
    for key, images in sets:
        if images is not None:
            notes |= dict.fromkeys(f"{key}{note}" for note in images.notes)
    return list(notes)


def abridge(names: Sequence[str]) -> str:
    """The first five of many names, for a message."""
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
