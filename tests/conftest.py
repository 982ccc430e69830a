"""Shared by all tests: a cache of decoded sets for the whole session, and no W&B servers."""

from __future__ import annotations

import functools
import os
from pathlib import Path

import pytest
from docstring_parser import attrdoc

os.environ["WANDB_MODE"] = "offline"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run side by side
ROOT = Path(__file__).resolve().parents[1]


def pytest_collection_modifyitems(items):
    """Begin with the files that have slow tests, so that at the end no worker waits for the others."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_xdist_auto_num_workers(config):
    """One worker more than there are cores, since some tests wait for processes that they start."""
    return (os.cpu_count() or 1) + 1


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory):
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder  # one for all workers
    os.environ.setdefault("IDKD_CACHE", str(folder / "cache"))


@pytest.fixture(scope="session", autouse=True)
def _docstrings_are_read_once():
    """A parser of the command line compiles the source of every class of keys, which takes a third of its time."""
    reader = attrdoc.AttributeDocstrings
    read = functools.cache(functools.partial(reader.get_attr_docs, reader()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reader, "get_attr_docs", lambda self, component: read(component))
        yield


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """Real image sets."""
    folder = os.environ.get("IDKD_DATA")
    if not folder:
        pytest.skip("IDKD_DATA names no folder of real image sets")
    return Path(folder)


@pytest.fixture
def configs() -> Path:
    """The configs of the repository."""
    return ROOT / "configs"
