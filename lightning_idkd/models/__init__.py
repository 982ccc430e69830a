"""Networks that a node can train: architectures as config objects, their torch modules, and fast layers."""

from lightning_idkd.models.architectures import (
    CNN,
    MLP,
    VGG,
    Architecture,
    LeNet,
    MobileNetV2,
    ResNet,
    TorchModule,
    ViT,
)

__all__ = ["CNN", "MLP", "VGG", "Architecture", "LeNet", "MobileNetV2", "ResNet", "TorchModule", "ViT"]
