"""Values of settings: what a TOML file, a `key=value` text or a caller gives, as the type that the setting has."""

from __future__ import annotations

import json
import math
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal, cast, get_args, get_origin

from gtqlora.errors import ConfigError

Scalar = bool | int | float | str
"""A value that a table of a user's own keys holds."""


_OPTIONS = {"target": "--for", "served": "--served", "served_before": "--before", "served_after": "--after"}
"""Options of the command line, of settings that are not otherwise known to whoever types them."""


def as_typed(setting: str) -> str:
    """Return what a message calls a setting: its option first, where that has another name."""
    option = _OPTIONS.get(setting, setting)
    return option if option in (setting, f"--{setting}") else f"{option} ({setting})"


def require(condition: bool, message: str) -> None:
    """Raise ConfigError with the message unless the condition holds."""
    if not condition:
        raise ConfigError(message)


def _bool(value: object) -> bool:
    return {"true": True, "false": False}[str(value).lower()]


def _int(value: object) -> int:
    # `true` is no number of steps, although Python takes it for 1; and 2.5 must not become 2.
    if isinstance(value, bool) or (isinstance(value, float) and not value.is_integer()):
        raise ValueError
    # A guess for type checkers: `int` raises TypeError where it is wrong, which `coerce` turns into a message.
    return int(cast(str | float, value))


def _float(value: object) -> float:
    number = float(cast(str | float, value))
    if isinstance(value, bool) or not math.isfinite(number):
        raise ValueError
    return number


def _str(value: object) -> str:
    if not isinstance(value, str | Path) or "\0" in str(value):
        raise TypeError
    return str(value)


_READERS: dict[object, tuple[Callable[[object], object], str]] = {
    bool: (_bool, "true or false"),
    int: (_int, "a whole number"),
    float: (_float, "a finite number"),
    str: (_str, "a text without NUL characters"),
}


def _scalar(value: object, key: str) -> Scalar:
    require(
        isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value)),
        f"{key} = {value!r}: must be true or false, a number or a text",
    )
    return cast(Scalar, value)


def _table(value: object, key: str) -> dict[str, Scalar]:
    require(isinstance(value, Mapping), f"{key} = {value!r}: must be a table of names and values")
    return {str(name): _scalar(entry, f"{key}.{name}") for name, entry in cast(Mapping[object, object], value).items()}


def scalar(text: str) -> Scalar:
    """Return what a text on the command line says: true, false or a number, else the text itself."""
    try:
        # `False` as Python writes it is meant, too: as a text it would be true to a template.
        found = json.loads(text.lower() if text.lower() in ("true", "false") else text)
    except (ValueError, RecursionError):
        return text
    return found if isinstance(found, bool | int | float | str) else text


# What `apply_chat_template` gives a template by itself, or takes for itself.
_NOT_VARIABLES = frozenset(
    {"messages", "conversation", "conversations", "tools", "documents", "add_generation_prompt", "chat_template"}
    | {"continue_final_message", "tokenize", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs"}
    | {"padding", "truncation", "max_length"}
)


def is_variable(name: str) -> bool:
    """Return whether a variable of a chat template is a setting, and neither the prompt nor a special token."""
    return name not in _NOT_VARIABLES and not name.endswith(("_token", "_tokens"))


def check_variables(template: Mapping[str, Scalar]) -> None:
    """Check that these are variables of a chat template, and nothing that it is given in any case.

    Raises:
        ConfigError: the message names the first that is none.
    """
    # Here and not only where the tokenizer is: a recipe must be refused before a model is looked for.
    for name in template:
        require(
            name.isidentifier(), f"template.{name}: a variable of a chat template is one word, such as a Python name"
        )
        require(
            is_variable(name),
            f"template.{name}: the prompt and the special tokens are not settings; leave it out",
        )


def coerce(value: object, hint: object, key: str) -> object:
    """Return a TOML value, an override's text or a caller's value as the type of a field.

    Args:
        hint: the field's annotation: one of `bool`, `int`, `float` and `str`, a `Literal`, or one of these or None; or
            a `dict` of names and such values.
        key: what the message calls it.

    Raises:
        ConfigError: it cannot be read as that, or is none of the literal's values.
    """
    origin, args = get_origin(hint), get_args(hint)
    if origin is dict:
        return _table(value, key)
    if origin is Literal:
        require(value in args, f"{key} = {value!r}: must be one of {', '.join(map(str, args))}")
        return value
    if origin in (types.UnionType, typing.Union):
        optional = next(a for a in args if a is not type(None))
        return None if value is None or value == "none" else coerce(value, optional, key)
    read, wanted = _READERS[hint]
    try:
        return read(value)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ConfigError(f"{key} = {value!r}: must be {wanted}") from error
