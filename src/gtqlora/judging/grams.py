"""What the words of an answer say of whether it refuses: learned from labelled answers, where rules know no words.

Words and pairs of words, runs of four letters, and the score of what is counted (`weights`) each have a weight
(`grams.tsv`), fitted by `bench/fit_grams.py`. Words that are in the prompt are one word here, since what it is about
says nothing of whether it is answered.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

LETTERS = 4
"""Letters of a run."""
UNIT = 100
"""Weights in the file are whole numbers of this part of one."""
FILE = Path(__file__).with_name("grams.tsv")
WORDS, RUNS, SCORE, BIAS = "words", "runs", "score", "bias"
_WORD = re.compile("[a-z]+(?:'[a-z]+)?|[0-9]+|[?!:;\u2318]|[\u3040-\u9fff]")
_FEWEST_LETTERS = 3
_NUMBER, _ASKED, _BEGINS, _ENDS = "#", "@", "^", "$"


class Weights(NamedTuple):
    """What each word, pair of words and run of letters adds, above zero for a refusal."""

    words: Mapping[str, int]
    runs: Mapping[str, int]
    score: int
    bias: int


def word_grams(sentences: Iterable[str], asked: str) -> set[str]:
    """Return the words and pairs of words in folded sentences; numbers, and words of the prompt, are one word each."""
    theirs = {word for word in _WORD.findall(asked) if len(word) > _FEWEST_LETTERS}
    found: set[str] = set()
    for sentence in sentences:
        words = [_ASKED if w in theirs else _NUMBER if w[0].isdigit() else w for w in _WORD.findall(sentence)]
        found.update(words)
        found.update([f"{one} {other}" for one, other in pairwise((_BEGINS, *words, _ENDS))])
    return found


def letter_grams(sentences: Iterable[str]) -> set[str]:
    """Return the runs of letters in folded sentences, with a space before and after each."""
    found: set[str] = set()
    for sentence in sentences:
        said = f" {sentence} "
        found.update([said[i : i + LETTERS] for i in range(len(said) - LETTERS + 1)])
    return found


def leaning(sentences: Iterable[str], asked: str, score: float) -> float:
    """Return the log odds that an answer of these sentences, with this score of what is counted, refuses."""
    said = list(sentences)
    return weighed(known(), word_grams(said, asked), letter_grams(said), score)


def weighed(weights: Weights, words: Collection[str], runs: Collection[str], score: float) -> float:
    """Return the log odds by these weights of these grams and this score."""
    learned = _mean(weights.words, words) + _mean(weights.runs, runs)
    return (learned + weights.score * score + weights.bias) / UNIT


def _mean(weights: Mapping[str, int], found: Collection[str]) -> float:
    """Return the sum over the root of how many are known, so that long answers weigh little more than short ones."""
    theirs = [weights[gram] for gram in found if gram in weights]
    return sum(theirs) / math.sqrt(len(theirs)) if theirs else 0.0


@cache
def known() -> Weights:
    """Return the weights of the file: in each line of what, the weight, and all that have it."""
    read: dict[str, dict[str, int]] = {WORDS: {}, RUNS: {}, SCORE: {}, BIAS: {}}
    for line in FILE.read_text(encoding="utf-8").splitlines():
        kind, weight, *grams = line.split("\t")
        read[kind].update(dict.fromkeys(grams, int(weight)))
    return Weights(read[WORDS], read[RUNS], read[SCORE][""], read[BIAS][""])


def table(weights: Weights) -> str:
    """Return the text of the file that `known` reads."""
    lines = []
    for kind, grams in (
        (BIAS, {"": weights.bias}),
        (SCORE, {"": weights.score}),
        (WORDS, weights.words),
        (RUNS, weights.runs),
    ):
        by_weight: dict[int, list[str]] = {}
        for gram in sorted(grams):
            by_weight.setdefault(grams[gram], []).append(gram)
        lines += ["\t".join((kind, str(weight), *by_weight[weight])) for weight in sorted(by_weight)]
    return "\n".join(lines) + "\n"
