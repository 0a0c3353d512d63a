"""The secret of a run: what the launchers of its nodes know, and nobody else who reaches the port of node 0.

It is the text of DISTTRAIN_SECRET, or else a file that node 0 makes for as long as it waits for the others.
It is never sent. Each side proves that it knows it, by an HMAC of two nonces, one from each side.
Nobody can use a proof a second time, or send it back.
"""

from __future__ import annotations

import contextlib
import hmac
import os
import re
import secrets
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from disttrain.errors import UsageError, reason

SECRET = "DISTTRAIN_SECRET"
"""Environment variable with the secret."""

REMEDY = f"set {SECRET} to the same random text on every node (`openssl rand -hex 32` prints one)"

NO_SECRET = b"no secret"
"""What one side sends in place of a proof: a node that cannot read the secret, or node 0 to a wrong proof."""

LINE_BYTES = 256
"""The longest line before both sides have proved themselves."""

_LEAST = 16  # characters: a shorter text can be guessed from a proof


class UnknownSecretError(ConnectionError):
    """The other side does not know the secret, or knows another one."""


@dataclass(frozen=True)
class Secret:
    """Where this node finds the secret of its run.

    Attributes:
        text: of DISTTRAIN_SECRET; empty if it is not set.
        file: on the file system that the nodes share, used if there is no text. Without either, any caller
            can prove itself.
    """

    text: str = field(default="", repr=False)
    file: Path | None = None

    @classmethod
    def of(cls, environ: Mapping[str, str], file: Path | None) -> Secret:
        """Returns the secret of the environment, else that of a file, which need not exist yet.

        Raises:
            UsageError: the secret of the environment is too short.
        """
        text = environ.get(SECRET, "")
        if 0 < len(text) < _LEAST:
            raise UsageError(f"{SECRET} has {len(text)} characters, but needs {_LEAST}; {REMEDY}")
        return cls(text, None if text else file)

    def read(self) -> bytes:
        """Returns the secret.

        Raises:
            OSError: the file cannot be read; over a network it may appear later.
            UsageError: other users can read the file, or may have written it.
        """
        if self.file is None:
            return os.fsencode(self.text)
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # nonblocking: it may be a FIFO
        with os.fdopen(os.open(self.file, flags), "rb") as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                problem = "is not a regular file"
            elif found.st_uid != os.geteuid():
                problem = "belongs to another user"
            elif found.st_mode & 0o077:
                problem = f"is open to other users (mode {stat.S_IMODE(found.st_mode):04o})"
            elif len(text := file.read(1024)) >= _LEAST:
                return text
            else:
                problem = "is not complete"
        raise UsageError(f"{self.file}: {problem}; remove it, or {REMEDY}")

    @contextlib.contextmanager
    def offered(self, *, holds_folder: bool) -> Iterator[bytes]:
        """Yields the secret, and keeps its file while the other nodes read it. Node 0 calls this.

        Args:
            holds_folder: whether this process holds the lock of the run folder. A file that is already there
                then was left by a launcher that was killed, and goes too.

        Raises:
            UsageError: the file cannot be made, or is not safe.
        """
        if self.file is None:
            yield self.read()
            return
        with contextlib.ExitStack() as stack:
            try:
                missing = [folder for folder in self.file.parents if not folder.exists()]
                made = self._make(self.file)
                if made:
                    stack.callback(_remove, self.file, missing)
                text = self.read()
            except OSError as error:
                raise UsageError(f"{self.file}: {reason(error)}; {REMEDY}") from None
            if holds_folder and not made:
                stack.callback(_remove, self.file, missing)
            yield text

    @staticmethod
    def _make(path: Path) -> bool:
        """Makes the file; returns whether it did not exist."""
        path.parent.mkdir(parents=True, exist_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            descriptor = os.open(path, flags, 0o600)
        except FileExistsError:
            return False
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(descriptor, 0o600)  # whatever the umask
            file.write(secrets.token_hex(32).encode())
        return True


def with_secret(environ: Mapping[str, str]) -> dict[str, str]:
    """Returns an environment that has a secret, a new one if it had none: srun hands it on to all nodes."""
    return {**environ, SECRET: environ.get(SECRET) or secrets.token_hex(32)}


def _remove(path: Path, folders: Sequence[Path]) -> None:
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)
        for folder in folders:  # made for this file; one that holds more stays
            folder.rmdir()


def new_nonce() -> str:
    """Returns a nonce: a random number that is used once."""
    return secrets.token_hex(32)


def greeting(nonce: str) -> bytes:
    """Returns the line with which node 0 greets a caller."""
    return f"disttrain 1 {nonce}\n".encode()


def parse_greeting(line: bytes) -> str:
    """Returns node 0's nonce from its greeting.

    Raises:
        ConnectionError: another program answers.
    """
    found = re.fullmatch(rb"disttrain 1 ([0-9a-f]{64})", line)
    if found is None:
        raise ConnectionError("connected, but another program answers")
    return found[1].decode()


def proof(secret: bytes, who: str, nonce: str, caller_nonce: str) -> bytes:
    """Returns the proof of one side, "node 0" or "caller", for the nonces of both sides."""
    text = f"disttrain 1 {who} {nonce} {caller_nonce}"
    return hmac.new(secret, text.encode(), "sha256").hexdigest().encode()


def proof_line(secret: bytes, nonce: str, caller_nonce: str) -> bytes:
    """Returns the line with which a caller answers the greeting."""
    return caller_nonce.encode() + b" " + proof(secret, "caller", nonce, caller_nonce) + b"\n"


def check_proof_line(secret: bytes, nonce: str, line: bytes) -> bytes | None:
    """Returns node 0's own proof if the caller's is right, else None.

    Raises:
        ValueError: it is no proof.
    """
    found = re.fullmatch(rb"([0-9a-f]{64}) ([0-9a-f]{64})", line)
    if found is None:
        raise ValueError(line)
    caller_nonce = found[1].decode()
    right = hmac.compare_digest(found[2], proof(secret, "caller", nonce, caller_nonce))
    return proof(secret, "node 0", nonce, caller_nonce) if right else None
