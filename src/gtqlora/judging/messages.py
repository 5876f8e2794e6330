"""Prompts as judges see them: a conversation up to where the assistant answers."""

from __future__ import annotations

from collections.abc import Sequence

Message = dict[str, str]
"""A message of a conversation: its `role` and its `content`."""
Messages = tuple[Message, ...]
"""A prompt: messages up to where the assistant answers."""


def as_text(prompt: Sequence[Message]) -> str:
    """Return a prompt as one text: what the user asks, with the roles named where others spoke before."""
    if len(prompt) == 1:
        return prompt[0]["content"]
    return "\n\n".join(f"{message['role'].capitalize()}: {message['content']}" for message in prompt)
