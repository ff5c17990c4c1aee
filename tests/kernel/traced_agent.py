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
import tracemalloc
from pathlib import Path

from rdmanet import config
from rdmanet.agent import Agent
from rdmanet.store import owned


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("answer", type=Path)
    parser.add_argument("--config", type=Path)
    chosen = parser.parse_args()
    tracemalloc.start()

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
