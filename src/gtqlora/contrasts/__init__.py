"""Contrast sets: preference rows of three kinds (benign, lookalike, harmful) and an optional one
(instructed), checked once, where they enter.

`sources` reads files, dataset folders and the hub; `loading` is the only way in, and checks every row, also by the
rule in `one_way`; `rows` says what a row is; `template` turns messages into what the model reads; `statistics` counts
rows and tokens.
"""

from gtqlora.contrasts.loading import check_disjoint, check_kinds, load, save
from gtqlora.contrasts.rows import (
    ALL_KINDS,
    DECLINED_KINDS,
    FILE,
    KINDS,
    SPLITS,
    TOPICS,
    Asked,
    Contrast,
    PreferenceIds,
    Row,
    distinct,
    encode_preference,
    encode_row,
    groupings,
    is_correct,
    kinds_of,
    prompt_key,
)
from gtqlora.contrasts.template import encode_prompt
from gtqlora.judging.judge import Messages

__all__ = [
    "ALL_KINDS",
    "DECLINED_KINDS",
    "FILE",
    "KINDS",
    "SPLITS",
    "TOPICS",
    "Asked",
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
    "is_correct",
    "kinds_of",
    "load",
    "prompt_key",
    "save",
]
