"""Every exception that rdmanet raises on purpose.

::

    RdmanetError                what happened and what to do, with errno, operation and object
    ├── InputError              the caller asked for something malformed
    │   ├── ConfigError         the agent's TOML file
    │   └── RequestError        a CNI request, an API body, a lease message
    ├── NotFoundError           the object asked for does not exist (any more)
    ├── ConflictError           the object exists already, or something else holds it
    ├── ExhaustedError          a bound was reached: addresses, leases, map entries
    ├── UnavailableError        this host or this moment cannot do it (no RDMA, agent away, kernel too old)
    ├── StateError              the agent's own database or files are not usable
    │   └── DamagedError        a database is damaged, or has lost rows; `rdmanet repair --database` writes it anew
    ├── KernelError             the kernel refused; errno says why
    │   ├── NetlinkError        rtnetlink or RDMA netlink
    │   ├── BpfError            bpf(2)
    │   │   └── VerifierError   a program was refused; ``log`` is what the verifier said
    │   └── VerbsError          an ibverbs call; ``status`` carries the work completion's status
    │       └── TimedOutError   an operation was not done in time; also a TimeoutError
    └── LeaseError              the broker refused or ended a lease
        ├── LeaseRefusedError   never granted
        └── LeaseRevokedError   granted, then taken back

The sentence is for people. Mapping to HTTP and CNI codes lives in ``rdmanet.api`` alone.
"""

from __future__ import annotations

import os


class RdmanetError(Exception):
    """Base of the tree.

    ``sentence`` says what happened and what a person can do; ``operation`` names what was tried (a netlink
    message, a verb, an API call) and ``subject`` what it was tried on; ``errno`` is the kernel's number or None.
    """

    def __init__(self, sentence: str, *, operation: str = "", subject: str = "", errno: int | None = None):
        super().__init__(sentence)
        self.sentence = sentence
        self.operation = operation
        self.subject = subject
        self.errno = errno

    def __str__(self) -> str:
        detail = self._details()
        return f"{self.sentence} ({': '.join(detail)})" if detail else self.sentence

    def _details(self) -> list[str]:
        detail = []
        if self.operation:
            detail.append(self.operation)
        if self.subject:
            detail.append(self.subject)
        if self.errno is not None:
            detail.append(f"errno {self.errno} {os.strerror(self.errno)}")
        return detail


class InputError(RdmanetError):
    """The caller asked for something malformed; asking again unchanged cannot succeed."""


class ConfigError(InputError):
    """The agent's configuration file is not usable."""


class RequestError(InputError):
    """A CNI request, an API body or a lease message is malformed."""


class NotFoundError(RdmanetError):
    """The object asked for does not exist, or exists no more."""


class ConflictError(RdmanetError):
    """The object exists already, or somebody else holds it."""


class ExhaustedError(RdmanetError):
    """A bound was reached."""


class UnavailableError(RdmanetError):
    """This host, or this moment, cannot do it."""


class StateError(RdmanetError):
    """The agent's own database or files are not usable."""


class DamagedError(StateError):
    """A database is damaged, or has lost rows."""


class KernelError(RdmanetError):
    """The kernel refused."""


class NetlinkError(KernelError):
    """rtnetlink or RDMA netlink refused."""


class BpfError(KernelError):
    """bpf(2) refused."""


class VerifierError(BpfError):
    """The kernel's verifier refused a program; ``log`` is all that it said."""

    def __init__(
        self, sentence: str, *, log: str = "", operation: str = "", subject: str = "", errno: int | None = None
    ):
        super().__init__(sentence, operation=operation, subject=subject, errno=errno)
        self.log = log


class VerbsError(KernelError):
    """An ibverbs call or an operation of a queue pair failed.

    ``operation`` is the operation (``write``) or the call; ``status`` the work completion's (InfiniBand 11.6.2) or
    None; ``peer`` the pod at the other end, or empty.
    """

    def __init__(
        self,
        sentence: str,
        *,
        operation: str = "",
        subject: str = "",
        errno: int | None = None,
        status: int | None = None,
        peer: str = "",
    ):
        super().__init__(sentence, operation=operation, subject=subject, errno=errno)
        self.status = status
        self.peer = peer

    def _details(self) -> list[str]:
        more = [f"peer {self.peer}"] if self.peer else []
        return [*super()._details(), *more, *([f"status {self.status}"] if self.status is not None else [])]


class TimedOutError(VerbsError, TimeoutError):
    """An operation was not done within the time that its caller gave it. What is under way goes on; the queue pair can
    be used, as after a cancellation."""


class LeaseError(RdmanetError):
    """The broker refused or ended a lease."""


class LeaseRefusedError(LeaseError):
    """The lease was never granted."""


class LeaseRevokedError(LeaseError):
    """The lease was granted and has been taken back."""
