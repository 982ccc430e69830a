"""A class that is named starts from its own defaults.

jsonargparse hands the arguments of the class that stood at a key before, of an earlier file or the parser's default, to a class
that takes its place, wherever both have an argument of that name. Nobody has combined these: `DSGD` would train with the momentum
of the `QGDSGDm` it replaces. Here arguments survive only where the same class is named again, or none is.
"""

from __future__ import annotations

from jsonargparse import _typehints

REPLACED = "discard_init_args_on_class_path_change"
"""jsonargparse's own function, which keeps the arguments that the new class has too."""


def start_afresh(parser_or_action, before, named) -> None:
    """Drop the arguments of the class spec ``before`` where the class spec ``named`` names another class."""
    if not before or "init_args" not in before or before["class_path"] is None:  # None: arguments of a group, which has one class
        return
    paths = before["class_path"], named["class_path"]
    if paths[0] != paths[1] and len(set(map(_typehints.import_object, paths))) > 1:  # a class may have several paths
        for key in list(before["init_args"].keys(branches=True, nested=False)):
            before["init_args"].pop(key)


def apply() -> None:
    """Make this the rule for every parser of this process."""
    if not hasattr(_typehints, REPLACED):
        raise ImportError(f"jsonargparse has no {REPLACED} any more: classes would lend each other arguments")
    setattr(_typehints, REPLACED, start_afresh)
