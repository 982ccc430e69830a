"""``python -m lightning_idkd``."""

import sys

from lightning_idkd.cli import main

if __name__ == "__main__":
    sys.exit(main())
