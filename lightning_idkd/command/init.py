"""``idkd init``: writes a small experiment of the user's own, which runs as it is."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from lightning_idkd.command import options
from lightning_idkd.errors import UserError
from lightning_idkd.files import write

CONFIG = """\
# {name}: an experiment to start from.
# run it:       cd {folder} && idkd fit --config config.yaml
# every key:    idkd fit --help; any of them may also be given on the command line, such as --seed 1
seed: 0                                       # seed of all randomness
graph:
  nodes: 16
  topology: {{class_path: Ring}}                # who talks to whom: Ring, Complete, Star, Exponential, BaseGraph, ...
data:
  private: {{class_path: Digits}}               # yours: {{class_path: ImageFolder, init_args: {{path: my/images}}}}
  public: {{class_path: Glyphs, init_args: {{samples: 600}}}}   # nodes exchange labels for it; needs no labels
  partition: {{class_path: Dirichlet, init_args: {{alpha: 0.05}}}}   # a small alpha: each node holds few classes
node:
  network: {{class_path: CNN}}                  # ResNet, LeNet, VGG, MobileNetV2, ViT, TorchModule (any nn.Module)
train:
  epochs: 30
  batch_size: 16
  lr: 0.1
gossip: {{class_path: QGDSGDm, init_args: {{momentum: 0.9, nesterov: true, weight_decay: 0.0001}}}}
calibration:                                  # which public samples a node calls in-distribution
  class_path: Youden
  init_args: {{score: {{class_path: my_callbacks.Margin}}}}   # the score in my_callbacks.py
distillation: {{class_path: IDKD, init_args: {{start: 0.6, every: 4}}}}   # null: no distillation
callbacks:
  - class_path: my_callbacks.Spread           # the callback in my_callbacks.py
logger: null                                  # wandb: {{kind: wandb, project: my-project}}
run: {{name: {quoted}}}
"""

CALLBACKS = '''"""Your own score and callback; config.yaml names them by their import path."""

from lightning_idkd import Callback, OodScore


class Margin(OodScore):
    """Difference of the two largest logits; larger means more like the node's own data."""

    def __call__(self, outputs):  # outputs.logits [N, classes], outputs.features [N, F]
        first, second = outputs.logits.topk(2, dim=1).values.unbind(1)
        return first - second


class Spread(Callback):
    """Adds a number to every line of metrics. lightning_idkd.callback.HOOKS lists all hooks and their arguments."""

    def on_evaluation_end(self, run, metrics):
        metrics["spread"] = metrics["accuracy/node_max"] - metrics["accuracy/node_min"]
'''


def write_skeleton(name: str) -> str:
    """Write ``name/config.yaml`` and ``name/my_callbacks.py``; returns what to do next."""
    folder = Path(name)
    if folder.exists():
        raise UserError(f"'{name}' exists already; give a new name")
    try:
        folder.mkdir(parents=True)
    except OSError as e:
        raise UserError(f"cannot write '{name}' ({e.strerror})") from e
    config = CONFIG.format(name=folder.name, quoted=json.dumps(folder.name), folder=shlex.quote(str(folder)))
    for file, text in (("config.yaml", config), ("my_callbacks.py", CALLBACKS)):
        write(folder / file, lambda part, text=text: part.write_text(text), "init")
    made = f"made {folder}/config.yaml and {folder}/my_callbacks.py"
    return f"{made}\nnext: cd {shlex.quote(str(folder))} && idkd fit --config config.yaml"


def main(arguments: list[str]) -> int:
    """Write an experiment to start from."""
    p = options.build_parser("init")
    p.add_argument("name", help="Name of the experiment, and of the new folder.")
    print(write_skeleton(p.parse_args(arguments).name))
    return 0
