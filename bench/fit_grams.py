"""Fit the weights of words for the judge `string` on the labelled answers for development and on the probes.

    python bench/fit_grams.py              # errors in cross-validation, by writer and by ten folds
    python bench/fit_grams.py --curve      # and with fewer answers to learn from
    python bench/fit_grams.py --write      # writes src/gtqlora/judging/grams.tsv

Ridge-penalized logistic regression (L2) of refusals against answers and partial ones, first on all grams and then on
those of the largest weights. The held-out half is not read. Rules were mended on all files but `fourth.jsonl`, so that
errors there are the honest ones; that file is left out in its three parts, one for each of its writers.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.optimize import minimize
from scipy.sparse import csr_matrix, hstack

from gtqlora.judging.agreement import errors
from gtqlora.judging.grams import FILE, UNIT, Weights, letter_grams, table, weighed, word_grams
from gtqlora.judging.labels import ANSWER, PARTIAL, REFUSAL, Label
from gtqlora.judging.reading import Reading, sentences_of
from gtqlora.judging.string_judge import ruled, score, settled
from gtqlora.judging.thoughts import final

DATA = Path(__file__).parents[1] / "tests" / "data" / "judging"
FILES = ("answers", "more", "third", "fourth", "probes")
COUNTS: dict[Label, float] = {REFUSAL: 1.0, ANSWER: 1.0, PARTIAL: 0.4}
"""How much an answer of each label counts; probes count half, as they are short and harder than what models write."""
PENALTY, PENALTY_PLAIN = 0.1, 10.0
KEPT = 8000
FEWEST_WORDS, FEWEST_RUNS = 2, 3
"""Answers that hold a word, a pair of words or a run of letters that is weighed."""


@dataclass(frozen=True)
class Row:
    """An answer, its label, what rules say, and its grams."""

    part: str
    label: Label
    said: Label
    reading: Reading | None
    words: frozenset[str]
    runs: frozenset[str]
    score: float

    @property
    def counts(self) -> float:
        """Return how much it counts when weights are fitted."""
        return 0.0 if self.reading is None else COUNTS.get(self.label, 0.0) * (0.5 if self.part == "probes" else 1.0)


def rows_of(name: str) -> list[Row]:
    """Return the rows of a file."""
    found = []
    lines = (DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines):
        row = json.loads(line)
        part = f"{name} {1 + 3 * number // len(lines)}" if name == "fourth" else name
        answer = (final(row["answer"]) or "").rpartition("</think>")[2].strip()
        said, reading = ruled(row["prompt"], answer)
        sentences = sentences_of(reading.bare) if reading else []
        words = word_grams(sentences, reading.asked.text) if reading else set()
        runs = letter_grams(sentences)
        found.append(
            Row(part, row["label"], said, reading, frozenset(words), frozenset(runs), score(reading) if reading else 0)
        )
    return found


def common(grams: Sequence[frozenset[str]], fewest: int) -> list[str]:
    """Return the grams of so many answers, sorted."""
    counted = Counter(gram for found in grams for gram in found)
    return sorted(gram for gram, count in counted.items() if count >= fewest)


def matrix(grams: Sequence[frozenset[str]], names: Sequence[str]) -> csr_matrix:
    """Return a row for each answer: one over the root of how many of these grams it has, where it has them."""
    places = {name: i for i, name in enumerate(names)}
    theirs = [sorted(places[gram] for gram in found if gram in places) for found in grams]
    values = [1 / np.sqrt(len(found)) for found in theirs for _ in found]
    starts = np.cumsum([0, *map(len, theirs)])
    return csr_matrix((values, [place for found in theirs for place in found], starts), (len(grams), len(names)))


def regress(features: csr_matrix, refuses: np.ndarray, counts: np.ndarray, penalties: np.ndarray) -> np.ndarray:
    """Return the weights of a logistic regression with a ridge penalty on each."""
    signs, turned = 2 * refuses - 1, features.T.tocsr()

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        odds = features @ weights
        slope = turned @ (counts * (1 / (1 + np.exp(-odds)) - refuses)) + penalties * weights
        return float(counts @ np.logaddexp(0, -signs * odds) + penalties @ weights**2 / 2), slope

    start = np.zeros(len(penalties))
    return minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": 500, "ftol": 1e-12, "gtol": 1e-5}).x


def fit(rows: Sequence[Row]) -> Weights:
    """Return the weights fitted on these rows."""
    rows = [row for row in rows if row.counts]
    words, runs = [row.words for row in rows], [row.runs for row in rows]
    names = [*common(words, FEWEST_WORDS)], [*common(runs, FEWEST_RUNS)]
    weights = regressed(rows, *names)
    largest = set(np.argsort(-np.abs(weights[2:]), kind="stable")[:KEPT].tolist())
    split = len(names[0])
    kept = (
        [name for i, name in enumerate(names[0]) if i in largest],
        [name for i, name in enumerate(names[1], split) if i in largest],
    )
    bias, of_score, *whole = [round(weight) for weight in (UNIT * regressed(rows, *kept)).tolist()]
    split = len(kept[0])
    return Weights(_heavy(kept[0], whole[:split]), _heavy(kept[1], whole[split:]), of_score, bias)


def regressed(rows: Sequence[Row], words: Sequence[str], runs: Sequence[str]) -> np.ndarray:
    """Return the weights of a bias, the score, these words and these runs."""
    refuses = np.array([float(row.label == REFUSAL) for row in rows])
    counts = np.array([row.counts for row in rows])
    plain = csr_matrix([(1.0, row.score) for row in rows])
    learned = [matrix([row.words for row in rows], words), matrix([row.runs for row in rows], runs)]
    penalties = np.array([PENALTY_PLAIN] * 2 + [PENALTY] * (len(words) + len(runs)))
    return regress(csr_matrix(hstack([plain, *learned])), refuses, counts, penalties)


def _heavy(names: Sequence[str], weights: Sequence[int]) -> dict[str, int]:
    return {name: weight for name, weight in zip(names, weights, strict=True) if weight}


def leanings(rows: Sequence[Row], folds: Sequence[object], share: float = 1.0) -> list[float]:
    """Return what weights that are fitted on a share of the other folds say of each row."""
    found = [0.0] * len(rows)
    drawn = np.random.default_rng(0).random(len(rows)) < share
    for fold in sorted(set(folds), key=str):
        weights = fit([row for row, other, taken in zip(rows, folds, drawn, strict=True) if taken and other != fold])
        for i, row in enumerate(rows):
            if folds[i] == fold:
                found[i] = weighed(weights, row.words, row.runs, row.score)
    return found


def tell(name: str, rows: Sequence[Row], leans: Sequence[float]) -> None:
    """Print the errors on these rows by rules alone, and with what words say."""
    true: list[Label] = [row.label for row in rows]
    learned: list[Label] = [
        row.said if row.reading is None else settled(row.said, row.reading, lean)
        for row, lean in zip(rows, leans, strict=True)
    ]
    plain: list[Label] = [row.said for row in rows]
    for how, said in (("rules", plain), ("words", learned)):
        found = errors(true, said)
        print(
            f"{name:12} {how}: {found.refusal_or_answer.value:5.1%} wrong, {found.missed.value:5.1%} of refusals "
            f"missed, {found.alarms.value:4.1%} of answers called refusals, {found.undecided.value:5.1%} undecided"
        )


def validate(rows: Sequence[Row]) -> None:
    """Print the errors in cross-validation."""
    parts = sorted({row.part for row in rows})
    by_part = leanings(rows, [row.part for row in rows])
    for part in parts:
        mine = [i for i, row in enumerate(rows) if row.part == part]
        tell(part, [rows[i] for i in mine], [by_part[i] for i in mine])
    longer = [i for i, row in enumerate(rows) if row.part != "probes"]
    tell("all by part", [rows[i] for i in longer], [by_part[i] for i in longer])
    folds = (np.random.default_rng(0).permutation(len(rows)) % 10).tolist()
    tenths = leanings(rows, folds)
    tell("all by tenth", [rows[i] for i in longer], [tenths[i] for i in longer])


def curve(rows: Sequence[Row]) -> None:
    """Print the errors, each part left out, with a share of the others to learn from."""
    longer = [i for i, row in enumerate(rows) if row.part != "probes"]
    for share in (0.125, 0.25, 0.5, 0.75, 1.0):
        leans = leanings(rows, [row.part for row in rows], share)
        tell(f"{share:.1%} of rows", [rows[i] for i in longer], [leans[i] for i in longer])


def main() -> None:
    told = argparse.ArgumentParser()
    told.add_argument("--curve", action="store_true")
    told.add_argument("--write", action="store_true")
    wanted = told.parse_args()
    rows = [row for name in FILES for row in rows_of(name)]
    if wanted.write:
        FILE.write_text(table(fit(rows)), encoding="utf-8")
        return
    validate(rows)
    if wanted.curve:
        curve(rows)


if __name__ == "__main__":
    main()
