"""``python -m rdmanet.verbs env``: what a program in this pod that knows nothing of rdmanet has to be told."""

from __future__ import annotations

import sys

from rdmanet.verbs.environment import main

if __name__ == "__main__":
    sys.exit(main())
