"""``rdmanet repair``: asks again for what was left alone as it broke too often, or writes a lost database anew."""

from __future__ import annotations

import argparse
from urllib.parse import urlencode

from rdmanet import config, show
from rdmanet.client import ask

#: A repair makes links and devices, one after another.
TIMEOUT_S = 60.0


def add_to(commands: argparse._SubParsersAction[argparse.ArgumentParser], common: argparse.ArgumentParser) -> None:
    """Adds the command."""
    repair = commands.add_parser(
        "repair", parents=[common], help="ask again for what the agent has left alone, or write a damaged database anew"
    )
    what = repair.add_mutually_exclusive_group()
    what.add_argument(
        "--database",
        action="store_true",
        help="move damaged databases aside and write rows from the kernel's state; no agent may run",
    )
    what.add_argument(
        "pod", nargs="?", default=None, metavar="POD", help="namespace/name, or node; default: all that is left alone"
    )
    repair.set_defaults(run=_repair)


def _repair(chosen: argparse.Namespace) -> int:
    if chosen.database:
        return _rebuild(chosen)
    query = "" if chosen.pod is None else "?" + urlencode({"pod": chosen.pod})
    path = config.load(chosen.config).agent.socket
    left = ask(path, f"/v1/repair{query}", method="POST", timeout_s=TIMEOUT_S)["left"]
    if left:
        print(show.table(("broken", "kind", ""), [(row["what"], row["kind"], row["sentence"]) for row in left]))
        return 1
    print("nothing is broken")
    return 0


def _rebuild(chosen: argparse.Namespace) -> int:
    from rdmanet import rebuild

    for sentence in rebuild.repair(config.load(chosen.config)):
        print(sentence)
    return 0
