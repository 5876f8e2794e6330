"""Completes prompts under a change, a token at a time: the one way in which the package generates text itself.

On a CPU a batch of prompts is decoded with a cache that grows (`growing`). On a GPU the rows of a cache of fixed shape
are kept busy and each step is one captured graph (`engine`).
"""

from gtqlora.decoding.change import AS_IS, Change, Changes, SourceRun, Switch, Tokens, changed, source_ids
from gtqlora.decoding.completing import Decoded, decode, decode_by_row, goes_by_row

__all__ = [
    "AS_IS",
    "Change",
    "Changes",
    "Decoded",
    "SourceRun",
    "Switch",
    "Tokens",
    "changed",
    "decode",
    "decode_by_row",
    "goes_by_row",
    "source_ids",
]
