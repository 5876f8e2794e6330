"""A real HTTP server that speaks OpenAI's protocol, and its troubles: errors, slowness, garbage."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType


@dataclass
class Asked:
    """A request."""

    path: str
    key: str | None
    body: dict[str, object]

    @property
    def user(self) -> str:
        """The user's message."""
        return self.body["messages"][1]["content"]  # type: ignore[index]

    @property
    def answer(self) -> str:
        """The answer that is to be labelled."""
        return re.findall(r"<answer (\w+)>\n(.*?)\n</answer \1>", self.user, re.DOTALL)[0][1]


@dataclass
class Reply:
    """What is sent back."""

    said: str = "answer"
    status: int = 200
    body: bytes | None = None
    headers: dict[str, str] = field(default_factory=dict)
    drop: bool = False

    def data(self) -> bytes:
        """The body, by default a chat completion."""
        if self.body is not None:
            return self.body
        return json.dumps({"choices": [{"message": {"role": "assistant", "content": self.said}}]}).encode()


class ChatServer:
    """It replies to each request as `reply` says, and keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[Asked] = []
        self.reply: Callable[[Asked], Reply] = lambda asked: Reply(asked.answer)
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                asked = Asked(self.path, self.headers.get("Authorization"), body)
                outer.asked.append(asked)
                found = outer.reply(asked)
                if found.drop:
                    self.close_connection = True
                    return
                self.send_response(found.status)
                for name, value in found.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(found.data())))
                self.end_headers()
                self.wfile.write(found.data())

            def log_message(self, format: str, *args: object) -> None:
                """Say nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> ChatServer:
        """Start it."""
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Stop it."""
        self._server.shutdown()
        self._server.server_close()
