"""The import path of :class:`NodeModule` that configs name."""

from lightning_idkd.labels import Outputs
from lightning_idkd.nodes.node import NodeModule

__all__ = ["NodeModule", "Outputs"]
