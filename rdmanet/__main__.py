"""`python -m rdmanet` and the `rdmanet` command."""

from rdmanet.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
