"""What an application may choose about a queue pair."""

from __future__ import annotations

from dataclasses import dataclass

from rdmanet.errors import InputError


@dataclass(frozen=True, slots=True)
class Options:
    """Sizes of a queue pair's queues, and how it learns of completions. Both ends of a lease should agree on
    ``message_bytes``."""

    # One less than a power of two: rings keep one entry free, and on rxe a ring for 16 would be one for 31.
    window: int = 15  # requests in flight
    chunk_bytes: int = 1 << 20  # WRITE and READ are split into requests of this size
    messages: int = 15  # receives posted; a sender waits while all are taken
    message_bytes: int = 4096  # longest message of send()
    #: Look for completions again and again while an operation waits, instead of being woken for each: takes a whole
    #: processor, and pays only where the device works beside it (docs/verbs.md has the figures).
    polling: bool = False

    def __post_init__(self) -> None:
        for name in ("window", "chunk_bytes", "messages", "message_bytes"):
            if getattr(self, name) < 1:
                raise InputError(f"Options.{name} must be at least 1")
