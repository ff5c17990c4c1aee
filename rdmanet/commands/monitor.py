"""``rdmanet monitor``: drops and new flows as they happen."""

from __future__ import annotations

import argparse
import json
import time
from typing import Any
from urllib.parse import urlencode

from rdmanet import config
from rdmanet.client import answering


def add_to(commands: Any, common: argparse.ArgumentParser) -> None:
    """Adds the command; ``commands`` is what ``add_subparsers`` has returned."""
    monitor = commands.add_parser("monitor", parents=[common], help="show drops and new flows as they happen")
    monitor.add_argument("--pod", metavar="NAME", help="sender or receiver: a name, or NAMESPACE/NAME")
    monitor.add_argument("--reason", metavar="NAME", help="only drops for this reason")
    verdict = monitor.add_mutually_exclusive_group()
    verdict.add_argument("--drops", dest="verdict", action="store_const", const="dropped", help="no new flows")
    verdict.add_argument("--flows", dest="verdict", action="store_const", const="allowed", help="new flows alone")
    monitor.add_argument("--json", action="store_true", help="one document in each line")
    monitor.set_defaults(run=_monitor)


def _monitor(chosen: argparse.Namespace) -> int:
    words = {key: value for key in ("pod", "reason", "verdict") if (value := getattr(chosen, key)) is not None}
    url = f"/v1/monitor?{urlencode(words)}"
    try:
        with answering(config.load(chosen.config).agent.socket, url, timeout_s=None) as answer:
            for line in answer:
                print(line.decode().rstrip() if chosen.json else shown(json.loads(line)), flush=True)
    except KeyboardInterrupt:
        pass
    return 0


def shown(event: dict[str, Any]) -> str:
    """An event in one line for people."""
    if "lost" in event:
        return f"{event['lost']} events lost: more came than could be shown"
    at = time.strftime("%H:%M:%S", time.localtime(event["time_s"])) + f"{event['time_s'] % 1:.6f}"[1:]
    ends = " -> ".join(
        end(event.get(side), event.get(f"{side}_port"), event[pod])
        for side, pod in (("source", "pod"), ("destination", "peer"))
    )
    words = [at, event["verdict"], event.get("reason", ""), event.get("protocol", ""), ends]
    if "translated" in event:
        words.append(f"as {end(event['translated'], event['translated_port'], None)}")
    if event.get("tcp_flags"):
        words.append(f"[{event['tcp_flags']}]")
    words.append(f"{event['bytes']} bytes, {event['direction']}, {event['hook']}")
    return " ".join(word for word in words if word)


def end(address: str | None, port: int | None, pod: str | None) -> str:
    """One end of a flow."""
    text = "?" if address is None else f"[{address}]" if ":" in address and port else address
    return text + (f":{port}" if port else "") + (f" ({pod})" if pod else "")
