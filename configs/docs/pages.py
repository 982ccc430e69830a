"""Fills the pages of the documentation: classes from their docstrings, and files that lie elsewhere.

Such a page has one of these comments on a line of its own. What follows it on the line is for readers of the file, and
not on the site:

- ``<!-- classes: KEY -->``: a section for every class that a config key takes, and one for their base class.
- ``<!-- kinds -->``: the table of all keys that take classes.
- ``<!-- class: PATH -->``: a section for a class that is no part of a config, by its import path.
- ``<!-- hooks -->``: the table of all hooks.
- ``<!-- file: PATH -->``: the text of a Markdown file of the repository, whose links lead to pages of the site.
- ``<!-- more: FOLDER -->``: the pages of a folder that the list of pages around it does not name.
"""

from __future__ import annotations

import ast
import inspect
import os
import re
import textwrap
from collections.abc import Callable
from functools import cache
from importlib import import_module
from itertools import pairwise
from pathlib import Path

import yaml

from lightning_idkd.callback import HOOKS
from lightning_idkd.command.keys import describe_arguments, gather_classes
from lightning_idkd.config.kinds import summarise

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parents[1]
MARKER = re.compile(r"^<!-- (classes|kinds|class|hooks|file|more)(?:: (\S+))? -->.*$", re.MULTILINE)
PAGES = {
    "README.md": "index",
    "callbacks/README.md": "how_to/own_classes",
    "configs/README.md": "reference/keys",
    "configs/results.md": "results/experiments",
    "configs/label_skew.md": "results/label_skew",
    "tests/README.md": "built/packages",
    "tests/benchmarks/RESULTS.md": "results/measurements",
    "CONTRIBUTING.md": "built/contributing",
}
"""The page that has the text of a file of the repository."""
EXAMPLES = {
    "graph.topology": ("idkd topology --graph.topology {name}{args}", {
        "Dyck32": " --graph.nodes 32",
        "EdgeList": " --graph.topology.file edges.txt",
        "ErdosRenyi": " --graph.topology.p 0.3",
        "Grid": " --graph.topology.rows 4 --graph.topology.cols 4",
        "Karate34": " --graph.nodes 34",
        "NetworkX": " --graph.topology.generator barbell_graph --graph.topology.arguments '{m1: 6, m2: 4}'",
        "Petersen10": " --graph.nodes 10",
        "Social15": " --graph.nodes 15",
        "Social32": " --graph.nodes 32",
        "Torus": " --graph.topology.rows 4 --graph.topology.cols 4",
    }),
    "data.private": ("idkd fit --config ring_digits --data.private {name}{args}", {
        "Concat": " --data.private.parts '[{class_path: Digits, init_args: {limit: 900}}, "
                  "{class_path: Digits, init_args: {skip: 900}}]'",
        "Glyphs": "idkd fit --config ring_digits --data.public Glyphs --data.public.samples 300",
        "HuggingFace": " --data.private.path ylecun/mnist",
        "ImageFolder": " --data.private.path my/images --data.image_size 32",
        "LSUN": " --data.private.path my/lsun --data.image_size 32",
        "Noise": "idkd fit --config ring_digits --data.public Noise --data.public.samples 300",
        "ScikitLearn": "idkd fit --config ring_breast_cancer --data.private ScikitLearn --data.private.name wine",
        "Torchvision": " --data.private.name mnist",
        "Vectors": "idkd fit --config ring_breast_cancer --data.private Vectors --data.private.path my/patients.csv "
                   "--data.private.label diagnosis",
    }),
    "data.partition": ("idkd partition --config ring_digits --data.partition {name}{args}", {
        "Dirichlet": " --data.partition.alpha 0.1",
        "FromFile": " --data.partition.path runs/ring_digits/latest/partition.json",
        "QGMDirichlet": " --data.partition.alpha 0.1",
        "QuantitySkew": " --data.partition.alpha 0.5",
    }),
    "node.network": ("idkd fit --config ring_digits --node.network {name}{args}", {
        "TorchModule": " --node.network.path torchvision.models.resnet18 --data.channels 3",
    }),
    "clock.compute": ("idkd fit --config ring_digits --clock.compute {name}{args}", {
        "Fixed": " --clock.compute.seconds 0.1",
        "LogNormal": " --clock.compute.median 0.1 --clock.compute.sigma 0.3",
        "PerNode": " --graph.nodes 3 --clock.compute.seconds '[0.1, 0.1, 1.0]'",
        "TraceTimes": " --clock.compute.file times.csv",
    }),
    "gossip.compression": ("idkd fit --config ring_digits --gossip ChocoSGD --gossip.compression {name}{args}", {}),
    "gossip.aggregator": (
        "idkd fit --config ring_digits --gossip Robust --gossip.rule DSGD --gossip.aggregator {name}{args}",
        dict.fromkeys(("Krum", "MultiKrum"), " --graph.topology Complete"),
    ),
    "calibration": ("idkd fit --config ring_digits --calibration {name}{args}", {
        "Fixed": " --calibration.probability 0.9",
    }),
    "calibration.score": ("idkd fit --config ring_digits --calibration.score {name}{args}", {
        "PytorchOOD": " --calibration.score.detector KNN --calibration.score.arguments '{k: 1}'",
        "RankEnsemble": " --calibration.score.scores '[MSP, KNN]'",
    }),
    "distillation.teacher.head": (
        "idkd fit --config ring_digits --distillation.teacher Refitted --distillation.teacher.head {name}{args}", {}
    ),
    "distillation.encoding": ("idkd fit --config ring_digits --distillation.encoding {name}{args}", {
        "LaplaceLabels": " --distillation.encoding.epsilon 4",
        "RandomizedResponse": " --distillation.encoding.epsilon 4",
    }),
    "faults": ("idkd fit --config ring_digits --faults '[{{class_path: {name}{args}}}]'", {
        "Liars": ", init_args: {nodes: [3, 8], attack: ALIE}",
        "Stragglers": "idkd fit --config ring_digits --faults '[{class_path: Stragglers}]' "
                      "--clock.compute LogNormal --clock.compute.median 0.1 --clock.compute.sigma 0.3",
        "Trace": ", init_args: {file: presence.csv}",
    }),
    "faults.attack": (
        "idkd fit --config ring_digits --faults "
        "'[{{class_path: Liars, init_args: {{nodes: [3, 8], attack: {name}{args}}}}}]'", {}
    ),
    "faults.labels": (
        "idkd fit --config ring_digits --faults "
        "'[{{class_path: Liars, init_args: {{nodes: [3, 8], labels: {name}{args}}}}}]'", {}
    ),
    "callbacks": ("idkd fit --config ring_digits --callbacks '[{{class_path: {name}{args}}}]'", {}),
}  # fmt: skip
"""By key: the command that shows a class, and the arguments that some classes need; or for a class, its own command.
Another key takes ``idkd fit --config ring_digits --KEY CLASS``."""
NO_FORMULA = ("Source", "Callback", "Encoding", "Architecture")
"""Bases whose classes read files, or do other work that is no formula."""
NOT_THE_FORMULA = {"bears", "check", "on_check", "period_on", "positions", "refuse", "remark", "size", "state_dict",
                   "load_state_dict", "from_probability", "probability", "held_out", "read", "widths"}  # fmt: skip
"""Methods that check, draw or describe, beside those that compute."""


def fill(text: str, page: str) -> str:
    """The Markdown ``text`` of a page, such as ``reference/rules``, with its markers replaced."""

    def replace(marker: re.Match) -> str:
        kind, argument = marker.groups()
        if kind == "classes":
            return write_kind(argument)
        if kind == "kinds":
            return write_table()
        if kind == "class":
            return write_class(argument)
        if kind == "hooks":
            rows = [f"| `{hook}` | `{'`, `'.join(payload)}` |" for hook, payload in HOOKS.items()]
            return "\n".join(["| hook | arguments |", "| --- | --- |", *rows])
        if kind == "file":
            return write_file(argument, page)
        found = sorted(f"{argument}/{path.stem}" for path in (DOCS / argument).glob("*.md"))
        return "\n".join(name for name in found if f"\n{name}\n" not in text)

    return MARKER.sub(replace, text)


@cache
def kinds() -> dict[str, tuple[type, list[str], dict[str, type]]]:
    """By the first of its keys: a base class, all keys that take its classes, and these classes by name."""
    return {keys[0]: (base, keys, classes) for base, (keys, classes) in gather_classes().items()}


def anchor(key: str, name: str) -> str:
    """The name of a class's section in links."""
    return f"{key}-{name}".lower().replace(".", "-")


def write_kind(key: str) -> str:
    base, keys, classes = kinds()[key]
    also = f", also in `{'`, `'.join(keys[1:])}`" if len(keys) > 1 else ""
    lines = [f"The key is `{key}`{also}. A class of your own is named by its import path; its base class is "
             f"[{base.__name__}](#{anchor(key, 'base-' + base.__name__)}).", ""]  # fmt: skip
    for name, cls in classes.items():
        lines += [f"({anchor(key, name)})=", f"### {name}", "", write_docstring(cls), ""]
        if arguments := describe_arguments(cls, "- `"):
            lines += [*map(escape, arguments), ""]
        if base.__name__ not in NO_FORMULA and (code := write_formula(cls, base)):
            lines += ["```python", code, "```", ""]
        lines += ["```sh", example(key, name), "```", ""]
    return "\n".join([*lines, *write_base(key, base)])


def write_base(key: str, base: type) -> list[str]:
    """The section of a base class: what a class of the user's own defines."""
    lines = [f"({anchor(key, 'base-' + base.__name__)})=", f"### The base class {base.__name__}", ""]
    return [*lines, write_docstring(base), "", *describe_members(base), ""]


def write_class(path: str) -> str:
    """A section on a class with what it offers."""
    module, _, name = path.rpartition(".")
    cls = getattr(import_module(module), name)
    return "\n".join(
        [f"({anchor('python', name)})=", f"## {name}", "", write_docstring(cls), "", *describe_members(cls)]
    )


def describe_members(cls: type) -> list[str]:
    """A line for each documented attribute and method of a class."""
    lines = []
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body
    for node, after in pairwise([*body, ast.Pass()]):
        if isinstance(node, ast.AnnAssign) and isinstance(after, ast.Expr):  # an attribute and its docstring
            kind = re.sub(r"^ClassVar\[(.*)\]$", r"\1", ast.unparse(node.annotation).strip("'"))
            default = f" = {ast.unparse(node.value)}" if node.value and "field(" not in ast.unparse(node.value) else ""
            text = " ".join(inspect.cleandoc(after.value.value).split())
            lines.append(f"- `{node.target.id}: {kind}{default}`: {escape(text)}")
    for name, method in vars(cls).items():
        if inspect.isfunction(method) and (name == "__call__" or name[0] != "_") and method.__doc__:
            needed = " (required)" if getattr(method, "__isabstractmethod__", False) else ""
            signature = re.sub(r"(: |-> )'([^']*)'", r"\1\2", str(inspect.signature(method)))
            lines.append(f"- `{name}{signature}`{needed}: {escape(summarise(method))}")
    return lines


def write_docstring(cls: type) -> str:
    """A docstring without its arguments, as Markdown."""
    return escape(re.split(r"^(?:Args|Attributes|Raises|Returns):$", inspect.getdoc(cls) or "", flags=re.MULTILINE)[0])


def escape(text: str) -> str:
    """A docstring's text as Markdown: roles become code or links, and signs that Markdown reads stay as they are."""
    parts = re.split(r"(:\w+:`[^`]+`|``.+?``|`[^`]+`)", text)
    return "".join(link_role(part) if i % 2 else re.sub(r"([*_<\[\]])", r"\\\1", part) for i, part in enumerate(parts))


def link_role(code: str) -> str:
    """A piece of code in a docstring, which leads to its section if it names a class."""
    if not code.startswith(":"):
        return code
    name = code.split("`")[1].split(".")[-1].lstrip("~")
    sections = [anchor(key, name) for key, (_, _, classes) in kinds().items() if name in classes]
    return f"[{name}](#{sections[0]})" if len(sections) == 1 else f"`{name}`"


def write_formula(cls: type, base: type) -> str:
    """The code of the methods by which a class computes, its own and those that it inherits below its base."""
    methods: dict[str, list[str]] = {}
    for owner in cls.__mro__:
        if owner is base or owner.__module__.startswith("lightning_idkd.callback."):
            break
        for name, method in vars(owner).items():
            if not inspect.isfunction(method) or name in NOT_THE_FORMULA or (name[0] == "_" and name != "__call__"):
                continue
            if method.__qualname__.startswith(owner.__name__):  # else a dataclass has made it
                above = methods.setdefault(name, [])
                if not above or f"super().{name}" in above[-1]:
                    above.append(write_code(method))
    entered = sorted(methods, key=lambda name: not hasattr(base, name))  # what the core calls comes first
    return "\n".join(code for name in entered for code in methods[name]).rstrip()


def write_code(method: Callable) -> str:
    """The code of a method without type hints, which a narrow page has no room for."""
    signature = inspect.signature(method)
    plain = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    header = f"def {method.__name__}{signature.replace(parameters=plain, return_annotation=signature.empty)}:\n"
    code = textwrap.dedent(inspect.getsource(method))
    return re.sub(r"^def .*?:\n", lambda _: header, code, count=1, flags=re.DOTALL | re.MULTILINE)


@cache
def presets() -> dict[str, str]:
    """For every gossip rule, the preset of the shortest name that uses it."""
    files = sorted((ROOT / "configs/presets/rules").glob("*.yaml"), key=lambda path: (-len(path.stem), path.stem))
    return {yaml.safe_load(file.read_text())["gossip"]["class_path"]: f"presets/rules/{file.stem}" for file in files}


def example(key: str, name: str) -> str:
    """A command that runs a class."""
    if key == "gossip":
        return f"idkd fit --config ring_digits --config {presets()[name]}"
    command, arguments = EXAMPLES.get(key, (f"idkd fit --config ring_digits --{key} {{name}}{{args}}", {}))
    given = arguments.get(name, "")
    return given if given.startswith("idkd") else command.format(name=name, args=given)


def write_table() -> str:
    """The table of all keys that take classes."""
    lines = ["| config key | base class | classes |", "| --- | --- | --- |"]
    for key, (base, _keys, classes) in kinds().items():
        links = ", ".join(f"[{name}](#{anchor(key, name)})" for name in classes)
        lines.append(f"| `{key}` | [{base.__name__}](#{anchor(key, 'base-' + base.__name__)}) | {links} |")
    return "\n".join(lines)


def write_file(path: str, page: str) -> str:
    """A Markdown file of the repository, whose links and pictures are relative to the page."""
    source = (ROOT / path).parent
    here = (DOCS / page).parent

    def link(match: re.Match) -> str:
        picture, label, target = match.groups()
        file, _, section = target.partition("#")
        place = (source / file).resolve()
        inside = place.relative_to(ROOT).as_posix() if place.is_relative_to(ROOT) else file
        if picture:
            return f"![{label}]({os.path.relpath(place, here)})"
        if not file:
            return match[0]
        if inside in PAGES or place.is_relative_to(DOCS):
            page_file = DOCS / f"{PAGES[inside]}.md" if inside in PAGES else place
            return f"[{label}]({os.path.relpath(page_file, here)}{'#' + section if section else ''})"
        return label if f"`{inside}`" in label or inside in label else f"{label} (`{inside}`)"

    text = (ROOT / path).read_text().partition("\n## Classes\n")[0]  # the pages of classes have more on them
    parts = re.split(r"(^```.*?^```$)", text, flags=re.MULTILINE | re.DOTALL)
    parts[::2] = [re.sub(r"(!?)\[([^\]]*)\]\((?!https?:)([^)\s]+)\)", link, part) for part in parts[::2]]
    title, *others = "\0".join(parts[::2]).partition("\n")  # a page has one title
    parts[::2] = (title + re.sub(r"^# ", "## ", "".join(others), flags=re.MULTILINE)).split("\0")
    return "".join(parts)
