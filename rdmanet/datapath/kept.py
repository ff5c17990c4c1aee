"""Artifacts that the agent keeps: the one that runs, the one before it, and the one that is being put in its place;
and what the verifier said of the last one that it refused.

They say how what is pinned is laid out, also to a later version of rdmanet, and let the previous one be put back. Files
are compressed and written in one step.
"""

from __future__ import annotations

import contextlib
import gzip
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rdmanet.datapath import artifact as artifacts
from rdmanet.datapath.artifact import Artifact
from rdmanet.errors import NotFoundError, StateError, VerifierError

RUNNING, PREVIOUS, NEXT = "running", "previous", "next"
_PASSED_OVER = "passed-over"
_LOG = "verifier.log"
_SUFFIX = ".json.gz"


class Kept:
    """The files below ``directory``, which is made when the first is written. Safe against a crash at any point: two
    files may then be the same artifact."""

    def __init__(self, directory: Path):
        self._directory = directory

    def load(self, name: str) -> Artifact | None:
        """``RUNNING``, ``PREVIOUS`` or ``NEXT``; None where there is none. Raises StateError for a damaged file."""
        path = self._path(name)
        try:
            text = gzip.decompress(path.read_bytes()).decode("utf-8")
        except FileNotFoundError:
            return None
        except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
            raise StateError(
                f"The kept datapath {path} is damaged ({error}); remove it and start the agent again.",
                subject=str(path),
            ) from error
        return artifacts.decode(text, str(path))

    def previous(self) -> Artifact:
        """The one that ran before. Raises NotFoundError where nothing has been replaced yet."""
        found = self.load(PREVIOUS)
        if found is None:
            raise NotFoundError(
                "There is no previous datapath to put back: none has been replaced yet.",
                operation="swap",
                subject=str(self._path(PREVIOUS)),
            )
        return found

    def find(self, hash_prefix: str) -> Artifact | None:
        """The one whose hash begins so, if it is kept."""
        for name in (NEXT, RUNNING, PREVIOUS):
            found = self.load(name)
            if found is not None and found.hash.startswith(hash_prefix):
                return found
        return None

    def begin(self, artifact: Artifact) -> None:
        """The artifact will be put in the place of the one that runs."""
        self._write(self._path(NEXT), gzip.compress(artifacts.encode(artifact).encode("utf-8"), 6, mtime=0))

    def take_back(self) -> None:
        """It was not. Idempotent."""
        self._path(NEXT).unlink(missing_ok=True)

    def commit(self) -> None:
        """It runs now; the one that did is the previous one. Idempotent."""
        following, running = self.load(NEXT), self.load(RUNNING)
        if following is None:
            return
        if running is not None and running.hash != following.hash:
            self._path(RUNNING).replace(self._path(PREVIOUS))
        self._path(NEXT).replace(self._path(RUNNING))

    def choose(self, offered: Artifact) -> Artifact:
        """What a start runs: the offered artifact, unless the previous one was put back in its very place."""
        try:
            passed_over = (self._directory / _PASSED_OVER).read_text(encoding="ascii").strip()
        except FileNotFoundError:
            return offered
        running = self.load(RUNNING)
        return running if passed_over == offered.hash and running is not None else offered

    def pass_over(self, offered: Artifact | None) -> None:
        """From now on starts do not take this artifact; None: whatever is offered."""
        path = self._directory / _PASSED_OVER
        if offered is None:
            path.unlink(missing_ok=True)
        else:
            self._write(path, offered.hash.encode("ascii"))

    def keep_log(self, text: str) -> Path:
        """Keeps what the verifier said last; returns where."""
        path = self._directory / _LOG
        self._write(path, text.encode("utf-8"))
        return path

    def remove(self) -> None:
        """Removes all files and, when nothing else is there, the directory. Idempotent."""
        if not self._directory.is_dir():
            return
        for name in (RUNNING, PREVIOUS, NEXT):
            self._path(name).unlink(missing_ok=True)
        for name in (_PASSED_OVER, _LOG):
            (self._directory / name).unlink(missing_ok=True)
        for path in self._directory.glob("*.part"):
            path.unlink()
        if not any(self._directory.iterdir()):
            self._directory.rmdir()

    def _path(self, name: str) -> Path:
        return self._directory / f"{name}{_SUFFIX}"

    def _write(self, path: Path, content: bytes) -> None:
        part = path.with_name(f"{path.name}.part")
        try:
            self._directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            with part.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        except OSError as error:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)
            raise StateError(
                f"The datapath cannot be kept in {self._directory}: {error.strerror}. Free space, and try again.",
                operation="write",
                subject=str(path),
                errno=error.errno,
            ) from error


@contextmanager
def explained(kept: Kept | None) -> Iterator[None]:
    """Keeps what the verifier says of a program that it refuses, and says where."""
    try:
        yield
    except VerifierError as error:
        if kept is None:
            raise
        raise VerifierError(
            f"{error.sentence} Nothing was changed; all that it said is in {kept.keep_log(error.log)}.",
            log=error.log,
            operation=error.operation,
            subject=error.subject,
            errno=error.errno,
        ) from error
