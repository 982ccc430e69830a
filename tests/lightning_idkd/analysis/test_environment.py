"""What ``idkd doctor`` finds on this machine and on machines that lack something."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from lightning_idkd.analysis import environment
from lightning_idkd.cli import main


def rows(check):
    """The findings of a check by name: value, state and advice."""
    found = [environment.Finding("", *row) for row in check()]
    return {finding.name: finding for finding in found}


@pytest.fixture
def versions(monkeypatch):
    """Replaces installed versions; None takes a package away."""
    real, changed = metadata.version, {}

    def version(package):
        if changed.get(package, "") is None:
            raise metadata.PackageNotFoundError(package)
        return changed.get(package) or real(package)

    monkeypatch.setattr(metadata, "version", version)
    return changed


@pytest.fixture
def bare(monkeypatch):
    """An environment without programs and without variables that matter."""
    for name in list(os.environ):
        if environment.LAUNCHERS.fullmatch(name) or environment.SETTINGS.fullmatch(name):
            monkeypatch.delenv(name)
    monkeypatch.setenv("PATH", "/nowhere")
    return monkeypatch


def program(folder, name, prints):
    """Write a program that prints a line."""
    file = folder / name
    file.write_text(f"#!/bin/sh\necho '{prints}'\n")
    file.chmod(0o755)


def test_it_needs_no_torch_and_prints_no_key_token_or_name_of_the_home(tmp_path):
    (tmp_path / ".cache" / "huggingface").mkdir(parents=True)
    (tmp_path / ".cache" / "huggingface" / "token").write_text("hf_secret")
    secrets = {
        "WANDB_API_KEY": "s3cret" * 7,
        "HF_TOKEN": "hf_secret",
        "HOME": str(tmp_path),
        "MASTER_ADDR": "host.secret",
    }
    env = {k: v for k, v in os.environ.items() if k not in ("IDKD_CACHE", "WANDB_MODE")} | secrets
    code = "import sys; from lightning_idkd.cli import main; print(main(['doctor']), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env | {"PATH": "/bin"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "0 False"
    assert "W&B               logged in" in done.stdout
    assert "~/.cache/lightning_idkd, not there yet" in done.stdout
    for secret in ("s3cret", "secret", str(tmp_path)):
        assert secret not in done.stdout


def test_json_and_exit_status_say_what_is_wrong(versions, capsys, bare, tmp_path):
    bare.setenv("WANDB_MODE", "offline")
    assert main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ok"]
    versions["torchvision"] = None
    bare.setenv("IDKD_DATA", str(tmp_path / "none"))
    assert main(["doctor", "--json"]) == 1
    said = json.loads(capsys.readouterr().out)
    wrong = [finding["name"] for finding in said["findings"] if finding["state"] == "wrong"]
    assert (said["ok"], wrong) == (False, ["torchvision", "IDKD_DATA"])
    assert main(["doctor"]) == 1
    assert capsys.readouterr().out.endswith("\nwrong: torchvision, IDKD_DATA\n")


@pytest.mark.parametrize("version", ["2.6.2", "2.6.3"])
def test_a_malicious_release_is_named(versions, version):
    versions["lightning"] = version
    found = rows(environment.find_versions)["lightning"]
    assert (found.value, found.state) == (version, "wrong")
    assert "malicious" in found.advice
    assert 'pip install "lightning>=2.6.4,<3"' in found.advice


def test_a_version_out_of_range_is_wrong_and_a_missing_option_is_not(versions):
    versions |= {"jsonargparse": "5.0.1", "mpi4py": None, "submitit": "1.2", "torch": "2.11.0+cpu"}
    found = rows(environment.find_versions)
    assert (found["jsonargparse"].value, found["jsonargparse"].state) == ("5.0.1, allowed: >=4.49,<5", "wrong")
    assert found["torch"].state == "ok"
    assert (found["mpi4py"].value, found["mpi4py"].state) == ("not installed", "note")
    assert found["submitit"].state == "note"


def test_the_list_of_required_packages_is_that_of_the_project():
    text = (Path(__file__).resolve().parents[3] / "pyproject.toml").read_text()
    listed = text.split("dependencies = [")[1].split("\n]")[0]
    names = [line.split('"')[1] for line in listed.splitlines() if '"' in line]
    assert [name.split(">")[0].split("[")[0] for name in names] == list(environment.REQUIRED)


def test_without_a_compiler_it_advises_one(bare, tmp_path):
    assert environment.find_compiler()[1:3] == ("none", "note")
    program(tmp_path, "gcc", "gcc 1.2.3")
    bare.setenv("PATH", str(tmp_path))
    assert environment.find_compiler() == ("C compiler", "gcc: gcc 1.2.3")
    bare.setenv("CC", "icx")
    assert environment.find_compiler()[1:3] == ("CC names no compiler that runs", "note")


def test_a_gpu_that_torch_does_not_see_is_a_note(bare, tmp_path):
    import torch

    assert environment.find_gpus()[1:] == ("none that nvidia-smi shows, so runs use the processor",)
    program(tmp_path, "nvidia-smi", "NVIDIA X, 100 MiB, 500.1")
    bare.setenv("PATH", str(tmp_path))
    bare.setattr(torch.cuda, "is_available", lambda: False)
    _, value, state, advice = environment.find_gpus()
    assert (value, state) == ("NVIDIA X, 100 MiB, 500.1", "note")
    assert "CUDA_VISIBLE_DEVICES" in advice
    bare.setattr(torch.cuda, "is_available", lambda: True)
    bare.setattr(torch.cuda, "device_count", lambda: 1)
    assert "torch sees 1" in environment.find_gpus()[1]


def test_caches_have_sizes_and_owners(bare, tmp_path):
    bare.setenv("IDKD_CACHE", str(tmp_path / "cache"))
    found = rows(environment.find_caches)["decoded sets"]
    assert (found.value, found.state) == (f"{tmp_path / 'cache'}, not there yet", "ok")
    (tmp_path / "cache" / "compiled").mkdir(parents=True)
    (tmp_path / "cache" / "compiled" / "x").write_bytes(bytes(1500))
    (tmp_path / "cache" / "y").write_bytes(bytes(500))
    (tmp_path / "cache" / "compiled").chmod(0o700)
    found = rows(environment.find_caches)
    assert found["decoded sets"].value == f"{tmp_path / 'cache'}, 2 kB"
    assert "compiled norms" not in found
    (tmp_path / "cache" / "compiled").chmod(0o777)
    assert rows(environment.find_caches)["compiled norms"].state == "note"
    bare.setattr(os, "access", lambda *_: False)
    bare.setattr(os, "geteuid", lambda: -1)
    found = rows(environment.find_caches)["decoded sets"]
    assert found.value.endswith("2 kB, of another user, cannot be written")
    assert (found.state, "IDKD_CACHE" in found.advice) == ("note", True)


def test_a_large_folder_is_added_up_in_part(tmp_path, monkeypatch):
    (tmp_path / "below").mkdir()
    monkeypatch.setattr(environment, "PATIENCE", -1)
    assert environment.add_up(tmp_path).startswith("more than ")


def test_logins_are_looked_up_without_a_network(bare, tmp_path):
    bare.setenv("NETRC", str(tmp_path / "netrc"))
    bare.setenv("WANDB_BASE_URL", "https://wandb.my.org")
    bare.setenv("HF_HOME", str(tmp_path))
    found = rows(environment.find_logins)
    assert found["W&B"].value == "not logged in, so runs are logged offline"
    assert (found["hub"].value, found["hub"].state) == ("not logged in", "ok")
    (tmp_path / "netrc").write_text("machine wandb.my.org login user password key\n")
    (tmp_path / "token").write_text("hf_x")
    assert {row.value for row in rows(environment.find_logins).values()} == {"logged in"}
    bare.setenv("WANDB_MODE", "offline")
    assert rows(environment.find_logins)["W&B"].value == "WANDB_MODE is offline"


def test_data_are_listed_by_set(bare, tmp_path):
    assert rows(environment.find_data)["IDKD_DATA"].value == "not set"
    bare.setenv("IDKD_DATA", str(tmp_path))
    found = rows(environment.find_data)["IDKD_DATA"]
    assert (found.value, found.state) == (f"{tmp_path} holds no set", "note")
    for path in ("b/train-0.parquet", "a/data/train-0.parquet", "c/plain/train/0.parquet", "d/cat.png"):
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).touch()
    found = rows(environment.find_data)["IDKD_DATA"]
    assert (found.value, found.state) == (f"{tmp_path} with a, b, c", "ok")
    bare.setenv("IDKD_DATA", str(tmp_path / "b" / "train-0.parquet"))
    assert rows(environment.find_data)["IDKD_DATA"].state == "wrong"


def test_launchers_are_named_by_their_variables(bare):
    found = rows(environment.find_variables)
    assert {name: row.value for name, row in found.items()} == {"launcher": "none", "settings": "none"}
    bare.setenv("WORLD_SIZE", "4")
    bare.setenv("MASTER_ADDR", "node7.cluster")
    bare.setenv("OMP_NUM_THREADS", "2")
    bare.setenv("WANDB_API_KEY", "secret")
    found = rows(environment.find_variables)
    assert found["launcher"].value == "a launcher: MASTER_ADDR, WORLD_SIZE=4"
    assert "run.hosts x run.devices = 4" in found["launcher"].advice
    assert "unset WORLD_SIZE" in found["launcher"].advice
    assert found["settings"].value == "OMP_NUM_THREADS=2, WANDB_API_KEY"
    bare.setenv("WORLD_SIZE", "four")
    assert rows(environment.find_variables)["launcher"].state == "wrong"
    bare.setenv("PMI_SIZE", "2")
    bare.setattr(environment, "find_spec", lambda name: None)
    assert "pip install lightning-idkd[mpi]" in rows(environment.find_variables)["launcher"].advice


def test_a_file_system_without_locks_or_links_is_a_note(bare, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = rows(environment.find_disks)
    assert (found["locks"].state, found["hard links"].state) == ("ok", "ok")

    def refuse(*_, **__):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(os, "link", refuse)
    found = rows(environment.find_disks)
    assert (found["locks"].state, found["hard links"].state) == ("note", "note")
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(environment.tempfile, "TemporaryDirectory", refuse)
    assert "cannot be written (Operation not supported)" in rows(environment.find_disks)["files"].value


def test_a_folder_that_may_not_be_looked_at_ends_its_part_alone(bare, tmp_path, monkeypatch):
    def refuse():
        yield "decoded sets", "not there yet"
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "hub"))

    monkeypatch.setattr(environment, "find_caches", refuse)
    found = environment.examine()
    first, rest = [finding for finding in found if finding.part == "caches"]
    assert (first.value, rest.state) == ("not there yet", "note")
    assert rest.value == f"stopped at {tmp_path / 'hub'}: Permission denied"
    assert {"versions", "logins", "disks"} <= {finding.part for finding in found}


@pytest.mark.parametrize(("free", "state"), [(10**10, "ok"), (10**8, "note"), (10**5, "wrong")])
def test_a_full_disk_is_wrong(monkeypatch, free, state):
    usage = type("Usage", (), {"free": free})
    monkeypatch.setattr(environment.shutil, "disk_usage", lambda _: usage)
    assert rows(environment.find_disks)["working folder"].state == state


def test_an_option_that_does_not_exist_is_refused(capsys):
    assert main(["doctor", "--jsn"]) == 2
    assert capsys.readouterr().err == "error: jsn: there is no such key. Did you mean 'json'? Allowed: json.\n"
