"""``python -m boardbench.cli`` is ``boardbench``."""

from __future__ import annotations

import sys

from boardbench.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
