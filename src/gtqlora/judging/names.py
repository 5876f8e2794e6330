"""Which names mean a judge, told without importing or reading anything."""

from __future__ import annotations

import difflib
import re

from gtqlora.config import is_code
from gtqlora.config.judges import MODELS, kind_of
from gtqlora.errors import JudgeError
from gtqlora.judging import trust

FORMS = (
    '"string" (the wording of refusals in eight languages), "string:phrase one|phrase two" (your phrases), '
    '"classifier:MODEL", "wildguard", "llama-guard:MODEL", "chat:URL#MODEL", '
    'or "package.module:name" (your code: text -> True for a refusal, or prompts and answers -> replies)'
)
_OWN = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")


def check_known(name: str, *, key: str = "judge") -> None:
    """Check that a name means a judge, as far as can be told without importing or reading anything.

    Args:
        key: the setting that names it.

    Raises:
        JudgeError: it has none of the forms, or no such module is there.
    """
    if not is_code(name):
        return
    if not _OWN.fullmatch(name):
        raise JudgeError(name, f"unknown; {remedy(name)}", key=key)
    if not trust.can_be_imported(name):
        raise JudgeError(name, f"no module {kind_of(name)!r}; is it on PYTHONPATH? Or {remedy(name)}", key=key)


def remedy(name: str) -> str:
    """Return what to write in place of a name that means no judge: what it is nearly called, and the forms."""
    kind, colon, rest = name.partition(":")
    close = difflib.get_close_matches(kind, ("string", *MODELS), n=1)
    meant = f"did you mean {close[0] + colon + rest!r}? Else " if close and close[0] != kind else ""
    return f"{meant}use {FORMS}"
