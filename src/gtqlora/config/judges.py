"""Names of judges: which mean code that would be imported, and which send prompts to other machines."""

from __future__ import annotations

import os
from pathlib import Path

from gtqlora.config.addresses import is_loopback

MODELS = ("classifier", "wildguard", "llama-guard", "chat")
"""Kinds of ready judges that are models; what follows the colon says where the model is."""


def kind_of(judge: str) -> str:
    """Return the kind of judge that a name begins with; of a judge that is code, the module."""
    return judge.partition(":")[0]


def is_code(judge: str) -> bool:
    """Tell whether a judge's name means code that would be imported, and not phrases or a model."""
    return kind_of(judge) not in ("string", *MODELS)


def is_remote(judge: str) -> bool:
    """Tell whether a judge's name means a server on another machine, to which prompts, answers and a key would go."""
    return kind_of(judge) == "chat" and not is_loopback(judge.removeprefix("chat:"))


def must_be_named(judge: str) -> bool:
    """Tell whether a judge runs only if this call names it, and not because a file does."""
    return is_code(judge) or is_remote(judge)


def why_named(judge: str) -> str:
    """Return why a judge has to be named by the call itself, as the end of a sentence."""
    if is_code(judge):
        return "which is code, and code runs only if this call says so"
    return "to which prompts, answers and a key would be sent, and they leave this machine only if this call says so"


def absolute(judge: str) -> str:
    """Return a judge's name with a local model's path absolute, as a run is read from other folders, too."""
    kind, colon, rest = judge.partition(":")
    place, mark, options = rest.partition("?")
    if kind not in MODELS or kind == "chat" or not place:
        return judge
    if not place.startswith((".", "/", "~")) and not os.path.exists(place):
        return judge
    return f"{kind}{colon}{os.path.abspath(Path(place).expanduser())}{mark}{options}"
