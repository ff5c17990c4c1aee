"""What Python has allocated in an agent (``testbed.crashes.traced_agent``): resident memory goes up by steps."""

from __future__ import annotations

import signal
import time

from testbed.host import Host
from testbed.rows import need

_ANSWER = "/run/allocated"
_ANSWER_TIMEOUT_S = 60.0
#: What such an agent is started with.
TRACED = ("-m", "testbed.crashes.traced_agent", _ANSWER)


def allocated_bytes(host: Host) -> int:
    """What the agent says; its garbage is collected then. StepError when it says nothing."""
    assert host.agent is not None
    answer = host.path(_ANSWER)
    host.agent.process.signal(signal.SIGUSR1)
    deadline_s = time.monotonic() + _ANSWER_TIMEOUT_S
    while not answer.exists():
        need(time.monotonic() < deadline_s, "the agent does not say what it has allocated")
        time.sleep(0.01)
    found = int(answer.read_text(encoding="ascii"))
    answer.unlink()
    return found
