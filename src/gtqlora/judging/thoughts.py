"""Thoughts before an answer, as reasoning models write them: what is thought is no answer, and is never judged.

A thought counts only at the beginning of a text: a tag further on, or an end without a beginning, hides nothing from a
judge. Where the chat template begins the thought itself, its beginning is put before the recorded text, so that the
text alone says how it is to be read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

PAIRS: tuple[tuple[str, str], ...] = (
    ("<think>", "</think>"),  # DeepSeek-R1, Qwen3, GLM-4.5, Kimi-K2, MiniMax-M2, Nemotron
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<seed:think>", "</seed:think>"),
    ("◁think▷", "◁/think▷"),
    ("[THINK]", "[/THINK]"),  # Magistral
    ("<|START_THINKING|>", "<|END_THINKING|>"),  # Command A
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("<|channel>thought", "<channel|>"),  # Gemma 4
)
"""How thoughts begin and end."""
_FIRST = frozenset(begins[0] for begins, _ in PAIRS)
_CHANNEL, _MESSAGE, _FINAL = "<|channel|>", "<|message|>", "final"  # gpt-oss's harmony
_TURN = re.compile(r"<\|(?:end|start|return|call)\|>(?:assistant)?")
# What some formats put around the answer itself.
_AROUND = re.compile(
    r"^(?:<answer>|<\|START_RESPONSE\|>|<\|begin_of_solution\|>)\s*"
    r"|\s*(?:</answer>|<\|END_RESPONSE\|>|<\|end_of_solution\|>)$"
)
MARKS: tuple[str, ...] = (
    *(mark for pair in PAIRS for mark in pair),
    _CHANNEL,
    _MESSAGE,
    "<|end|>",
    "<|start|>",
)
"""Marks that a decoded text has to keep, although a tokenizer may call them special."""


def final(text: str) -> str | None:
    """Return the answer that follows the thoughts, all of the text where it has none; None: it ended inside one."""
    rest = text.strip()
    if rest[:1] not in _FIRST:
        return rest
    if rest.startswith(_CHANNEL):
        return _final_channel(rest)
    while (opened := _opened(rest)) is not None:
        _, closed, rest = rest.partition(opened[1])
        if not closed:
            return None
        rest = rest.strip()
    return _AROUND.sub("", rest).strip() if len(rest) < len(text.strip()) else rest


def thinks(text: str) -> bool:
    """Tell whether a text begins with a thought."""
    begun = text.strip()
    return begun.startswith(_CHANNEL) or _opened(begun) is not None


def _opened(text: str) -> tuple[str, str] | None:
    return next((pair for pair in PAIRS if text.startswith(pair[0])), None)


def _final_channel(text: str) -> str | None:
    """Return what is said in harmony's channel `final`; other channels are thoughts."""
    parts = []
    for part in text.split(_CHANNEL)[1:]:
        name, said, content = part.partition(_MESSAGE)
        if said and name.split()[:1] == [_FINAL]:
            parts.append(_TURN.sub("", content).strip())
    return "\n".join(parts) if parts else None


def opened_by(prompt: str) -> str:
    """Return the beginning of the thought that a rendered prompt ends in, and that an answer goes on in; else ""."""
    tail = prompt.rstrip()
    return next((begins for begins, _ in PAIRS if tail.endswith(begins)), "")


def closed_by(prompt: str) -> str:
    """Return the end of the thought that a rendered prompt has closed, so that the model is not to think; else ""."""
    tail = prompt.rstrip()
    return next((ends for _, ends in PAIRS if tail.endswith(ends)), "")


def kept_marks(special_tokens: Iterable[str]) -> list[str]:
    """Return the marks of thoughts among a tokenizer's special tokens, which a decoded text must not lose."""
    return sorted(set(special_tokens) & set(MARKS))
