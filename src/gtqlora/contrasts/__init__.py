"""Contrast sets: preference rows in three kinds, checked once where they enter."""

from gtqlora.contrasts.rows import (
    FILE,
    KINDS,
    SPLITS,
    TOPICS,
    Contrast,
    PreferenceIds,
    Row,
    check_disjoint,
    check_kinds,
    distinct,
    encode_preference,
    encode_row,
    groupings,
    load,
    prompt_key,
    save,
)
from gtqlora.contrasts.sources import Messages
from gtqlora.contrasts.template import encode_prompt

__all__ = [
    "FILE",
    "KINDS",
    "SPLITS",
    "TOPICS",
    "Contrast",
    "Messages",
    "PreferenceIds",
    "Row",
    "check_disjoint",
    "check_kinds",
    "distinct",
    "encode_preference",
    "encode_prompt",
    "encode_row",
    "groupings",
    "load",
    "prompt_key",
    "save",
]
