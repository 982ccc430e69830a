"""Imports go one way, and the command line's do not reach torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CORE = sorted((ROOT / "lightning_idkd").rglob("*.py"))
HEAVY = ("torch", "lightning", "torchvision", "torchmetrics", "datasets", "sklearn", "matplotlib", "PIL", "pyarrow", "wandb")


def tree(path):
    return ast.parse((ROOT / path).read_text(encoding="utf-8"))


def imported(path):
    """Every module that a file imports anywhere: by statement, or by name through ``import_module``."""
    found = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            found |= {a.value for a in node.args if isinstance(a, ast.Constant)}
    return found


def reaches(path, *packages):
    return sorted(m for m in imported(path) if any(m == p or m.startswith(f"{p}.") for p in packages))


def test_the_reader_of_imports_sees_them(tmp_path):
    source = "import a.b\ndef f():\n    from c import d\n    import_module('e')\n    x.import_module('g')\n"
    (tmp_path / "file.py").write_text(source)
    assert imported(tmp_path / "file.py") == {"a.b", "c", "c.d", "e", "g"}
    assert reaches(tmp_path / "file.py", "a", "e") == ["a.b", "e"]


@pytest.mark.parametrize("path", CORE, ids=lambda p: str(p.relative_to(ROOT)))
def test_the_core_does_not_import_callbacks(path):
    assert not reaches(path, "callbacks")


def test_only_the_command_line_names_callbacks():
    """As the plugin package to import, and in default class paths."""
    named = [
        path.relative_to(ROOT).as_posix()
        for path in CORE
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("callbacks.")
    ]
    assert set(named) <= {"lightning_idkd/cli.py"}
    (plugins,) = (n for n in tree("lightning_idkd/cli.py").body if isinstance(n, ast.Assign) and n.targets[0].id == "PLUGINS")
    assert "callbacks" in ast.literal_eval(plugins.value)


def test_graph_needs_no_torch():
    for path in ["lightning_idkd/graph.py", *sorted((ROOT / "lightning_idkd" / "topologies").glob("*.py"))]:
        assert not reaches(path, *HEAVY[:4]), path


def test_network_knows_nothing_of_training():
    training = ("orchestrator", "stack", "node", "data", "callback", "schedule", "fit")
    assert not reaches("lightning_idkd/network.py", "lightning", *(f"lightning_idkd.{m}" for m in training))


def test_stack_knows_no_graph_and_no_data():
    assert not reaches("lightning_idkd/stack.py", "networkx", *(f"lightning_idkd.{m}" for m in ("graph", "network", "data")))


def test_a_node_knows_no_other():
    assert not reaches("lightning_idkd/node.py", "lightning_idkd")


def test_data_know_no_models():
    for path in sorted((ROOT / "lightning_idkd" / "data").glob("*.py")):
        assert not reaches(path, *(f"lightning_idkd.{m}" for m in ("models", "node", "stack", "orchestrator"))), path


def test_the_command_line_and_all_config_classes_import_nothing_heavy():
    code = (
        "import sys, lightning_idkd, lightning_idkd.cli, callbacks, lightning_idkd.data, lightning_idkd.models\n"
        "lightning_idkd.cli.parser()\n"
        f"print(*[m for m in {HEAVY!r} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []
