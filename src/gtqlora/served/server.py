"""A server's `/v1/completions`, which is asked with prompts that we rendered: the same tokens as ours, or an error.

Not its chat completions: those would render messages by the server's own template and variables, and say nothing of the
tokens that it came to. Prompts go as token ids, or as text to servers that take no ids; how many tokens the server has
read is compared with ours either way.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast

from gtqlora.config.addresses import SERVER_KEY, http_address
from gtqlora.errors import ModelError
from gtqlora.posting import PAUSES, Endpoint, Unserved

SECONDS = 600.0
"""Longest wait for an answer: of all that are asked at once a server may begin with the last one late."""
_PATH = "/completions"

Form = Literal["ids, told", "ids", "text"]
"""How a prompt is sent: in token ids and with wishes beyond OpenAI's protocol, in ids, or as text."""
_FORMS: tuple[Form, ...] = ("ids, told", "ids", "text")
_REFUSED = (400, 422)
# A server must neither leave the marks of thoughts out of a text, nor shape answers by defaults of its own or of the
# model: generation_config.json and GGUF metadata may bring penalties and cuts.
_WISHES = {
    "return_token_ids": True,
    "skip_special_tokens": False,
    "spaces_between_special_tokens": False,
    "repetition_penalty": 1.0,
    "repeat_penalty": 1.0,
    "top_k": -1,
    "min_p": 0.0,
}
_ADVICE = {
    401: f" (it wants a key: put it into {SERVER_KEY})",
    403: f" (it does not take the key in {SERVER_KEY})",
    404: " (no such model, or no /v1/completions there)",
    400: " (it does not take the request: is that its model's name, and its context long enough?)",
    422: " (it does not take the request)",
}


@dataclass(frozen=True, kw_only=True)
class Question:
    """A prompt as tokens and as the text that they are of, and how it is to be completed.

    Attributes:
        text: None where no text has just these tokens.
        temperature: 0 takes the likeliest tokens.
    """

    ids: Sequence[int]
    text: str | None
    most: int
    temperature: float = 0.0
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Completion:
    """What a server says: `tokens` where it tells them; `ended` by itself and not at the limit."""

    text: str
    tokens: list[int] | None
    ended: bool


class Server:
    """One model of a server.

    Args:
        url: its address, checked; a bare host has the protocol at /v1.
        model: what it is called there.
        pauses: seconds before each new try.
    """

    def __init__(self, url: str, model: str, *, pauses: Sequence[float] = PAUSES) -> None:
        address = http_address(url)
        assert address is not None, "settings are checked where they are made"
        path = address.path.rstrip("/").removesuffix(_PATH)
        self.url, self.model = url, model
        self._endpoint = Endpoint(address._replace(path=(path or "/v1") + _PATH), SERVER_KEY, SECONDS, pauses)
        self._form: Form | None = None

    @property
    def settled(self) -> bool:
        """Return whether it is known how prompts are sent."""
        return self._form is not None

    def complete(self, asked: Question) -> Completion:
        """Return the completion of a prompt.

        Raises:
            ModelError: the server is not there, refuses, does not speak the protocol, or read other tokens.
        """
        for form in _FORMS if self._form is None else (self._form,):
            try:
                found = self._read(self._endpoint.post(self._request(asked, form)), asked)
            except Unserved as error:
                if self._form is None and form != _FORMS[-1] and error.status in _REFUSED:
                    continue
                raise self.fault(f"{error}{_ADVICE.get(error.status or 0, '')}") from error
            self._form = form
            return found
        raise AssertionError("the last form returns or raises")

    def fault(self, what: str) -> ModelError:
        """Return the error of this server; never with its own words, as they may repeat the prompt."""
        return ModelError(f"{self.url} (model {self.model!r}): {what}")

    def _request(self, asked: Question, form: Form) -> dict[str, object]:
        if form == "text" and asked.text is None:
            raise Unserved("it takes no prompts in token ids, and there is no text of just these tokens")
        return {
            "model": self.model,
            "prompt": asked.text if form == "text" else list(asked.ids),
            "max_tokens": asked.most,
            "temperature": asked.temperature,
            "top_p": 1.0,
            "frequency_penalty": 0.0,
            "seed": asked.seed,
            **(_WISHES if form == "ids, told" else {}),
        }

    def _read(self, data: bytes, asked: Question) -> Completion:
        try:
            reply = json.loads(data)
            choice, usage = reply["choices"][0], reply["usage"]
            text, why, read = choice["text"], choice["finish_reason"], usage["prompt_tokens"]
            tokens: object = choice.get("token_ids")
        except (ValueError, RecursionError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise Unserved("its reply is no completion with its usage; is it an OpenAI-compatible server?") from error
        if not isinstance(text, str) or not isinstance(read, int):
            raise Unserved("its reply is no completion with its usage; is it an OpenAI-compatible server?")
        if read != len(asked.ids):
            raise Unserved(
                f"it read {read:,} tokens where the prompt has {len(asked.ids):,}: another tokenizer, or one that adds "
                "marks of its own"
            )
        told = isinstance(tokens, list) and all(type(token) is int for token in tokens)
        return Completion(text=text, tokens=cast(list[int], tokens) if told else None, ended=why == "stop")
