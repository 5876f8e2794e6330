"""How a request's next token is chosen, and how tokens become text that may be sent already."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""What a tokenizer gives for bytes that are no whole character yet."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """What a request asks for.

    Attributes:
        max_tokens: of the answer, at most.
        temperature: 0 takes the most likely token, as the safety floor was judged.
        top_p: the share of the most likely tokens that are drawn from (nucleus sampling, arXiv 1904.09751).
        seed: of the draw, which then does not depend on other requests.
        stop: texts that end the answer; they are not part of it.
    """

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()

    def generator(self) -> torch.Generator:
        """Return what the request's tokens are drawn with."""
        draw = torch.Generator()
        if self.seed is None:
            draw.seed()
        else:
            draw.manual_seed(self.seed)
        return draw


def pick(logits_V: Tensor, sampling: Sampling, draw: torch.Generator) -> int:
    """Return the next token."""
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    # in fp64: a temperature of 1e-3 makes differences that fp32 cannot tell
    likely_V, token_V = (logits_V.double() / sampling.temperature).softmax(-1).sort(descending=True)
    before_V = likely_V.cumsum(-1) - likely_V
    kept_V = torch.where(before_V < sampling.top_p, likely_V, 0.0)
    return int(token_V[torch.multinomial(kept_V, 1, generator=draw)])


class Text:
    """An answer as it grows: what is sent is never taken back.

    A character of several tokens waits for its last one, and what may be the beginning of a stop text for what follows.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str]) -> None:
        self._tokenizer, self._stop = tokenizer, stop
        self._ids: list[int] = []
        self._read = self._shown = 0  # tokens before these are text, and its end is what later ones are read after
        self._text, self._sent = "", 0
        self.stopped = False

    def add(self, token: int) -> str:
        """Take a token and return the text that is new and certain."""
        self._ids.append(token)
        # Both with the tokens before them: many tokenizers write a space only between two words.
        before, now = self._decoded(self._ids[self._shown : self._read]), self._decoded(self._ids[self._shown :])
        if len(now) > len(before) and not now.endswith(_UNFINISHED):
            self._text += now[len(before) :]
            self._shown, self._read = self._read, len(self._ids)
        return self._certain(self._held())

    def end(self) -> str:
        """Return the rest."""
        if self.stopped:
            return ""
        before = self._decoded(self._ids[self._shown : self._read])
        self._text += self._decoded(self._ids[self._shown :])[len(before) :]
        return self._certain(0)

    def _decoded(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))

    def _held(self) -> int:
        """Return how many characters at the end may begin a stop text."""
        # the longest end of the text that is the beginning of a stop text
        longest = max(map(len, self._stop), default=0)
        sizes = range(min(longest - 1, len(self._text)), 0, -1)
        return next((size for size in sizes if any(s.startswith(self._text[-size:]) for s in self._stop)), 0)

    def _certain(self, held: int) -> str:
        # in the whole text: a stop text may span what came with several tokens
        found = [place for text in self._stop if (place := self._text.find(text)) >= 0]
        self.stopped = bool(found)
        until = min(found) if found else len(self._text) - held
        new = self._text[self._sent : until]
        self._sent = max(self._sent, until)
        return new
