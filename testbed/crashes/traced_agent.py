"""The agent, counting what Python has allocated (tracemalloc), as the row `growth` asks.

At SIGUSR1 it writes to the file named first how many bytes that are, when all garbage is collected. Resident memory
goes up by steps of allocators' arenas, for a long time after nothing grows any more; this does not. Like
``rdmanet agent`` otherwise.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import signal
import sys
import tracemalloc
from pathlib import Path

from rdmanet import config
from rdmanet.agent import Agent
from rdmanet.store import owned

#: More than the table has room for.
INTERNED = 200_000


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("answer", type=Path)
    parser.add_argument("--config", type=Path)
    chosen = parser.parse_args()
    tracemalloc.start()
    # Python's table of interned strings is made anew once, with 2 MB, when so many have come and gone: let that be now.
    for number in range(INTERNED):
        sys.intern(f"passing {number}")

    def tell(number: int, frame: object) -> None:
        gc.collect()
        new = chosen.answer.with_suffix(".new")
        new.write_text(str(tracemalloc.get_traced_memory()[0]), encoding="ascii")
        new.rename(chosen.answer)

    signal.signal(signal.SIGUSR1, tell)
    loaded = config.load(chosen.config)
    with owned(loaded.agent.state_dir):
        asyncio.run(Agent(loaded).serve())


if __name__ == "__main__":
    main()
