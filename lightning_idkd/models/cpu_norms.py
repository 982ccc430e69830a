"""Norms on a CPU by the C library ``cpu_norms.c``.

This machine's compiler builds the library once. Without a compiler torch's operations compute the norms. To load a
library is to run its code, so a stored one is loaded only if nobody but the user may write it.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from lightning_idkd.checksum import is_sealed, seal
from lightning_idkd.errors import UserError
from lightning_idkd.files import replace
from lightning_idkd.machine import cache_folder, describe_machine

SOURCE = Path(__file__).with_suffix(".c")
LANES = 16  # as in cpu_norms.c
FLAGS = ("-O3", "-march=native", "-std=gnu11", "-fPIC")
_Pointer, _Int, _Float = ctypes.c_void_p, ctypes.c_int, ctypes.c_float
SIGNATURES = {
    "evonorm_forward": [*[_Pointer] * 7, *[_Int] * 5, _Float],
    "evonorm_backward": [*[_Pointer] * 10, *[_Int] * 5],
    "group_norm_forward": [*[_Pointer] * 7, *[_Int] * 6, _Float],
    "group_norm_backward": [*[_Pointer] * 10, *[_Int] * 6],
}


@functools.cache
def load_library() -> ctypes.CDLL | None:
    """The library, from the cache or compiled now; None if it cannot be built."""
    compiler = shlex.split(os.environ.get("CC", "")) or [c for c in ("cc", "gcc", "clang") if shutil.which(c)][:1]
    # such as no source file, no home folder, or a cache folder that cannot be written
    with contextlib.suppress(OSError, RuntimeError, UserError):
        openmp = _find_openmp()
        identity = repr((SOURCE.read_text(), describe_machine(), compiler, FLAGS, openmp))
        folder = cache_folder() / "compiled"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # a folder of its own, since caches may be shared
        path = folder / f"cpu_norms-{hashlib.sha256(identity.encode()).hexdigest()[:20]}.so"
        if not is_private(folder) or (os.path.lexists(path) and not is_private(path)):
            with tempfile.TemporaryDirectory() as new:  # only its user may enter it
                return _build(compiler, openmp, Path(new) / path.name)
        with contextlib.suppress(OSError):
            if is_sealed(path):  # else it is damaged, or from before checksums
                return _open(path)
        return _build(compiler, openmp, path)
    return None


def is_private(path: Path) -> bool:
    """Whether a file or folder, which is not a link, belongs to the user and nobody else may write it."""
    status = path.lstat()
    return not path.is_symlink() and status.st_uid == os.geteuid() and not status.st_mode & 0o022


def name_backend(device: torch.device) -> str:
    """Name what computes the norms on ``device``: ``C``, this library, or ``torch``."""
    return "C" if device.type == "cpu" and load_library() is not None else "torch"


def _build(compiler: list[str], openmp: str | None, path: Path) -> ctypes.CDLL | None:
    """Compile the library to ``path`` and load it; None without a compiler."""
    if not compiler:
        return None
    _compile(compiler, openmp, path)
    return _open(path)


def _compile(compiler: list[str], openmp: str | None, path: Path) -> None:
    """Compile the library to ``path``, linked with torch's library ``openmp`` if possible, else for a single thread."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        compiled, linked = f"{folder}/cpu_norms.o", f"{folder}/cpu_norms.so"
        attempts = [([], [])] if openmp is None else [(["-fopenmp"], [openmp]), ([], [])]
        for options, libraries in attempts:
            with contextlib.suppress(OSError, subprocess.SubprocessError):
                for command in ([*FLAGS, *options, "-c", str(SOURCE), "-o", compiled],
                                ["-shared", compiled, *libraries, "-lm", "-o", linked]):  # fmt: skip
                    subprocess.run([*compiler, *command], check=True, capture_output=True, timeout=60)
                seal(Path(linked))
                _open(Path(linked))
                os.chmod(linked, 0o700)
                replace(path, lambda part: os.replace(linked, part))
                return
    raise OSError(f"{compiler[0]} could not compile {SOURCE.name}")


def _find_openmp() -> str | None:
    """The file of the OpenMP library that torch uses; a second one would start threads that compete with torch's."""
    paths = []
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/maps").read_text().splitlines():
            path = line[line.find("/") :]
            if Path(path).name.startswith(("libgomp", "libiomp", "libomp")):
                paths.append(path)
    torch_folder = str(Path(torch.__file__).parent)
    return min(paths, key=lambda path: not path.startswith(torch_folder), default=None)


def _open(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    for name, signature in SIGNATURES.items():
        getattr(library, name).argtypes, getattr(library, name).restype = signature, None
    return library


def supports(x: Tensor, groups: int, *parameters: Tensor, shortcut: Tensor | None = None) -> bool:
    """Whether the library can normalise images ``x`` [B, C, H, W] with ``parameters`` [C] and this ``shortcut``.

    Images are float32 or bfloat16, all of one type; parameters are float32.
    """
    if type(x) is not Tensor or x.dim() != 4 or is_traced():
        return False
    channels = x.shape[1]
    group = channels // groups
    return (
        x.dtype in (torch.float32, torch.bfloat16)
        and x.device.type == "cpu"
        and all((t.dtype, t.device, t.shape) == (torch.float32, x.device, x.shape[1:2]) for t in parameters)
        and (shortcut is None or (shortcut.dtype, shortcut.device, shortcut.shape) == (x.dtype, x.device, x.shape))
        and channels % LANES == 0
        and (LANES % group == 0 or group % LANES == 0)
        and load_library() is not None
    )


def is_traced() -> bool:
    """Whether tensors have no memory of their own, as inside ``torch.compile`` or a transform of ``torch.func``."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def _images(*images: Tensor) -> list[Tensor]:
    return [image.contiguous(memory_format=torch.channels_last) for image in images]


def _shape(x: Tensor, groups: int) -> tuple[int, int, int, int, bool]:
    """Number of images, pixels per image, channels, channels per group, and whether images are bfloat16."""
    return x.shape[0], x.shape[2] * x.shape[3], x.shape[1], x.shape[1] // groups, x.dtype == torch.bfloat16


def _pointers(*tensors: Tensor | None) -> list[int | None]:
    return [None if t is None else t.data_ptr() for t in tensors]


def evonorm_forward(
    x: Tensor, v: Tensor, gamma: Tensor, beta: Tensor, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Result, mean and 1 / standard deviation; the latter two [B, C], for the group of each channel."""
    [x], (v, gamma, beta) = _images(x), (v.contiguous(), gamma.contiguous(), beta.contiguous())
    y, (mean, rstd) = torch.empty_like(x), x.new_empty(2, *x.shape[:2], dtype=torch.float32)
    load_library().evonorm_forward(*_pointers(x, v, gamma, beta, y, mean, rstd), *_shape(x, groups), eps)
    return y, mean, rstd


def evonorm_backward(g: Tensor, x: Tensor, v: Tensor, gamma: Tensor, mean: Tensor, rstd: Tensor,
                     groups: int) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients by ``x``, ``v``, ``gamma`` and ``beta``, given ``g`` by the result."""
    (g, x), v, gamma = _images(g, x), v.contiguous(), gamma.contiguous()
    dx, sums = torch.empty_like(x), x.new_empty(3, *x.shape[:2], dtype=torch.float32)
    load_library().evonorm_backward(*_pointers(g, x, v, gamma, mean, rstd, dx, *sums), *_shape(x, groups))
    return dx, *sums.sum(1)


def group_norm_forward(x: Tensor, gamma: Tensor, beta: Tensor, shortcut: Tensor | None, groups: int, relu: bool,
                       eps: float) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Result, mean and 1 / standard deviation; the latter two [B, C], for the group of each channel."""
    [x], gamma, beta = _images(x), gamma.contiguous(), beta.contiguous()
    if shortcut is not None:
        [shortcut] = _images(shortcut)
    y, (mean, rstd) = torch.empty_like(x), x.new_empty(2, *x.shape[:2], dtype=torch.float32)
    load_library().group_norm_forward(
        *_pointers(x, gamma, beta, shortcut, y, mean, rstd), *_shape(x, groups), relu, eps
    )
    return y, mean, rstd


def group_norm_backward(g: Tensor, x: Tensor, y: Tensor | None, gamma: Tensor, mean: Tensor, rstd: Tensor,
                        groups: int) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients by ``x``, ``gamma``, ``beta`` and the input of ReLU, given ``g`` by the result.

    ``y`` is the result of the forward pass, or None if it was without ReLU.
    """
    (g, x), gamma = _images(g, x), gamma.contiguous()
    dx, sums = torch.empty_like(x), x.new_empty(2, *x.shape[:2], dtype=torch.float32)
    through = g if y is None else torch.empty_like(x)
    pointers = _pointers(g, x, y, gamma, mean, rstd, dx, through, *sums)
    load_library().group_norm_backward(*pointers, *_shape(x, groups), y is not None)
    return dx, *sums.sum(1), through
