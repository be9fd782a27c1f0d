"""``python -m tp_cosep``: the command ``tp-cosep``."""

import sys

from tp_cosep.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
