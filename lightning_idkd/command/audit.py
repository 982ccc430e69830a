"""``idkd audit``: measures what the labels and parameters of a finished run reveal to an attacker."""

from __future__ import annotations

import json

from lightning_idkd import checkout
from lightning_idkd.command import options
from lightning_idkd.errors import require

ATTACKER = (
    " The attacker is a neighbour of the node that it attacks, and knows what all other nodes know. It sees the labels"
    " of one exchange at the end of training, the parameters of the gossip step after the last training step, or both."
    " It infers the node's label distribution, and which samples with known labels the node trains on."
)


def main(arguments: list[str]) -> int:
    """Attack the nodes of a run, and print what the attacker finds."""
    p = options.build_parser("audit")
    p.description += ATTACKER
    p.add_argument("run", help="Folder of a finished run, such as runs/NAME/latest.")
    noise = "Bounds of the private labels that are attacked beside those of the run."
    p.add_argument("--epsilon", type=float, nargs="+", default=[1.0, 4.0], metavar="EPSILON", help=noise)
    samples = "Number of members, and of non-members, that are taken from each node at most."
    p.add_argument("--samples", type=int, default=200, help=samples)
    p.add_argument("--json", action="store_true", help="Print JSON instead of a table.")
    trust = "Let the run's config name classes that are not part of this project, such as your own. Their code runs,"
    p.add_argument("--trust", action="store_true", help=f"{trust} so do not trust a run folder of a stranger.")
    p.usage = "idkd audit RUN [--epsilon EPSILON ...] [--samples SAMPLES] [--json] [--trust]"
    given = p.parse_args(arguments)
    require(given.samples >= 1, "--samples", given.samples, "1 or more")
    for epsilon in given.epsilon:
        require(0 < epsilon <= 20, "--epsilon", epsilon, "above 0 to 20")
    if given.trust:
        checkout.add_working_folder()
    from lightning_idkd.analysis.audit import audit, show

    result = audit(given.run, given.epsilon, given.samples, given.trust)
    if given.json:
        print(json.dumps(result, indent=1))
    else:
        show(result)
    return 0
