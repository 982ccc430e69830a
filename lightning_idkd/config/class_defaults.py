"""Makes a class that is named start from its own defaults.

When a class replaces the one that an earlier file or the parser's default named, jsonargparse passes on every argument
that both classes have. Nobody has chosen that combination: `DSGD` would train with the momentum of the `QGDSGDm` that
it replaces. With this module arguments survive only where the same class is named again, or none is."""

from __future__ import annotations

from jsonargparse import _typehints

REPLACED = "discard_init_args_on_class_path_change"
"""The function of jsonargparse that this module replaces; it keeps the arguments that the new class has too."""


def drop_arguments(parser_or_action, before, named) -> None:
    """Drop the arguments of the class spec ``before`` where the class spec ``named`` names another class."""
    if not before or "init_args" not in before:
        return
    if before["class_path"] is None:  # the arguments of a group of keys, which has one class only
        return
    paths = before["class_path"], named["class_path"]
    if paths[0] != paths[1] and len(set(map(_typehints.import_object, paths))) > 1:  # a class may have several paths
        for key in list(before["init_args"].keys(branches=True, nested=False)):
            before["init_args"].pop(key)


def apply() -> None:
    """Make :func:`drop_arguments` the rule for every parser of this process."""
    if not hasattr(_typehints, REPLACED):
        raise ImportError(
            f"jsonargparse no longer has {REPLACED}, so a class would take arguments of the one it replaces"
        )
    setattr(_typehints, REPLACED, drop_arguments)
