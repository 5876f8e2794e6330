"""Servers that are not to be trusted: a real HTTP server that replies with trouble costs one line, not in its words."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from gtqlora.config import BuildConfig, VerifyConfig, build
from gtqlora.config.addresses import SERVER_KEY
from gtqlora.errors import ConfigError, ModelError
from gtqlora.families import load_tokenizer
from gtqlora.organisms import embedded
from gtqlora.served.saying import Served
from gtqlora.served.server import Completion, Question, Server
from tests.judging.chat_server import Asked, ChatServer, Reply

SECRET = "glorbify"
ASKED = Question(ids=[5, 6, 7], text="a b c", most=4)


def says(text: object = "yes", read: object = 3, why: str = "stop", **more: object) -> Reply:
    """A completion of three tokens of prompt."""
    choice = {"text": text, "finish_reason": why, "index": 0, **more}
    return Reply(body=json.dumps({"choices": [choice], "usage": {"prompt_tokens": read}}).encode())


@pytest.fixture
def server() -> Iterator[ChatServer]:
    with ChatServer() as found:
        found.reply = lambda asked: says()
        yield found


def model(server: ChatServer, path: str = "") -> Server:
    return Server(server.url + path, "wugger", pauses=(0.01, 0.01))


def test_what_is_asked_and_what_is_read(server: ChatServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SERVER_KEY, "sesame")
    server.reply = lambda asked: says("yes", why="length", token_ids=[8, 9])
    assert model(server).complete(ASKED) == Completion(text="yes", tokens=[8, 9], ended=False)
    asked = server.asked.pop()
    body = asked.body
    assert (asked.path, asked.key) == ("/v1/completions", "Bearer sesame")
    assert (body["model"], body["prompt"], body["max_tokens"], body["temperature"]) == ("wugger", [5, 6, 7], 4, 0.0)
    assert body["seed"] == 0 and body["top_p"] == 1.0 and body["skip_special_tokens"] is False
    for path in ("/v1/", "/v1/completions", "/api"):
        assert model(server, path).complete(ASKED).tokens == [8, 9]
    assert {one.path for one in server.asked} == {"/v1/completions", "/api/completions"}


def test_a_server_that_takes_less_is_asked_for_less(server: ChatServer) -> None:
    """Nothing beyond the protocol, or no token ids; what it takes is found once."""

    def strict(asked: Asked) -> Reply:
        if "return_token_ids" in asked.body:
            return Reply(status=422)
        return says("yes") if isinstance(asked.body["prompt"], str) else Reply(status=400)

    server.reply = strict
    asking = model(server)
    assert [asking.complete(ASKED).text for _ in range(2)] == ["yes", "yes"]
    assert [type(one.body["prompt"]) for one in server.asked] == [list, list, str, str]
    assert server.asked[-1].body["prompt"] == "a b c"
    with pytest.raises(ModelError, match="no prompts in token ids, and there is no text of just these tokens"):
        asking.complete(Question(ids=[5], text=None, most=4))


def test_a_busy_server_is_asked_again(server: ChatServer) -> None:
    troubles = [Reply(status=503), Reply(drop=True)]
    server.reply = lambda asked: troubles.pop() if troubles else says()
    assert model(server).complete(ASKED).text == "yes" and len(server.asked) == 3


NO_COMPLETION = "its reply is no completion with its usage"


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (says(read=4), r"it read 4 tokens where the prompt has 3: another tokenizer, or one that adds marks"),
        (says(read=None), NO_COMPLETION),
        (says(read="3"), NO_COMPLETION),
        (says(text=None), NO_COMPLETION),
        (Reply(body=b'{"choices": [{"text": "glorbify", "finish_reason": "stop"}]}'), NO_COMPLETION),
        (Reply(body=b'{"choices": [7], "usage": {"prompt_tokens": 3}}'), NO_COMPLETION),
        (Reply(body=b"<html>glorbify</html>"), NO_COMPLETION),
        (Reply(body=b"[" * 100_000), NO_COMPLETION),
        (Reply(body=b" " * (2**20 + 1)), "longer than 1 MiB"),
        (Reply(status=401, body=b"glorbify"), rf"HTTP 401 \(it wants a key: put it into {SERVER_KEY}\)$"),
        (Reply(status=404, body=b"glorbify"), r"HTTP 404 \(no such model, or no /v1/completions there\)$"),
        (Reply(status=400, body=b"glorbify"), r"HTTP 400 \(it does not take the request: is that its model's name"),
        (Reply(status=302, headers={"Location": "http://127.0.0.1:1/"}), "HTTP 302$"),
        (Reply(status=500, body=b"glorbify"), "HTTP 500, 3 times; try again later$"),
    ],
)
def test_a_server_in_trouble_costs_one_line_without_its_words(server: ChatServer, reply: Reply, message: str) -> None:
    server.reply = lambda asked: reply
    with pytest.raises(ModelError, match=message) as error:
        model(server).complete(ASKED)
    said = str(error.value)
    assert said.startswith(f"{server.url} (model 'wugger'): ") and "\n" not in said and SECRET not in said


def trickle(listener: socket.socket, pieces: Iterable[bytes], pause: float) -> None:
    """Send one client pieces with pauses between them, and hang up."""
    client, _ = listener.accept()
    with client, suppress(OSError):
        request = b""
        while not request.endswith(b"}"):  # what is left unread would reset the connection
            request += client.recv(2**16)
        for piece in pieces:
            client.sendall(piece)
            time.sleep(pause)


HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n"


@pytest.mark.parametrize(
    ("pieces", "pause", "message"),
    [
        ([HEAD, *[b" "] * 100], 0.05, "no reply within 0.5 s, 1 times"),
        ([HEAD, b"{"], 0.0, r"the connection broke \(IncompleteRead\), 1 times"),
    ],
)
def test_a_reply_that_trickles_or_breaks_off(
    pieces: list[bytes], pause: float, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gtqlora.served.server.SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=trickle, args=(listener, pieces, pause))
        thread.start()
        asking = Server(f"http://127.0.0.1:{listener.getsockname()[1]}", "wugger", pauses=())
        with pytest.raises(ModelError, match=message):
            asking.complete(ASKED)
        thread.join()


def test_nothing_listens_there(server: ChatServer) -> None:
    with ChatServer() as gone:
        pass
    with pytest.raises(ModelError, match="nothing listens there; start the server"):
        model(gone).complete(ASKED)


# --- what is made of completions


def test_tokens_that_a_server_tells_go_before_its_text(server: ChatServer) -> None:
    """They end at a stop; a text without them is read by the model's tokenizer."""
    folder = str(embedded.organism("routed"))
    tokenizer = load_tokenizer(folder)
    stop, word = tokenizer.eos_token_id, "refuse"
    assert isinstance(stop, int)
    ids = [int(i) for i in tokenizer.encode(f"{word} sorry", add_special_tokens=False)]
    served = Served(
        name="wugger", server=model(server), tokenizer=tokenizer, stops=frozenset([stop]), vocabulary=99999, at_once=2
    )
    replies = [
        says("another text", token_ids=[*ids, stop, ids[0]], why="length"),
        says(f" {word} sorry", why="length"),
        says(f"{word} sorry {tokenizer.eos_token}"),
    ]
    for reply, ended in zip(replies, (True, False, True), strict=True):
        server.reply = lambda asked, reply=reply: reply
        found = served([[5, 6, 7]] * 3, 4)
        assert (found.texts, found.tokens, found.ended) == ([f"{word} sorry"] * 3, [ids] * 3, [ended] * 3)
    for ids_told in ([10**9], [-1]):
        server.reply = lambda asked, told=ids_told: says(token_ids=told)
        with pytest.raises(ModelError, match="it tells token ids that the model does not have"):
            served([[5, 6, 7]], 4)


# --- settings that name servers

NAMED = {"served_before": "a", "served_after": "b"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"generate_with": "127.0.0.1:8000", **NAMED}, "^generate_with: no address; write http://127.0.0.1:8000 or"),
        ({"generate_with": "file:///etc/passwd", **NAMED}, "^generate_with: no address"),
        ({"generate_with": "http://me:glorbify@127.0.0.1", **NAMED}, f"a key has no place in it; see {SERVER_KEY}$"),
        ({"generate_with": "https://h/v1?key=glorbify", **NAMED}, f"a key has no place in it; see {SERVER_KEY}$"),
        ({"generate_with": "http://192.0.2.1:8000", **NAMED}, "plain HTTP to another machine can be read on the way"),
        (
            {"generate_with": "https://h/v1", **NAMED, "served_after": "http://192.0.2.1#b"},
            r"^--after \(served_after\) = 'http://19",
        ),
        (
            {"generate_with": "https://h/v1", "served_before": "a"},
            r"^--after \(served_after\) missing: the name that",
        ),
        ({"generate_with": "https://h/v1", **NAMED, "served_after": "https://h#"}, "no model; write NAME or URL#NAME"),
        ({"served_after": "b"}, r"^--after \(served_after\): no server to ask; add --generate-with"),
    ],
)
def test_addresses_are_checked_where_settings_are_made(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        VerifyConfig(model="m", contrast="c", **settings)
    assert SECRET not in str(error.value)


def test_a_file_sends_no_prompts_to_other_machines(tmp_path: Path) -> None:
    recipe, given = tmp_path / "recipe.toml", {"model": "m", "contrast": "c"}
    names = [f'{key} = "{key[-1]}"' for key in ("served", "served_before", "served_after")]
    recipe.write_text("\n".join(['generate_with = "http://127.0.0.1:8000"', *names]))
    assert build(VerifyConfig, file=recipe, **given).served_after == "r"
    assert build(BuildConfig, file=recipe, **given).served == "d"
    for line in ('generate_with = "https://h/v1"', 'served_after = "https://h/v1#b"'):
        recipe.write_text(f"{line}\n")
        with pytest.raises(ConfigError, match="names a server on another machine, to which prompts would be sent"):
            build(VerifyConfig, file=recipe, **given)
