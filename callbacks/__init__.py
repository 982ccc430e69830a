"""What a researcher swaps: gossip rules, scores, calibrations and distillation; configs name them by ``class_path``."""

from callbacks import distillation, gossip, ood
from callbacks.distillation import *  # noqa: F403
from callbacks.gossip import *  # noqa: F403
from callbacks.ood import *  # noqa: F403

__all__ = [*distillation.__all__, *gossip.__all__, *ood.__all__]
