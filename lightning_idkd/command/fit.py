"""``idkd fit``: trains the nodes of an experiment."""

from __future__ import annotations

import os

from lightning_idkd.command.options import configure


def main(arguments: list[str]) -> int:
    """Train the nodes, and then the control if ``run.control`` asks for it."""
    from lightning_idkd.command.control import find_finished, train_control
    from lightning_idkd.config.user_classes import explain_errors
    from lightning_idkd.training.fit import fit

    config = configure(arguments, "fit")
    if config.run.control and not config.trains_control:
        print("no control: the run itself has no distillation", flush=True)
    folder = find_finished(config) if config.trains_control and config.run.resume == "auto" else None
    try:
        with explain_errors(config.resolved):
            summary = fit(config) if folder is None else None
        if summary is not None and config.trains_control:
            folder = find_finished(config)
    except KeyboardInterrupt:
        if "WANDB_SWEEP_ID" not in os.environ:
            raise
        # an agent of W&B takes a status above 0 for a failure, and ends itself after a few failures
    return 0 if folder is None else train_control(folder, config)
