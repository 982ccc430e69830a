"""``python -m lightning_idkd``."""

import os
import sys

from lightning_idkd.cli import main
from lightning_idkd.command import READERS

if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1] in READERS and sys.path[0] == os.getcwd():
        del sys.path[0]  # Python puts the working folder there for `-m`
    sys.exit(main())
