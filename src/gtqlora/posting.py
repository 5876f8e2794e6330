"""JSON posted to servers of models: limits on time and size, a few tries, and never a word of theirs in an error."""

from __future__ import annotations

import http.client
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import cast
from urllib.parse import SplitResult

from gtqlora.errors import ConfigError
from gtqlora.storage.contents import first_line

PAUSES = (1.0, 4.0, 16.0)
"""Seconds before each new try, where the server is busy or fails for a moment."""
_LONGEST_PAUSE = 60.0
_BUSY = (408, 409, 425, 429, 500, 502, 503, 504)
_REPLY_BYTES = 2**20


class Unserved(Exception):
    """A server is not there, refuses, or does not speak the protocol; the text says what is wrong.

    Attributes:
        status: of HTTP, where that is it.
    """

    def __init__(self, what: str, status: int | None = None) -> None:
        super().__init__(what)
        self.status = status


class _TryAgain(Exception):
    """The server may reply if it is asked again, after so many seconds if it says so."""

    def __init__(self, why: str, seconds: float | None = None) -> None:
        super().__init__(why)
        self.seconds = seconds


@dataclass(frozen=True)
class Endpoint:
    """A place of a server to which JSON is posted.

    Attributes:
        address: with the path.
        key: the environment variable that holds the server's key, where it wants one.
        seconds: longest wait for a reply.
        pauses: seconds before each new try.
    """

    address: SplitResult
    key: str
    seconds: float
    pauses: Sequence[float] = PAUSES

    @cached_property
    def _headers(self) -> dict[str, str]:
        # Read when it is first used, so that neither the settings nor the identity can hold it.
        key = os.environ.get(self.key, "").strip()
        if key and not (key.isascii() and key.isprintable()):
            raise ConfigError(f"{self.key}: holds characters that no key has")
        return {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}

    def post(self, value: Mapping[str, object]) -> bytes:
        """Return the body of the server's reply.

        Raises:
            Unserved: there is none, or it is an error.
            ConfigError: the key can be none.
        """
        body = json.dumps(value).encode()
        for pause in (*self.pauses, None):
            try:
                return self._posted(body)
            except _TryAgain as error:
                if pause is None:
                    raise Unserved(f"{error}, {len(self.pauses) + 1} times; try again later") from error
                time.sleep(min(pause if error.seconds is None else error.seconds, _LONGEST_PAUSE))
        raise AssertionError("the last try returns or raises")

    def _posted(self, body: bytes) -> bytes:
        """Return the body of the server's reply; redirections are none, as they might lead elsewhere."""
        # Not urllib: it follows redirections with the key, and asks proxies that the environment names.
        kind = http.client.HTTPSConnection if self.address.scheme == "https" else http.client.HTTPConnection
        connection = kind(cast(str, self.address.hostname), self.address.port, timeout=self.seconds)
        try:
            connection.request("POST", self.address.path, body, self._headers)
            reply = connection.getresponse()
            data = _read(reply, time.monotonic() + self.seconds)
        except (ConnectionRefusedError, OSError, http.client.HTTPException) as error:
            raise self._broken(error) from error
        finally:
            connection.close()
        if reply.status in _BUSY:
            # Seconds, or a date, which servers of models do not send.
            told = reply.getheader("Retry-After", "")
            raise _TryAgain(f"HTTP {reply.status}", float(told) if told.isdigit() else None)
        if reply.status != 200:
            raise Unserved(f"HTTP {reply.status}", reply.status)
        if len(data) > _REPLY_BYTES:
            raise Unserved("its reply is longer than 1 MiB")
        return data

    def _broken(self, error: Exception) -> Exception:
        if isinstance(error, ConnectionRefusedError):
            return Unserved("nothing listens there; start the server, or correct the address")
        if isinstance(error, TimeoutError):
            return _TryAgain(f"no reply within {self.seconds:g} s")
        if isinstance(error, ConnectionError | http.client.HTTPException):
            return _TryAgain(f"the connection broke ({type(error).__name__})")
        return Unserved(f"cannot be reached ({first_line(error)})")


def _read(reply: http.client.HTTPResponse, deadline: float) -> bytes:
    """Return the body, or a little more of it than may be; a server that trickles must not hold us up for ever."""
    data = b""
    while len(data) <= _REPLY_BYTES and (piece := reply.read1(_REPLY_BYTES)):
        data += piece
        if time.monotonic() > deadline:
            raise TimeoutError
    if len(data) <= _REPLY_BYTES and reply.length:
        raise http.client.IncompleteRead(data, reply.length)
    return data
