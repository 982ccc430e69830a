"""What a researcher swaps: gossip rules, losses, scores, calibrations, distillation, faults; configs name them by
``class_path``.

The import name is ``lightning_idkd.callbacks``. Modules of this folder import each other by relative names, which hold
wherever the folder lies.
"""

import sys
from importlib import import_module

if __name__ == "callbacks":  # imported in a checkout by the folder's name: give the same modules
    sys.modules[__name__] = import_module(f"lightning_idkd.{__name__}")

from . import distillation, faults, gossip, heads, losses, ood, probes
from .distillation import *  # noqa: F403
from .faults import *  # noqa: F403
from .gossip import *  # noqa: F403
from .heads import *  # noqa: F403
from .losses import *  # noqa: F403
from .ood import *  # noqa: F403
from .probes import *  # noqa: F403

__all__ = [
    *distillation.__all__,
    *faults.__all__,
    *gossip.__all__,
    *heads.__all__,
    *losses.__all__,
    *ood.__all__,
    *probes.__all__,
]
