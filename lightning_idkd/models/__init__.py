"""Networks a node can train: light architecture configs here, their torch modules one file each."""

from lightning_idkd.models.architectures import CNN, VGG, Architecture, LeNet, MobileNetV2, ResNet, TorchModule, ViT

__all__ = ["CNN", "VGG", "Architecture", "LeNet", "MobileNetV2", "ResNet", "TorchModule", "ViT"]
