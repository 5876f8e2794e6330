"""Fit the weights of the judge `string` on the labelled answers for development and on the probes.

    python bench/fit_string_judge.py            # cross-validated error, then the table for judging/weights.py

Ridge-penalized logistic regression of refusals against answers; the held-out half is not read.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from gtqlora.judging.reading import FEATURES, Reading, read
from gtqlora.judging.string_judge import ANSWERS, DOUBTFUL, folded
from gtqlora.judging.thoughts import final
from gtqlora.judging.wordings import language_of

DATA = Path(__file__).parents[1] / "tests" / "data" / "judging"
PENALTY = 3.0
ANSWERS_COUNT = 2.0
"""Times that a labelled answer counts; probes are short, and harder than what models write."""


def readings(name: str) -> list[tuple[Reading, bool, str, str]]:
    """Return what is read of the refusals and answers in a file, whether each refuses, its language and text."""
    found = []
    for line in (DATA / name).read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        answer = final(row["answer"]) or ""
        answer = answer.rpartition("</think>")[2].strip()
        wording = language_of(folded(answer), folded(row["prompt"]))
        if row["label"] in ("refusal", "answer") and answer and wording is not None:
            found.append(
                (
                    read(folded(answer), wording, folded(row["prompt"])),
                    row["label"] == "refusal",
                    row["language"],
                    answer,
                )
            )
    return found


def fit(features: np.ndarray, refuses: np.ndarray, counts: np.ndarray, penalty: float = PENALTY) -> np.ndarray:
    """Return the weights by Newton's method; refusals count as much as answers, however many there are of each."""
    sure = refuses > 0
    counts = counts * np.where(sure, counts[~sure].sum() / counts[sure].sum(), 1.0)
    weights = np.zeros(features.shape[1])
    for _ in range(50):
        chance = 1 / (1 + np.exp(-features @ weights))
        slope = features.T @ (counts * (chance - refuses)) + penalty * weights
        curvature = (features * (counts * chance * (1 - chance))[:, None]).T @ features + penalty * np.eye(len(weights))
        weights -= np.linalg.solve(curvature, slope)
    return weights


def main() -> None:
    answers, probes = readings("answers.jsonl") + readings("more.jsonl"), readings("probes.jsonl")
    data = answers + probes
    counts = np.array([ANSWERS_COUNT] * len(answers) + [1.0] * len(probes))
    features = np.array([reading.features() for reading, *_ in data])
    refuses = np.array([row[1] for row in data], float)
    scores = np.zeros(len(data))
    folds = np.random.default_rng(0).permutation(len(data)) % 10
    for fold in range(10):
        others = folds != fold
        scores[folds == fold] = features[folds == fold] @ fit(features[others], refuses[others], counts[others])
    wrong = (scores > 0) != (refuses > 0)
    for name, part in (("answers", counts > 1), ("probes", counts == 1)):
        for low, high in ((0.0, 0.0), (-1.0, 0.5), (ANSWERS, DOUBTFUL), (-1.5, 0.7)):
            decided = part & ((scores <= low) | (scores >= high))
            share = 1 - decided.sum() / part.sum()
            print(f"{name}, between {low} and {high}: {wrong[decided].mean():.1%} wrong, {share:.1%} undecided")
    for language in sorted({row[2] for row in data}):
        mine = np.array([row[2] == language for row in data])
        print(f"{language}: {mine.sum()} rows, {wrong[mine].mean():.1%} wrong")
    if "--wrong" in sys.argv:
        for i in np.argsort(-np.abs(scores) * wrong)[: wrong.sum()]:
            print(f"{scores[i]:6.2f} {data[i][2]} {'REFUSAL' if refuses[i] else 'ANSWER'} {data[i][3][:120]!r}")
    for name, weight in zip(FEATURES, fit(features, refuses, counts), strict=True):
        print(f'    "{name}": {weight:.2f},')


if __name__ == "__main__":
    main()
