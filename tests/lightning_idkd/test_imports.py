"""Imports go down one list, in no circle, and the command line's do not reach torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import networkx as nx
import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "lightning_idkd"
ORDER = (
    "__main__", "cli", "command", "sweep", "analysis", "training", "records", "config", "losses", "callback", "node",
    "nodes", "models", "data", "clock", "network", "transport", "lies", "links", "graph", "topologies", "mixing",
    "labels", "metrics", "schedule", "randomness", "colours", "files", "checksum", "machine", "checkout", "errors",
)  # fmt: skip
"""Packages and modules of the core. Each imports only from those behind it; the package itself may name all of them."""
CALLBACKS = "lightning_idkd.callbacks"
HEAVY = ("torch", "lightning", "torchvision", "torchmetrics", "datasets", "sklearn",
         "matplotlib", "PIL", "pyarrow", "wandb")  # fmt: skip


def name_of(path: Path) -> str:
    """The import name of a module."""
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    return name if name.startswith(PACKAGE) else f"{PACKAGE}.{name}"


MODULES = {name_of(path): path for folder in (PACKAGE, "callbacks") for path in sorted((ROOT / folder).rglob("*.py"))}
CORE = [module for module in MODULES if module.startswith(f"{PACKAGE}.") and not module.startswith(CALLBACKS)]


def imported(path: Path, modules=MODULES) -> set[str]:
    """Every module that a file imports anywhere: by statement, for types alone, or by a name in ``import_module``."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = node.module
            if node.level:  # only the folder that lies at two places has these
                assert path.is_relative_to(ROOT / "callbacks"), f"{path}: relative import"
                folder = name_of(path.parents[node.level - 1])
                module = f"{folder}.{module}" if module else folder
            below = {f"{module}.{alias.name}" for alias in node.names} & modules.keys()
            names |= below or {module}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            names |= {a.value for a in node.args if isinstance(a, ast.Constant)}
    return names


def unit(module: str) -> str:
    """The part of the core that a module belongs to."""
    return module.split(".")[1]


def test_the_reader_of_imports_sees_them(tmp_path):
    source = "import a.b\ndef f():\n    from c import d, e\n    import_module('e')\n    x.import_module('g')\n"
    source += "if TYPE_CHECKING:\n    import t\n"
    (tmp_path / "file.py").write_text(source)
    assert imported(tmp_path / "file.py", {"c.d": None}) == {"a.b", "c.d", "e", "g", "t"}


def test_the_list_has_every_part_of_the_core():
    assert {unit(m) for m in CORE} == set(ORDER)


@pytest.mark.parametrize("module", CORE)
def test_a_module_imports_only_from_further_down(module):
    """Type-only imports count too."""
    place = ORDER.index(unit(module))
    for other in imported(MODULES[module]):
        assert other.split(".")[0] != "callbacks"
        assert not other.startswith(CALLBACKS)
        if other.startswith(f"{PACKAGE}."):
            assert ORDER.index(unit(other)) >= place, f"{module} imports {other}"
        assert other != PACKAGE


def test_no_modules_import_each_other_in_a_circle():
    graph = nx.DiGraph(
        (m, other) for m, path in MODULES.items() for other in imported(path) & MODULES.keys() if m != PACKAGE
    )
    assert not [sorted(circle) for circle in nx.strongly_connected_components(graph) if len(circle) > 1]
    assert not list(nx.selfloop_edges(graph))


def test_the_core_names_callbacks_in_one_place():
    """The parser imports them by that name, and has default class paths of it."""
    named = set()
    for module in CORE:
        for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith(CALLBACKS):
                named.add(module)
    assert named == {f"{PACKAGE}.checkout"}


def test_graph_needs_no_torch():
    for module, path in MODULES.items():
        if module.startswith(f"{PACKAGE}.graph") or module.startswith(f"{PACKAGE}.topologies"):
            assert not {m.split(".")[0] for m in imported(path)} & set(HEAVY[:4]), module


def test_the_stack_knows_no_graph_and_no_data():
    for module, path in MODULES.items():
        if module.startswith(f"{PACKAGE}.nodes."):
            known = {unit(m) for m in imported(path) if m.startswith(f"{PACKAGE}.")}
            assert not known & {"graph", "network", "data"}, module
            assert "networkx" not in imported(path), module


def test_data_know_no_models():
    for module, path in MODULES.items():
        if module.startswith(f"{PACKAGE}.data."):
            assert f"{PACKAGE}.models" not in {".".join(m.split(".")[:2]) for m in imported(path)}, module


def test_the_command_line_and_all_config_classes_import_nothing_heavy():
    code = (
        "import sys, lightning_idkd, lightning_idkd.cli, lightning_idkd.callbacks\n"
        "import lightning_idkd.data, lightning_idkd.models\n"
        "import lightning_idkd.config.parse\n"
        "lightning_idkd.config.parse.parser()\n"
        f"print(*[m for m in {HEAVY!r} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []
