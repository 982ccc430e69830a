"""``idkd fit``."""

from __future__ import annotations

import os

from lightning_idkd.command.options import configure


def main(arguments: list[str]) -> int:
    """Train, and where ``run.control`` asks for it the control too."""
    from lightning_idkd.command.control import finished, train_control
    from lightning_idkd.config.user_classes import explain_errors
    from lightning_idkd.training.fit import fit

    config = configure(arguments, "fit")
    if config.run.control and not config.trains_control:
        print("no control: this run has no distillation itself", flush=True)
    folder = finished(config) if config.trains_control and config.run.resume == "auto" else None
    try:
        with explain_errors(config.resolved):
            summary = fit(config) if folder is None else None
        if summary is not None and config.trains_control:
            folder = finished(config)
    except KeyboardInterrupt:
        if "WANDB_SWEEP_ID" not in os.environ:
            raise
        # stopped by an agent of W&B, which takes a status above 0 for a failure and ends itself after a few
    return 0 if folder is None else train_control(folder, config)
