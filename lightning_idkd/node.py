"""Import path of :class:`NodeModule` for configs and the user's code."""

from lightning_idkd.labels import Outputs
from lightning_idkd.nodes.node import NodeModule

__all__ = ["NodeModule", "Outputs"]
