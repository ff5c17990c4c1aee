"""`python -m rdmanet` and the `rdmanet` command."""

from rdmanet.interrupts import end_at_once


def main() -> int:
    """Its exit status."""
    with end_at_once():
        from rdmanet import cli
    return cli.main()


if __name__ == "__main__":
    raise SystemExit(main())
