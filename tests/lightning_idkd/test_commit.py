"""A run records the commit of the code that runs, wherever the user stands."""

from __future__ import annotations

import shutil
import subprocess
from importlib import metadata

import pytest

from lightning_idkd import checkout


def git(folder, *arguments) -> str:
    name = ["-c", "user.name=a", "-c", "user.email=a@b"]
    done = subprocess.run(["git", *name, *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A checkout of a package of this name, which takes the place of the one that runs."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    package = tmp_path / "source" / "lightning_idkd"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package.parent / "notes.txt").write_text("a")
    monkeypatch.setattr(checkout, "PACKAGE", package)
    return package.parent


@pytest.fixture
def commit(source) -> str:
    git(source, "init", "--quiet")
    git(source, "add", ".")
    git(source, "commit", "--quiet", "-m", "first")
    return git(source, "rev-parse", "HEAD")


VERSION = f"lightning-idkd {metadata.version('lightning-idkd')}"


def test_it_is_that_of_the_checkout_and_not_of_the_working_folder(commit, tmp_path, monkeypatch):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    git(elsewhere, "init", "--quiet")
    git(elsewhere, "commit", "--quiet", "--allow-empty", "-m", "other")
    monkeypatch.chdir(elsewhere)
    assert checkout.find_commit() == commit


@pytest.mark.parametrize("variable", ["GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"])
def test_git_variables_do_not_change_it(variable, commit, tmp_path, monkeypatch):
    monkeypatch.setenv(variable, str(tmp_path / "nowhere"))
    assert checkout.find_commit() == commit


def test_a_changed_tracked_file_makes_it_dirty(commit, source):
    (source / "notes.txt").write_text("b")
    assert checkout.find_commit() == f"{commit}-dirty"


def test_a_new_file_does_not(commit, source):
    (source / "new.txt").write_text("b")
    assert checkout.find_commit() == commit


def test_a_worktree_has_its_own(commit, source, monkeypatch):
    git(source, "worktree", "add", "--quiet", "../tree")
    tree = source.parent / "tree"
    git(tree, "commit", "--quiet", "--allow-empty", "-m", "second")
    monkeypatch.setattr(checkout, "PACKAGE", tree / "lightning_idkd")
    assert checkout.find_commit() == git(tree, "rev-parse", "HEAD") != commit


def test_an_installed_package_has_its_version(source):
    assert checkout.find_commit() == VERSION


def test_a_repository_around_the_package_is_not_its_checkout(source):
    git(source.parent, "init", "--quiet")
    git(source.parent, "add", ".")
    git(source.parent, "commit", "--quiet", "-m", "around")
    assert checkout.find_commit() == VERSION


def test_a_repository_that_does_not_track_the_package_is_not_its_checkout(source):
    git(source, "init", "--quiet")
    git(source, "add", "notes.txt")
    git(source, "commit", "--quiet", "-m", "without")
    assert checkout.find_commit() == VERSION


@pytest.mark.parametrize("script", [None, "#!/bin/sh\nexit 128\n"], ids=["no git", "git refuses"])
def test_without_git_it_is_the_version(script, commit, tmp_path, monkeypatch):
    if script:
        (tmp_path / "git").write_text(script)
        (tmp_path / "git").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert checkout.find_commit() == VERSION


def test_neither_known_is_null(source, monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    assert checkout.find_commit() is None
