"""The commands of ``idkd``, one file each, whose ``main(arguments)`` returns the exit status."""

COMMANDS = {
    "fit": "train the nodes of an experiment",
    "bench": "time a step of one or several experiments, and other ways to do the same work, on samples of noise",
    "topology": "print a graph's properties and draw it",
    "partition": "show how a partition divides the private set",
    "sweep": "run all cells of a W&B sweep file without a server, on this machine or a SLURM cluster",
    "watch": "show how the runs and sweep cells below a folder are doing, live",
    "compare": "tabulate finished runs, with mean and spread over seeds, and draw their curves",
    "evaluate": "evaluate the nodes of a run on any test set, and export their mean",
    "audit": "attack the nodes of a finished run: what their labels and parameters reveal about private data",
    "report": "write report.md and report.html of a run, or of a sweep's runs",
    "doctor": "check what runs need of this machine, and print it for a bug report",
    "init": "write a commented config, a score and a callback, to start from",
}
"""Per command, what it does."""
READERS = ("evaluate", "audit", "report", "compare", "watch")
"""Commands that read run folders, which may be a stranger's: they do not look for modules in the working folder."""
