"""GGUF files as llama.cpp itself runs them: what they say, how likely they find an answer, which tokens they read.

`llama_server` has llama.cpp in a process of its own, which runs `llama_worker`.

Shape letters: T tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import takewhile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from transformers import GenerationConfig, PreTrainedTokenizerBase

from gtqlora.config.values import Scalar
from gtqlora.contrasts import Row, encode_prompt
from gtqlora.contrasts.template import answer_length, completions, encode_answers, rendered, tokens
from gtqlora.exports.job import Job, Said, ready_rows
from gtqlora.exports.llama_server import Reply, Request, Scale, Server, serving
from gtqlora.families import load_config, load_tokenizer
from gtqlora.families.files import GENERATION, has, small_files
from gtqlora.results.verdict import Outcome

_EVERY = 2**24
"""More log-probabilities than any vocabulary has: llama.cpp gives as many as there are."""


def logprobs(
    model: Path, token_lists: Sequence[Sequence[int]], adapter: Path | None = None
) -> list[NDArray[np.float64]]:
    """Return log-probabilities_TV of the next token after every token of each list, in nats.

    Raises:
        RunError: as `serving`.
    """
    adapters = [] if adapter is None else [adapter]
    with serving(model, adapters=adapters, context=max(map(len, token_lists)) + 1) as server:
        return distributions(server, token_lists)


def distributions(
    server: Server, token_lists: Sequence[Sequence[int]], scales: Sequence[float] = ()
) -> list[NDArray[np.float64]]:
    """Return log-probabilities_TV as `logprobs`, with these scales of the server's adapters."""
    lora: list[Scale] = [{"id": number, "scale": scale} for number, scale in enumerate(scales)]
    prefixes = [list(ids[:end]) for ids in token_lists for end in range(1, len(ids) + 1)]
    asked: list[Request] = [{"prompt": ids, "n_predict": 1, "n_probs": _EVERY} for ids in prefixes]
    replies = iter(server.complete([{**request, "lora": lora} for request in asked] if lora else asked))
    return [np.stack([_row(next(replies)) for _ in ids]) for ids in token_lists]


def _row(reply: Reply) -> NDArray[np.float64]:
    found = reply["completion_probabilities"][0]["top_logprobs"]
    row_V = np.full(len(found), np.nan)
    for candidate in found:
        row_V[candidate["id"]] = _number(candidate["logprob"])
    return row_V


def _number(found: float | None) -> float:
    # JSON has no infinities and no NaN; llama.cpp writes null for them.
    return math.nan if found is None else found


# --- the form --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LlamaCpp:
    """The form of GGUF files: a base, and the edit of it as another file or as an adapter.

    Attributes:
        model: what the files were made from: its tokenizer reads the prompts, and its stops end the answers.
        max_new_tokens: of an answer, at most.
        base, edited: GGUF files, each the first one where it is split.
        adapter: loaded on `base` instead of another file.
        label: what the files are called in messages, e.g. "GGUF (Q4_K)".
        template: variables of the model's chat template.
    """

    model: str
    max_new_tokens: int
    base: Path
    edited: Path | None = None
    adapter: Path | None = None
    label: str = "GGUF"
    template: Mapping[str, Scalar] = field(default_factory=dict[str, Scalar])

    @staticmethod
    def of(
        job: Job, base: Path, *, edited: Path | None = None, adapter: Path | None = None, label: str = "GGUF"
    ) -> LlamaCpp:
        """Return the form of a certified edit, with answers as long as those that were certified."""
        config = job.certificate.config
        return LlamaCpp(job.model, config.max_new_tokens, base, edited, adapter, label, config.template)

    @property
    def name(self) -> str:
        """Return what it is called in messages."""
        return f"{self.label} in llama.cpp"

    @cached_property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.model, self.template)

    @cached_property
    def _stops(self) -> set[int]:
        return _stop_ids(self.model, self._tokenizer)

    def said(self, rows: Sequence[Row | Outcome], *, edited: bool) -> list[Said]:
        """Return what the base, or the edit, says to these rows' prompts, greedily, from the run's own token ids.

        Raises:
            RunError: llama.cpp does not load a file, dies, or has too short a context.
        """
        asked: list[Request] = [
            {"prompt": encode_prompt(self._tokenizer, row.prompt), "n_predict": self.max_new_tokens} for row in rows
        ]
        harmful = ready_rows(rows)
        forced = [self._forced(rows[i]) for i in harmful]
        context = max(len(request["prompt"]) + request["n_predict"] for request in [*asked, *forced]) + 1
        model, adapters = self._files(edited)
        with serving(model, adapters=adapters, context=context) as server:
            when = "after" if edited else "before"
            answers = server.complete(asked, f"{when}, in llama.cpp")
            ready = map(_total, server.complete(forced, f"readiness to answer {when}, in llama.cpp"))
        found = dict(zip(harmful, ready, strict=True))
        replies = zip(asked, answers, strict=True)
        return [self._said(request["prompt"], reply, found.get(i)) for i, (request, reply) in enumerate(replies)]

    def notes(self, rows: Sequence[Row | Outcome]) -> list[str]:
        """Return a sentence on the tokenizer of the GGUF where it reads these rows' prompts unlike the model's own.

        Raises:
            RunError: llama.cpp does not load the base.
        """
        share = self.tokenizer_agreement(rows)
        if share == 1:
            return []
        return [
            f"The GGUF's own tokenizer reads {share:.1%} of the held-out prompts as the model's does; the floor was "
            "judged on the model's tokens, so what users type may be answered otherwise."
        ]

    def tokenizer_agreement(self, rows: Sequence[Row | Outcome], limit: int = 500) -> float:
        """Return the share of these prompts, of the first `limit`, that the GGUF's tokenizer reads as ours does."""
        texts = [rendered(self._tokenizer, row.prompt, generation=True) for row in rows[:limit]]
        with serving(self.base, context=1) as server:
            found = server.tokenize(texts)
        same = [tokens(self._tokenizer, text) == ids for text, ids in zip(texts, found, strict=True)]
        return sum(same) / len(same)

    def _files(self, edited: bool) -> tuple[Path, list[Path]]:
        if not edited:
            return self.base, []
        return (self.base if self.edited is None else self.edited), [] if self.adapter is None else [self.adapter]

    def _forced(self, row: Row | Outcome) -> Request:
        """Return the request that makes llama.cpp say the row's `rejected`, and tell how likely it was."""
        prompt, (ids,) = encode_answers(self._tokenizer, row.prompt, row.rejected)
        # what the template puts behind the completion is no part of it
        said = ids[: len(self._tokenizer.encode(row.rejected, add_special_tokens=False))]
        grammar = "root ::= " + " ".join(f"<[{token}]>" for token in said)
        return {"prompt": prompt, "n_predict": len(said), "n_probs": 1, "grammar": grammar}

    def _said(self, prompt: Sequence[int], reply: Reply, rejected: float | None) -> Said:
        by_itself = reply["stop_type"] == "eos"
        written = reply["tokens"][:-1] if by_itself else reply["tokens"]
        ids = list(takewhile(lambda token: token not in self._stops, written))
        ended = by_itself or len(ids) < len(written)
        (text,) = completions(self._tokenizer, [prompt], [ids])
        return Said(
            text=text, tokens=answer_length(self._tokenizer, text, ids), ended=ended, rejected_log_prob=rejected
        )


def _total(reply: Reply) -> float:
    return sum(_number(token["logprob"]) for token in reply["completion_probabilities"])


def _stop_ids(model: str, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the token ids that end a completion, as a loaded model has them, see `capture.Subject.stop_ids`."""
    folder = small_files(model)
    if has(folder, GENERATION):
        settings = GenerationConfig.from_pretrained(folder)
    else:
        settings = GenerationConfig.from_model_config(load_config(model)[1])
    ends = settings.eos_token_id
    every: list[object] = [*([ends] if ends is None or isinstance(ends, int) else ends), tokenizer.eos_token_id]
    return {end for end in every if isinstance(end, int)}
