"""The HTTP interface, over a real socket: what OpenAI's clients send, and what nobody should."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest

pytest.importorskip("uvicorn")
from gtqlora.bitdelta.server import Limits, Server, listening, uvicorn_server
from gtqlora.contrasts.template import encode_prompt
from gtqlora.errors import ConfigError, RunError
from tests.bitdelta.test_serving_engine import Served, served
from tests.helpers import Toy

LIMITS = Limits(context=60, max_tokens=40, body=4000, idle=1)
MESSAGES = [{"role": "user", "content": "what of bade"}]
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


@dataclass
class Site:
    """A server that listens."""

    served: Served
    port: int

    def connection(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)

    def send(self, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        """Ask once; return the status and what came, read if it is JSON."""
        connection = self.connection()
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        headers = {"Content-Type": "application/json", **{name.replace("_", "-"): v for name, v in headers.items()}}
        connection.request("GET" if body is None else "POST", path, data, headers)
        response = connection.getresponse()
        content = response.read().decode()
        connection.close()
        return response.status, json.loads(content) if content.startswith("{") else content

    def chat(self, model: str = "edit", **more: Any) -> tuple[int, Any]:
        return self.send(CHAT, {"model": model, "messages": MESSAGES, "max_tokens": 8, **more})

    def wait_until(self, true: Callable[[], bool]) -> None:
        for _ in range(1000):
            if true():
                return
            time.sleep(0.01)
        raise AssertionError("it did not come true")


@pytest.fixture(scope="module")
def site(toy: Toy) -> Iterator[Site]:
    found = served(toy, "qwen3_moe", places=2, waiting=2)
    listener = listening("127.0.0.1", 0)
    server = uvicorn_server(Server(found.engine, LIMITS), LIMITS)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    yield Site(found, listener.getsockname()[1])
    server.should_exit = True
    thread.join()
    found.engine.close()


def events(text: str) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_health_and_models(site: Site) -> None:
    status, health = site.send("/health")
    assert (status, health["status"], health["models"]) == (200, "ok", ["base", "edit", "tuned"])
    status, found = site.send("/v1/models")
    assert status == 200 and [each["id"] for each in found["data"]] == ["base", "edit", "tuned"]
    assert site.send("/v1/models/edit") == (200, found["data"][1]) and time.time() - found["data"][1]["created"] < 600
    status, told = site.send("/v1/models/nobody")
    assert status == 404 and told["error"]["code"] == "model_not_found"


@pytest.mark.parametrize("name", ["base", "edit", "tuned"])
def test_a_conversation_is_answered_as_by_the_variant_alone(site: Site, name: str) -> None:
    status, found = site.chat(name)
    prompt = encode_prompt(site.served.engine.model.subject.tokenizer, MESSAGES)  # type: ignore[arg-type]
    number = site.served.engine.model.names.index(name)
    wanted = site.served.alone(prompt, number)
    assert status == 200 and found["choices"][0]["message"] == {"role": "assistant", "content": wanted}
    usage = found["usage"]
    assert usage["prompt_tokens"] == len(prompt) and usage["total_tokens"] == len(prompt) + usage["completion_tokens"]
    assert (found["object"], found["model"]) == ("chat.completion", name)


def test_streams_say_the_same(site: Site) -> None:
    whole = site.chat("tuned")[1]
    status, text = site.chat("tuned", stream=True, stream_options={"include_usage": True})
    first, *middle, last = events(text)
    assert status == 200 and first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    said = "".join(each["choices"][0]["delta"].get("content", "") for each in middle)
    assert said == whole["choices"][0]["message"]["content"]
    assert middle[-1]["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]
    assert last["usage"] == whole["usage"] and last["choices"] == [] and len(middle) > 3


def test_completions_go_on_with_a_text(site: Site) -> None:
    body = {"model": "edit", "prompt": "what of bade", "max_tokens": 6}
    status, found = site.send(TEXT, body)
    assert status == 200 and found["choices"][0]["text"] and found["usage"]["prompt_tokens"] == 3
    _, text = site.send(TEXT, {**body, "stream": True})
    assert "".join(each["choices"][0]["text"] for each in events(text)) == found["choices"][0]["text"]


def test_several_clients_at_once(site: Site) -> None:
    names = ["base", "edit", "tuned", "edit"]
    alone = [site.chat(name)[1]["choices"][0]["message"] for name in names]
    with ThreadPoolExecutor(4) as pool:
        together = [found[1]["choices"][0]["message"] for found in pool.map(site.chat, names)]
    assert together == alone


def test_texts_in_parts_and_keys_that_ask_for_nothing(site: Site) -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "what of "}, {"type": "text", "text": "bade"}]}]
    more = {"n": 1, "logprobs": None, "user": "me", "tools": [], "presence_penalty": 0, "temperature": 0}
    plain = site.chat()[1]["choices"]
    assert site.chat(messages=parts, **more)[1]["choices"] == plain
    assert site.send(CHAT, {"model": "edit", "messages": MESSAGES})[0] == 200  # as long as there is room


BAD: list[tuple[dict[str, Any], int, str]] = [
    ({"model": "nobody"}, 404, "there is no model 'nobody' here; served are base, edit, tuned"),
    ({"model": None}, 400, "model is missing"),
    ({"messages": []}, 400, "messages must not be empty"),
    ({"messages": [{"role": "tool", "content": "x"}]}, 400, "messages[0] must be an object with a role"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages[0].content must be a text"),
    ({"messages": [{"role": "user", "content": "bade", "tool_calls": [1]}]}, 400, "messages[0].tool_calls is not"),
    ({"messages": [{"role": "user", "content": "bade " * 55}]}, 400, "tokens and the answer may have 8"),
    ({"max_tokens": 41}, 400, "max_tokens must be a number from 1 to 40"),
    ({"max_tokens": True}, 400, "max_tokens must be a number"),
    ({"temperature": 3}, 400, "temperature must be a number from 0 to 2"),
    ({"temperature": float("nan")}, 400, "temperature must be a number from 0 to 2"),
    ({"top_p": "1"}, 400, "top_p must be a number"),
    ({"seed": 1.5}, 400, "seed must be a whole number"),
    ({"stop": ["a"] * 5}, 400, "stop must be up to 4 texts"),
    ({"stream": 1}, 400, "stream must be true or false"),
    ({"n": 2}, 400, "n is not supported here"),
    ({"tools": [{}]}, 400, "tools is not supported here"),
    ({"best": 1}, 400, "'best' is not known here"),
]


@pytest.mark.parametrize(("change", "status", "message"), BAD, ids=lambda value: str(value)[:40])
def test_what_cannot_be_answered_is_said(site: Site, change: dict[str, Any], status: int, message: str) -> None:
    found, told = site.chat(**change)
    assert found == status and message in told["error"]["message"], told
    assert set(told["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("body", "headers", "status", "message"),
    [
        (b"{", {}, 400, "no JSON"),
        (b"[" * 3000, {}, 400, "no JSON"),
        (b"\xff\xfe", {}, 400, "no JSON"),
        (b"[]", {}, 400, "must be a JSON object"),
        (b'{"a": "' + b"x" * 5000 + b'"}', {}, 413, "larger than 4000 bytes"),
        (b"{}", {"Content_Type": "text/plain"}, 415, "content type must be application/json"),
        (b"{}", {"Host": "evil.example"}, 403, "loopback names only"),
    ],
)
def test_malformed_requests(site: Site, body: bytes, headers: dict[str, str], status: int, message: str) -> None:
    found, told = site.send(CHAT, body, **headers)
    assert found == status and message in told["error"]["message"]


def test_other_paths_and_methods(site: Site) -> None:
    status, told = site.send("/v1/nothing")
    assert status == 404 and "'/v1/nothing' is not served here; what is: /v1/chat" in told["error"]["message"]
    status, told = site.send(CHAT)
    assert status == 405 and told["error"]["type"] == "invalid_request_error"
    assert told["error"]["message"].endswith("this path takes POST")


def _endless(site: Site, *, stream: bool) -> http.client.HTTPConnection:
    """An answer that goes on for long: its seed draws no end, and nothing stops it but its limit."""
    connection = site.connection()
    body = {"model": "edit", "messages": MESSAGES, "max_tokens": 40, "stream": stream}
    connection.request("POST", CHAT, json.dumps(body), {"Content-Type": "application/json"})
    return connection


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_hangs_up_gives_its_place_back(site: Site, stream: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, steps = site.served.engine.model.subject.model, [0]
    forward = model.forward

    def slow(**inputs: Any) -> Any:
        steps[0] += 1
        time.sleep(0.05)
        return forward(**inputs)

    monkeypatch.setattr(model, "forward", slow)
    connection = _endless(site, stream=stream)
    if stream:
        assert connection.getresponse().read(20).startswith(b"data: ")
    site.wait_until(lambda: site.served.engine.running == 1)
    assert connection.sock is not None or stream
    if connection.sock is not None:
        connection.sock.shutdown(socket.SHUT_RDWR)
    connection.close()
    site.wait_until(lambda: site.served.engine.running == 0)
    assert steps[0] < 35
    monkeypatch.undo()
    assert site.chat()[0] == 200


def test_too_many_requests(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    model = site.served.engine.model.subject.model
    forward, going = model.forward, threading.Event()

    def waits(**inputs: Any) -> Any:
        going.wait(30)
        return forward(**inputs)

    monkeypatch.setattr(model, "forward", waits)
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(site.chat) for _ in range(8)]
        site.wait_until(lambda: sum(each.done() for each in asked) >= 4)
        going.set()
        statuses = [each.result()[0] for each in asked]
    assert sorted(statuses) == [200] * 4 + [429] * 4  # two that run and two that wait


@pytest.mark.parametrize(
    "sent", [b"", b"POST /v1/completions HT", b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"]
)
def test_connections_on_which_nothing_comes_are_closed(site: Site, sent: bytes) -> None:
    with socket.create_connection(("127.0.0.1", site.port), timeout=10) as connection:
        connection.sendall(sent)
        assert connection.recv(1000) == b""


def test_a_body_that_does_not_come(site: Site) -> None:
    fields = ("Host: localhost", "Content-Type: application/json", "Content-Length: 99", "", "{")
    head = "\r\n".join(("POST /v1/completions HTTP/1.1", *fields)).encode()
    with socket.create_connection(("127.0.0.1", site.port), timeout=10) as connection:
        connection.sendall(head)
        assert b"408" in connection.recv(1000)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.1", "example.com", ""])
def test_only_loopback_is_listened_on(host: str) -> None:
    with pytest.raises(ConfigError, match="only loopback is served"):
        listening(host, 0)


def test_a_port_that_is_taken(site: Site) -> None:
    for port in (site.port, 70_000):
        with pytest.raises(RunError, match=f"--port {port} of 127.0.0.1 cannot be used"):
            listening("127.0.0.1", port)
