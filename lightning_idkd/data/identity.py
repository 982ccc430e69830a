"""The identity of a run's data: which samples and classes it uses, compared wherever it reads data again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lightning_idkd.data.inputs import restore
from lightning_idkd.errors import UserError

if TYPE_CHECKING:
    from lightning_idkd.data.samples import Samples

SETS = {"train": "data.private: the training", "test": "data.private: the test", "public": "data.public: the"}


def record(train: Samples, test: Samples, public: Samples | None) -> dict:
    """The identity that goes into a run's ``partition.json`` and checkpoints.

    It has the class names in the order of their numbers, and the identity of each set as it was read
    (:attr:`Samples.identity`). The public set's is without labels, since a run does not use them.
    """
    of_public = None if public is None else {k: v for k, v in public.identity.items() if k != "labels"}
    return {"classes": list(train.classes), "train": train.identity, "test": test.identity, "public": of_public}


def describe_change(now: dict | None, before: dict | None) -> str | None:
    """The difference between two identities of a set, in words; None where there is none, or where one is not known."""
    if now is None or before is None:
        return None
    form, form_before = restore(now), restore(before)
    if now["images"] != before["images"]:
        return f"{now['images']:,} {form.plural}, not {before['images']:,}"
    if form.facts() != form_before.facts():
        return f"{form}, not {form_before}"
    for part in ("pixels", "labels"):
        if now.get(part, before.get(part)) != before.get(part, now.get(part)):
            name = "values" if part == "pixels" and form.plural != "images" else part
            return f"other {name}, or the same in another order"
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
            what = restore(now[name]).plural
            raise UserError(f"{SETS[name]} {what} are not those of '{where}' ({change}); its files have changed")


def renumber(samples: Samples, classes: Sequence[str], what: str) -> Samples:
    """The samples with their labels numbered by ``classes``, whatever the order of their own classes is.

    Raises:
        UserError: a sample has a class that is not among them. ``what`` names the set, after its config key.
    """
    if samples.classes == tuple(classes):
        return samples
    if extra := [name for name in samples.occurring_classes() if name not in classes]:
        missing = [name for name in classes if name not in samples.classes]
        has = f"{what} has classes that are not trained on: {abridge(extra)}"
        lacks = f" and lacks {abridge(missing)}" if missing else ""
        raise UserError(f"{has}{lacks}; trained on: {abridge(classes)}")
    return samples.renumber(classes)


def collect_notes(*sets: tuple[str, Samples | None]) -> list[str]:
    """The notes of some sets, each note once and after the set's config key."""
    notes: dict[str, None] = {}
    for key, samples in sets:
        if samples is not None:
            notes |= dict.fromkeys(f"{key}{note}" for note in samples.notes)
    return list(notes)


def abridge(names: Sequence[str]) -> str:
    """The first five of many names, for a message."""
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
