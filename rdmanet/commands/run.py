"""``rdmanet run``: a job's processes in fresh pods on this host."""

from __future__ import annotations

import argparse
import asyncio
import os
import pwd
import signal
import sys
from pathlib import Path

from rdmanet import config
from rdmanet.errors import InputError, RdmanetError
from rdmanet.interrupts import end_at_once

#: What is not the job's own exit code: as docker and podman have it.
OWN_FAILURE = 125
GRACE_S = 10.0

_DESCRIPTION = """A job's processes in fresh pods on this host, one in each: with rank, world size, peers and RDMA
environment set, output with the rank in front. The exit code is that of the rank that was the first to fail (128 and
the signal's number for a signal), 0 when none did, 125 where rdmanet itself could not. docs/ml-jobs.md is the guide."""


def add_to(commands: argparse._SubParsersAction[argparse.ArgumentParser], common: argparse.ArgumentParser) -> None:
    """Adds the command."""
    run = commands.add_parser(
        "run", parents=[common], help="run a job's processes in fresh pods on this host", description=_DESCRIPTION
    )
    run.add_argument("--pods", type=int, default=1, metavar="N", help="how many, a rank in each (default 1)")
    run.add_argument("--rdma", action="store_true", help="give each pod an RDMA device")
    run.add_argument("--name", default="", help="of the job; its pods are NAME-0, NAME-1, ... (default: made up)")
    run.add_argument("--namespace", default="default", help="of the pods, for leases and policies (default: default)")
    run.add_argument("--master-port", type=int, default=29500, metavar="PORT", help="MASTER_PORT (default 29500)")
    run.add_argument(
        "--grace-s",
        type=float,
        default=GRACE_S,
        metavar="S",
        help="seconds from SIGTERM to SIGKILL for the others when a rank has failed (default 10)",
    )
    run.add_argument("--family", type=int, choices=(4, 6), help="IP version of the RDMA variables (default: IPv4)")
    run.add_argument("--user", metavar="NAME", help="whose the ranks are: a name or a number (default: root)")
    run.add_argument(
        "--device",
        action="append",
        default=[],
        metavar="/dev/NODE",
        help="a further device for the pods, such as a GPU",
    )
    run.add_argument("--plugin", type=Path, metavar="FILE", help="the CNI executable (default: where runtimes look)")
    run.add_argument(
        "--cleanup", action="store_true", help="take back what killed launchers have left, and run nothing"
    )
    run.add_argument("argv", nargs=argparse.REMAINDER, metavar="-- COMMAND")
    run.set_defaults(run=_run)


def _run(chosen: argparse.Namespace) -> int:
    # Until the launcher takes signals.
    with end_at_once():
        return _launched(chosen)


def _launched(chosen: argparse.Namespace) -> int:
    from rdmanet.run import launch

    try:
        known = config.load(chosen.config)
        if chosen.cleanup:
            return asyncio.run(launch.cleanup(known))
        argv = chosen.argv[1:] if chosen.argv[:1] == ["--"] else chosen.argv
        if not argv:
            raise InputError("Say what to run, behind --: rdmanet run --pods 4 -- python3 train.py")
        wish = launch.Wish(
            argv=argv,
            pods=chosen.pods,
            rdma=chosen.rdma,
            name=chosen.name,
            namespace=chosen.namespace,
            master_port=chosen.master_port,
            grace_s=chosen.grace_s,
            family=chosen.family,
            user=None if chosen.user is None else user_of(chosen.user),
            devices=chosen.device,
            plugin=chosen.plugin,
        )
        return asyncio.run(launch.run(wish, known))
    except (RdmanetError, OSError) as error:  # whatever was begun has been taken back
        print(f"rdmanet run: {error}", file=sys.stderr)
        return OWN_FAILURE
    except KeyboardInterrupt:  # when everything was taken back
        return 128 + signal.SIGINT


def user_of(text: str) -> tuple[int, int, list[int]]:
    """Uid, gid and groups of a name or a number. InputError for a name that nobody has."""
    try:
        entry = pwd.getpwuid(int(text)) if text.isdecimal() else pwd.getpwnam(text)
    except KeyError as error:
        if text.isdecimal():
            return int(text), int(text), []
        raise InputError(f"There is no user {text!r} here.") from error
    return entry.pw_uid, entry.pw_gid, os.getgrouplist(entry.pw_name, entry.pw_gid)
