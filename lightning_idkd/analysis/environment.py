"""Examines what runs need of this machine: versions, devices, compiler, caches, logins, data, launcher, disks.

It imports torch only where there is a GPU. It reads versions from the packages' metadata, so that a malicious release
is reported and not run. No result has a key, a token or the name of the user's home folder.
"""

from __future__ import annotations

import fcntl
import os
import platform
import re
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from lightning_idkd.checkout import find_commit
from lightning_idkd.errors import FULL_DISK, UserError
from lightning_idkd.machine import cache_folder, count_cores, describe_processor
from lightning_idkd.records.report import format_bytes
from lightning_idkd.training.launchers import find_launcher, read_number

PACKAGE = "lightning-idkd"
REQUIRED = ("torch", "torchvision", "lightning", "torchmetrics", "wandb", "networkx", "jsonargparse", "datasets",
            "numpy", "scipy", "pillow", "matplotlib", "rich", "safetensors", "scikit-learn")  # fmt: skip
"""Packages that every run needs, without those that they bring."""
OPTIONAL = {
    "optuna": "`method: bayes` of sweeps",
    "submitit": "`idkd sweep --on slurm`",
    "mpi4py": "processes that mpirun starts",
    "triton": "fast norms and convolutions on a GPU",
    "huggingface_hub": "`idkd evaluate --push`",
}
"""Packages that some features need, with the features."""
MALICIOUS = {"lightning": ("2.6.2", "2.6.3")}
"""Releases on the package index that were malicious."""
LAUNCHERS = re.compile(
    r"(LOCAL_|NODE_|GROUP_)?RANK|(LOCAL_|GROUP_)?WORLD_SIZE|MASTER_(ADDR|PORT)|TORCHELASTIC_RUN_ID"
    r"|OMPI_COMM_WORLD_.*SIZE|PMI_(SIZE|RANK)|MPI_LOCALNRANKS|SLURM_(JOB_ID|STEP_NUM_.*|NTASKS|NNODES)"
)
"""Names of variables that launchers set."""
SETTINGS = re.compile(r"(IDKD|WANDB|HF|CUDA|OMP|MKL|NCCL|GLOO|TORCH|PYTORCH)_.*|CC|XDG_CACHE_HOME|TMPDIR")
"""Names of variables that change how a run works."""
SHOWN = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "WANDB_MODE", "HF_HUB_OFFLINE")
"""Variables of SETTINGS whose values are printed; others may hold keys or the names of folders."""
LITTLE = 10**9
"""Bytes of free disk below which there is a note."""
PATIENCE = 0.3
"""Seconds to add up the files of a folder."""


@dataclass
class Finding:
    """One fact about this machine.

    A ``wrong`` one stops every run; a ``note`` stops or slows some. ``advice`` says what to do about either.
    """

    part: str
    name: str
    value: str
    state: Literal["ok", "note", "wrong"] = "ok"
    advice: str = ""


def examine() -> list[Finding]:
    """Find everything, in the order in which it is printed."""
    checks: dict[str, Callable[[], Iterator[tuple]]] = {
        "versions": find_versions,
        "devices": find_devices,
        "caches": find_caches,
        "logins": find_logins,
        "data": find_data,
        "variables": find_variables,
        "disks": find_disks,
    }
    findings = []
    for part, check in checks.items():
        try:
            for found in check():
                findings.append(Finding(part, *found))
        except OSError as e:  # such as a folder above which this user may not look
            cause = f"stopped at {hide_home(Path(e.filename))}" if e.filename else "stopped"
            findings.append(Finding(part, "rest", f"{cause}: {e.strerror}", "note", "change its permissions"))
    return findings


def format_findings(findings: list[Finding]) -> str:
    """The findings as aligned lines, with the advice below them."""
    lines, part = [], None
    for finding in findings:
        if finding.part != part:
            lines += ["", finding.part] if part else [finding.part]
            part = finding.part
        lines.append(f"  {finding.state:<6}{finding.name:<18}{finding.value}")
        if finding.advice:
            lines.append(f"{'':8}-> {finding.advice}")
    return "\n".join(lines)


def find_version(package: str) -> str | None:
    """The installed version of a package; None without one."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def find_versions() -> Iterator[tuple]:
    """Python, this project and the packages that it needs."""
    own, commit = find_version(PACKAGE), find_commit()
    yield "python", f"{platform.python_version()} on {platform.platform()}"
    if own is None:
        yield (
            PACKAGE,
            f"not installed, {commit}",
            "note",
            "install the checkout with `pip install -e .`, which checks versions",
        )
    else:
        yield PACKAGE, own if commit is None or own in commit else f"{own}, commit {commit}"
    allowed = {} if own is None else read_ranges()
    for package in REQUIRED:
        yield describe_version(package, allowed.get(package, ""), "wrong", "every run")
    for package, use in OPTIONAL.items():
        yield describe_version(package, allowed.get(package, ""), "note", use)


def describe_version(package: str, allowed: str, state: str, use: str) -> tuple:
    """The line of a package that is ``allowed`` in a range of versions; ``state`` is that of a missing one."""
    version = find_version(package)
    install = f'pip install "{package}{allowed}"'
    if version is None:
        return (
            package,
            "not installed",
            state,
            f"{use} needs it: {install}" if state == "wrong" else f"for {use}: {install}",
        )
    if version in MALICIOUS.get(package, ()):
        advice = (
            f"this release was malicious: do not import it, uninstall it, replace the keys and passwords that this "
            f"machine could read, then {install}"
        )
        return package, version, "wrong", advice
    if allowed and not is_allowed(version, allowed):
        return package, f"{version}, allowed: {allowed}", state, install
    return package, version


def read_ranges() -> dict[str, str]:
    """The allowed versions of the packages that the installed project names, such as ``>=2.11``."""
    ranges = {}
    for text in metadata.requires(PACKAGE) or []:
        name, _, versions = re.fullmatch(r"([\w.-]+)(\[.*?\])?([^;]*).*", text, re.DOTALL).groups()
        ranges.setdefault(name, ",".join(sorted(versions.strip().split(","), reverse=True)))
    return ranges


def is_allowed(version: str, allowed: str) -> bool:
    """Whether a version lies in a range; True where nothing can compare them."""
    try:
        from packaging.specifiers import SpecifierSet
        from packaging.version import InvalidVersion
    except ImportError:
        return True
    try:
        return SpecifierSet(allowed).contains(version, prereleases=True)
    except InvalidVersion:
        return True


def find_devices() -> Iterator[tuple]:
    """Processor, memory, GPUs and the C compiler."""
    usable, cores = count_cores(), os.cpu_count() or 1
    yield "processor", describe_processor("model name") or "unknown"
    yield "cores", f"{usable} of {cores}" if usable < cores else f"{cores}"
    yield "memory", describe_memory()
    yield find_gpus()
    yield find_compiler()


def describe_memory() -> str:
    """All memory, what is free of it, and the limit of this container."""
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        total, free = (int(lines[key].split()[0]) * 1024 for key in ("MemTotal", "MemAvailable"))
    except (OSError, ValueError, KeyError):  # not Linux
        return "unknown"
    text = f"{format_bytes(total)}, {format_bytes(free)} free"
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return text
    return text if limit == "max" else f"{text}, this container may take {format_bytes(int(limit))}"


def find_gpus() -> tuple:
    """The GPUs that the driver shows, and whether torch uses them."""
    gpus = run_program("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader")
    if not gpus:
        return "gpu", "none that nvidia-smi shows, so runs use the processor"
    value = "; ".join(gpus)
    if find_spec("torch") is None:
        return "gpu", value, "note", "torch is not installed"
    import torch

    if not torch.cuda.is_available():
        built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built without CUDA"
        advice = f"torch does not see it ({built}): install a torch for this driver, and check CUDA_VISIBLE_DEVICES"
        return "gpu", value, "note", advice
    return "gpu", f"{value}; torch sees {torch.cuda.device_count()}, CUDA {torch.version.cuda}"


def run_program(*command: str) -> list[str]:
    """The lines that a program prints; none if it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()]


def find_compiler() -> tuple:
    """The C compiler that builds the norms for a CPU, as :mod:`lightning_idkd.models.cpu_norms` looks for it."""
    command = shlex.split(os.environ.get("CC", "")) or [c for c in ("cc", "gcc", "clang") if shutil.which(c)][:1]
    version = run_program(*command, "--version") if command else []
    if version:
        return "C compiler", f"{Path(command[0]).name}: {version[0]}"
    advice = "install gcc or clang; without one, the norms of networks on a CPU take more time"
    if command:
        return "C compiler", "CC names no compiler that runs", "note", f"correct or unset CC, or {advice}"
    return "C compiler", "none", "note", advice


def find_caches() -> Iterator[tuple]:
    """The folders of decoded sets and compiled libraries, of torchvision and of the Hugging Face hub."""
    own = cache_folder()
    yield describe_folder(
        "decoded sets", own, "set IDKD_CACHE to a folder that you can write to; without one, every run decodes"
    )
    compiled = own / "compiled"
    if compiled.exists() and (compiled.stat().st_uid != os.geteuid() or compiled.stat().st_mode & 0o022):
        advice = (
            "every process compiles the norms anew, because others may write there: set IDKD_CACHE to a folder of yours"
        )
        yield "compiled norms", hide_home(compiled), "note", advice
    hub = Path(os.environ.get("HF_HOME") or "~/.cache/huggingface").expanduser()
    yield describe_folder(
        "torchvision", Path("~/.cache/torchvision").expanduser(), "sets of torchvision cannot be downloaded"
    )
    yield describe_folder("hub", hub, "set HF_HOME to a folder that you can write to, to download sets of the hub")


def describe_folder(name: str, folder: Path, advice: str) -> tuple:
    """The line of a folder that may not exist yet; ``advice`` is for one that cannot be written."""
    existing = folder
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    parts = [hide_home(folder), add_up(folder) if folder.exists() else "not there yet"]
    if folder.exists() and folder.stat().st_uid != os.geteuid():
        parts.append("of another user")
    if existing.is_dir() and os.access(existing, os.W_OK | os.X_OK):
        return name, ", ".join(parts)
    return name, ", ".join([*parts, "cannot be written"]), "note", advice


def add_up(folder: Path) -> str:
    """The size of the files in a folder; a lower bound where counting takes longer than :data:`PATIENCE`."""
    started, total = time.monotonic(), 0
    for root, _, names in os.walk(folder):
        if time.monotonic() - started > PATIENCE:
            return f"more than {format_bytes(total)}"
        for name in names:
            try:
                total += os.lstat(os.path.join(root, name)).st_size
            except OSError:  # another process has removed it
                continue
    return format_bytes(total)


def hide_home(path: Path) -> str:
    """A path with ``~`` for the user's home folder, whose name may be that of the user."""
    home = Path.home()
    return f"~/{path.relative_to(home)}" if path.is_relative_to(home) and home != Path("/") else str(path)


def find_logins() -> Iterator[tuple]:
    """Whether W&B and the hub have keys; neither is asked over the network, and no key is read."""
    mode = os.environ.get("WANDB_MODE")
    if find_version("wandb") is None:
        yield "W&B", "wandb is not installed", "note", "see versions; --logger null trains without it"
    elif mode in ("offline", "disabled", "dryrun"):
        yield "W&B", f"WANDB_MODE is {mode}"
    else:
        from lightning_idkd.records.loggers import is_logged_in

        try:
            logged_in = is_logged_in()
        except Exception as error:  # what a damaged installation raises
            cause = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            yield (
                "W&B",
                f"wandb cannot be used ({cause})",
                "wrong",
                "install wandb again; --logger null trains without it",
            )
        else:
            offline = "not logged in, so runs are logged offline"
            yield (
                ("W&B", "logged in")
                if logged_in
                else ("W&B", offline, "ok", "`wandb login`, or set WANDB_API_KEY, to log online")
            )
    token = Path(os.environ.get("HF_TOKEN_PATH") or Path(os.environ.get("HF_HOME") or "~/.cache/huggingface") / "token")
    logged_in = bool(os.environ.get("HF_TOKEN")) or token.expanduser().exists()
    yield (
        ("hub", "logged in")
        if logged_in
        else ("hub", "not logged in", "ok", "`hf auth login`, for --push and private sets")
    )


def find_data() -> Iterator[tuple]:
    """The folder IDKD_DATA, and the sets in it."""
    given = os.environ.get("IDKD_DATA")
    if not given:
        advice = (
            "set it to a folder that holds sets as parquet files; without it, sets come from their paths or the hub"
        )
        yield "IDKD_DATA", "not set", "ok", advice
        return
    folder = Path(given)
    if not folder.is_dir():
        yield "IDKD_DATA", f"{hide_home(folder)} is not a folder", "wrong", "set it to a folder, or unset it"
        return
    try:
        below = sorted(path for path in folder.iterdir() if path.is_dir())
    except OSError as e:
        yield (
            "IDKD_DATA",
            f"{hide_home(folder)} cannot be read ({e.strerror})",
            "wrong",
            "change its permissions, or unset it",
        )
        return
    sets = [
        path.name for path in below if any(next(path.glob(f"{depth}*.parquet"), None) for depth in ("", "*/", "*/*/"))
    ]
    if sets:
        yield "IDKD_DATA", f"{hide_home(folder)} with {', '.join(sets)}"
    else:
        advice = "it should hold one folder a set, with train-*.parquet and test-*.parquet"
        yield "IDKD_DATA", f"{hide_home(folder)} holds no set", "note", advice


def find_variables() -> Iterator[tuple]:
    """The launcher that the environment variables name, and other variables that change a run."""
    env = os.environ
    seen = [
        f"{name}={env[name]}" if env[name].isdecimal() else name for name in sorted(env) if LAUNCHERS.fullmatch(name)
    ]
    launcher, value = find_launcher(env), ", ".join(seen) or "none"
    if launcher is None:
        yield "launcher", value
    elif launcher.name == "mpirun" and find_spec("mpi4py") is None:
        yield (
            "launcher",
            f"{launcher.name}: {value}",
            "note",
            f"several processes need mpi4py: pip install {PACKAGE}[mpi]",
        )
    else:
        try:
            size = read_number(launcher.size, env)
        except UserError as e:
            yield "launcher", f"{launcher.name}: {value}", "wrong", str(e)
        else:
            advice = f"a run from here must have run.hosts x run.devices = {size}"
            if launcher.size == "WORLD_SIZE" and launcher.name != "torchrun":
                advice += "; if no launcher has started this shell, unset WORLD_SIZE"
            yield "launcher", f"{launcher.name}: {value}", "ok" if size == 1 else "note", advice
    names = [f"{name}={env[name]}" if name in SHOWN else name for name in sorted(env) if SETTINGS.fullmatch(name)]
    yield "settings", ", ".join(names) or "none"


def find_disks() -> Iterator[tuple]:
    """Free space, locks and hard links where runs and caches are written."""
    for name, folder in (("working folder", Path.cwd()), ("temporary files", Path(tempfile.gettempdir()))):
        free = shutil.disk_usage(folder).free
        state = "wrong" if free < FULL_DISK else "note" if free < LITTLE else "ok"
        more = "" if state == "ok" else "make room; a run's checkpoints have several matrices of nodes x parameters"
        yield name, f"{format_bytes(free)} free", state, more
    try:
        with tempfile.TemporaryDirectory(prefix=".idkd-doctor-", dir=Path.cwd()) as made:
            yield try_lock(Path(made))
            yield try_link(Path(made))
    except OSError as e:
        yield (
            "files",
            f"the working folder cannot be written ({e.strerror})",
            "note",
            "set --run.dir to a folder that can",
        )


def try_lock(folder: Path) -> tuple:
    """Whether the file system has locks, which keep two processes from one run folder."""
    with open(folder / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            advice = "nothing keeps two processes from the same run folder; start each run once, or set --run.dir"
            return "locks", f"none in the working folder ({e.strerror})", "note", advice
    return "locks", "work in the working folder"


def try_link(folder: Path) -> tuple:
    """Whether the file system has hard links, by which a checkpoint can have two names."""
    file = folder / "file"
    file.touch()
    try:
        os.link(file, folder / "link")
    except OSError as e:
        advice = "checkpoints are copied, which takes more disk and time; --run.dir may name a folder elsewhere"
        return "hard links", f"none in the working folder ({e.strerror})", "note", advice
    return "hard links", "work in the working folder"
