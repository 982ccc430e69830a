"""Writes a consensus model for other programs: parameters, config, a program of torch.export and a model card; sends
them to the Hugging Face hub."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_idkd.data.inputs import Inputs
from lightning_idkd.errors import UserError
from lightning_idkd.files import link, write
from lightning_idkd.models import plain
from lightning_idkd.nodes.node import NodeModule

PROGRAM = "model.pt2"
TOLERANCE = 1e-4
"""Largest difference between the logits of the exported program and those of the run, as a share of the largest."""
OLDER = {"consensus.safetensors": "model.safetensors", "consensus.json": "config.json"}
"""Former names of files, which remain as further names of the same files."""
TAKEN = ("README.md", "config.json", "network.py")
"""Files of an export whose names other files of a user may have."""


class Classifier(nn.Module):
    """A network that takes samples as they are stored: images as pixels uint8 [N, C, S, S], vectors as float64 [N, F].

    It returns logits [N, classes].
    """

    def __init__(self, network: nn.Module, inputs: Inputs):
        super().__init__()
        self.network, self.inputs = network, inputs

    def forward(self, samples: Tensor) -> Tensor:
        return self.network(self.inputs.scale(self.inputs.arrange(samples)))


def check_folder(folder: str | Path) -> None:
    """Refuse a folder that cannot be written or made, or in which an export would replace files that no export has
    written. Nothing is made.

    Raises:
        UserError: its message names the folder.
    """
    path = Path(folder).absolute()
    existing = next(place for place in (path, *path.parents) if place.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        cause = "cannot be written" if existing.is_dir() else "is not a folder"
        raise UserError(f"--export: cannot write '{folder}', because '{existing}' {cause}")
    taken = [name for name in TAKEN if (path / name).exists()]
    if taken and not any(path.glob("*.safetensors")):
        others = f"has {', '.join(taken)} from elsewhere, which the export would replace"
        raise UserError(f"--export: '{folder}' {others}; give a new folder, or that of an earlier export")


def make_folder(folder: str | Path) -> Path:
    """Make the folder that a model is written to.

    Raises:
        UserError: as for :func:`check_folder`.
    """
    check_folder(folder)
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"--export: cannot write '{folder}' ({e.strerror})") from e
    return folder


def write_parameters(folder: Path, network: nn.Module, about: dict[str, Any]) -> list[Path]:
    """Write ``model.safetensors`` and ``config.json``, and return them.

    The parameters and buffers have the network's own names. ``about`` is ``config.json`` and the metadata of
    ``model.safetensors``. For a network of :mod:`lightning_idkd.models.plain`, ``network.py`` has its code.
    """
    from safetensors.torch import save

    state = {name: t.detach().clone().contiguous() for name, t in network.state_dict().items()}
    texts = {"format": "pt"} | {key: v if isinstance(v, str) else json.dumps(v) for key, v in about.items()}
    model, config = folder / "model.safetensors", folder / "config.json"
    # save_file of safetensors would write a file that only its owner may read
    write(model, lambda part: part.write_bytes(save(state, texts)), "--export")
    write(config, lambda part: part.write_text(json.dumps(about, indent=1) + "\n"), "--export")
    for older, file in OLDER.items():
        write(folder / older, lambda part, file=file: link(folder / file, part), "--export")
    code = folder / "network.py"
    if not has_plain_code(about):
        code.unlink(missing_ok=True)  # that of an earlier export
        return [model, config]
    write(code, lambda part: shutil.copyfile(plain.__file__, part), "--export")
    return [model, config, code]


def shorten_paths(config: Any) -> Any:
    """A config whose absolute paths have only their last part, since the folders of a machine are its user's affair."""
    if isinstance(config, dict):
        return {key: shorten_paths(value) for key, value in config.items()}
    if isinstance(config, list):
        return [shorten_paths(value) for value in config]
    is_path = isinstance(config, str) and config.startswith(("/", "~"))
    return Path(config).name if is_path else config


def depends_on_batch(network: nn.Module) -> bool:
    """Whether an output depends on the other samples of its batch, through a BatchNorm without running statistics."""
    return any(isinstance(m, _BatchNorm) and not m.track_running_stats for m in network.modules())


def has_plain_code(about: dict[str, Any]) -> bool:
    """Whether the network that ``about`` describes is one of :mod:`lightning_idkd.models.plain`."""
    package, _, name = about["config"]["node"]["network"]["class_path"].rpartition(".")
    return package == "lightning_idkd.models" and name in plain.NETWORKS


def write_program(folder: Path, module: NodeModule, inputs: Inputs) -> list[Path]:
    """Write ``model.pt2``, the :class:`Classifier` as a program of ``torch.export`` for batches of any size.

    Returns:
        The file; nothing where torch.export cannot follow the network, of which a sentence is printed.
    """
    file = folder / PROGRAM
    try:
        samples = inputs.draw_noise(3)
        program = export_program(module.network, inputs)
        with torch.no_grad():
            expected = module.outputs(inputs.scale(inputs.arrange(samples))).logits
            logits = program.module()(samples).float()
        if (logits - expected).abs().max() > TOLERANCE * expected.abs().max():
            raise ValueError("the program has other logits than the run")
    except Exception as error:  # torch.export raises many kinds
        cause = (str(error).splitlines() or [type(error).__name__])[0]
        name = type(module.network).__name__
        print(f"note: no {PROGRAM}, because torch.export cannot follow {name} ({cause})", file=sys.stderr)
        file.unlink(missing_ok=True)  # that of an earlier export
        return []
    write(file, lambda part: save_program(program, part), "--export")
    return [file]


def export_program(network: nn.Module, inputs: Inputs) -> torch.export.ExportedProgram:
    """Trace the :class:`Classifier` of a network. The program only answers: its parameters need no gradient."""
    model = Classifier(network, inputs).eval()
    for tensor in [*network.parameters(), *network.buffers()]:
        tensor.data = tensor.detach().clone(memory_format=torch.contiguous_format)  # no view into the nodes' matrix
        tensor.requires_grad_(False)
    batch = torch.export.Dim("batch")
    program = torch.export.export(model, (inputs.draw_noise(2),), dynamic_shapes=({0: batch},))
    for graph in [m for m in program.graph_module.modules() if isinstance(m, torch.fx.GraphModule)]:
        for node in graph.graph.nodes:
            node.meta.pop("stack_trace", None)  # it names folders of this machine
    return program


def save_program(program: torch.export.ExportedProgram, part: Path) -> None:
    """Save a program in a file whose name need not end in ``.pt2``."""
    with open(part, "wb") as file:
        torch.export.save(program, file)


def open_hub(name: str) -> Any:
    """The Hugging Face hub, for a repository that is to be called ``name``.

    Raises:
        UserError: the package is missing, nobody is logged in, or the hub takes no such name.
    """
    try:
        import huggingface_hub
        from huggingface_hub.utils import validate_repo_id
    except ImportError as e:
        raise UserError("--push: huggingface_hub is not installed; pip install huggingface_hub") from e
    try:
        validate_repo_id(name)
    except ValueError as e:
        raise UserError(f"--push: '{name}' given; allowed: a name on the hub, such as USER/MODEL") from e
    if huggingface_hub.get_token() is None:
        raise UserError("--push: you are not logged in to the Hugging Face hub; run `hf auth login`, or set HF_TOKEN")
    return huggingface_hub.HfApi()


def push(hub: Any, name: str, folder: Path, files: list[Path]) -> str:
    """Upload ``files`` of an exported ``folder`` to the repository ``name``, and return its address.

    A repository that does not exist yet is made, and is private.

    Raises:
        UserError: the hub does not answer, or does not let the user write there.
    """
    try:
        address = hub.create_repo(name, repo_type="model", private=True, exist_ok=True)
        hub.upload_folder(
            repo_id=address.repo_id,
            folder_path=str(folder),
            allow_patterns=[str(file.relative_to(folder)) for file in files],
            commit_message="Upload a consensus model of lightning-idkd",
        )
    except Exception as error:  # of the network or the hub, of many kinds
        cause = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"--push: the upload to '{name}' failed ({cause}); the files are in '{folder}'") from error
    return str(address)
