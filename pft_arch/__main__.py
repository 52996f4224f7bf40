"""`python -m pft_arch` is `pft-sr`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
