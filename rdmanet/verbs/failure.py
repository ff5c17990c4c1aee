"""Why a queue pair is broken: what the device's answers mean for a person, and errors that can be raised many times."""

from __future__ import annotations

from collections.abc import Callable

from rdmanet.errors import RdmanetError, VerbsError

#: Makes the same error each time: one instance raised in several places would collect all their tracebacks.
Failure = Callable[[], RdmanetError]

#: What a work completion's status means for a person (ibv_wc_status; InfiniBand 11.6.2).
_STATUS = {
    1: "a message did not fit: the peer sent more bytes than this end's Options.message_bytes",
    2: "the device could not carry out a request; on Soft-RoCE, where nothing else fits, the peer sent more bytes than "
    "this end's Options.message_bytes",
    4: "local memory was not registered for this use, or the range is outside its region",
    5: "the queue pair was shut down before the request was done",
    9: "the peer's queue pair refused the request as malformed: it does not take messages this long",
    10: "the peer refused access: key, range or rights of the remote region do not allow it",
    11: "the peer could not carry out the request",
    12: "the peer does not answer: its process or its pod is gone, or packets are dropped on the way",
    13: "the peer never had a receive posted",
}


def completion_error(status: int, device: str, operation: str, peer: str) -> VerbsError:
    """A failed work completion of an operation as an exception."""
    sentence = _STATUS.get(status, "the device reports a failed request")
    return VerbsError(sentence, operation=operation, subject=device, status=status, peer=peer)


def again(error: VerbsError) -> Failure:
    """Makes errors equal to this one."""
    return lambda: VerbsError(
        error.sentence,
        operation=error.operation,
        subject=error.subject,
        errno=error.errno,
        status=error.status,
        peer=error.peer,
    )
