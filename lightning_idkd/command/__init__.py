"""The commands of ``idkd``, one file each: ``main(arguments)`` returns the exit status."""

COMMANDS = {
    "fit": "train the nodes of an experiment",
    "bench": "time a step of an experiment, or of several, beside what else it could cost, on random images",
    "topology": "print a graph's numbers and draw it",
    "partition": "show how a partition divides the private set",
    "sweep": "run all cells of a W&B sweep file here, without a server",
    "compare": "tabulate finished runs: mean and spread over seeds, difference to a baseline",
    "evaluate": "look at the nodes of a run on any test set, and export their mean",
    "report": "write a run's report.md: its table, pictures and config",
    "init": "write a commented config and a callback of your own, to start from",
}
"""Every command and what it does."""
