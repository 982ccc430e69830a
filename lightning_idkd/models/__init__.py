"""Networks a node can train: light architecture configs here, their torch modules one file each."""

from lightning_idkd.models.architectures import CNN, Architecture, ResNet, TorchModule

__all__ = ["CNN", "Architecture", "ResNet", "TorchModule"]
