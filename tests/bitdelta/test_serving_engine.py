"""The engine: requests join and leave a running batch, and each is answered as if it were alone."""

from __future__ import annotations

import copy
import queue
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from gtqlora.bitdelta.engine import BusyError, Engine, Piece, Request
from gtqlora.bitdelta.resident import Resident, install
from gtqlora.bitdelta.sampling import Sampling, Text, pick
from gtqlora.bitdelta.voices import voice_of
from gtqlora.capture import open_subject
from tests import models
from tests.bitdelta.test_serving_layers import bits_variant, lora_variant, merged
from tests.helpers import Toy

LENGTHS = (9, 3, 17, 5, 12, 7)


@dataclass
class Served:
    """An engine, and what its variants are as models of their own."""

    engine: Engine
    models: list[PreTrainedModel]

    def ask(self, prompt: list[int], variant: int, **settings: Any) -> queue.Queue[Piece]:
        pieces: queue.Queue[Piece] = queue.Queue()
        sampling = Sampling(**{"max_tokens": 8, **settings})
        self.engine.submit(Request(prompt=prompt, variant=variant, sampling=sampling, tell=pieces.put))
        return pieces

    def alone(self, prompt: list[int], variant: int, tokens: int = 8) -> str:
        settings: Any = {"max_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
        model: Any = self.models[variant]
        return self.text(model.generate(torch.tensor([prompt]), **settings)[0, len(prompt) :].tolist())

    def text(self, ids: list[int]) -> str:
        return str(self.engine.model.subject.tokenizer.decode(ids, skip_special_tokens=True))


def served(toy: Toy, family: str, *, places: int = 4, waiting: int = 64) -> Served:
    subject = open_subject(str(toy.model(family)))
    base = copy.deepcopy(subject.model)
    variants = [lora_variant(subject, "edit"), bits_variant(subject, "tuned")]
    every = [base, *(merged(base, variant) for variant in variants)]
    names, voices = ("base", "edit", "tuned"), (voice_of(subject),) * 3
    model = Resident(subject=subject, batch=install(subject, variants), names=names, voices=voices)
    return Served(Engine(model, places=places, waiting=waiting), every)


def whole(pieces: queue.Queue[Piece]) -> tuple[str, Piece]:
    """The text of an answer, and its last piece."""
    text = ""
    while True:
        piece = pieces.get(timeout=60)
        text += piece.text
        if piece.finish is not None:
            return text, piece


def prompts() -> list[list[int]]:
    every = models.some_tokens(shape=(len(LENGTHS), max(LENGTHS))).tolist()
    return [ids[:length] for ids, length in zip(every, LENGTHS, strict=True)]


@pytest.fixture(scope="module")
def running(toy: Toy) -> Iterator[Served]:
    found = served(toy, "qwen3_moe")
    yield found
    found.engine.close()


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3_next"])
def test_answers_are_those_of_the_variant_alone(toy: Toy, family: str) -> None:
    """More requests than places, of all lengths and variants, so that they join and leave while others run."""
    found = served(toy, family)
    try:
        asked = [(prompt, i % 3, 3 + 2 * i) for i, prompt in enumerate(prompts())]
        answers = [found.ask(prompt, variant, max_tokens=tokens) for prompt, variant, tokens in asked]
        for (prompt, variant, tokens), answer in zip(asked, answers, strict=True):
            text, last = whole(answer)
            assert text == found.alone(prompt, variant, tokens)
            assert last.tokens <= tokens and (last.finish == "length") == (last.tokens == tokens)
    finally:
        found.engine.close()


def test_a_seed_does_not_hang_on_other_requests(running: Served) -> None:
    settings = {"temperature": 1.5, "top_p": 0.9, "seed": 7}
    first, _ = whole(running.ask(prompts()[0], 2, **settings))
    others = [running.ask(prompt, 1, temperature=1.0) for prompt in prompts()[1:4]]
    again, _ = whole(running.ask(prompts()[0], 2, **settings))
    assert first == again
    assert len({whole(running.ask(prompts()[0], 2, temperature=1.5, seed=seed))[0] for seed in range(4)}) == 4
    assert all(whole(other)[1].finish for other in others)


def test_stop_texts_end_an_answer_and_are_no_part_of_it(running: Served) -> None:
    full = running.alone(prompts()[2], 0)
    stop = full.split()[3]
    text, last = whole(running.ask(prompts()[2], 0, stop=(stop,)))
    assert text == full[: full.index(stop)] and last.finish == "stop"


def test_a_cancelled_request_gives_its_place_back(toy: Toy) -> None:
    """While it runs, and while it waits."""
    found = served(toy, "qwen3_moe", places=1)
    try:
        pieces: queue.Queue[Piece] = queue.Queue()
        endless = [
            Request(prompt=prompts()[0], variant=0, sampling=Sampling(max_tokens=10**6), tell=pieces.put)
            for _ in range(2)
        ]
        for request in endless:
            found.engine.submit(request)
        assert pieces.get(timeout=60).finish is None and found.engine.running == 1
        for request in endless:
            request.cancel()
        assert whole(found.ask(prompts()[1], 1))[1].finish == "length"
        assert found.engine.waiting == 0 and all(piece.finish is None for piece in pieces.queue)
    finally:
        found.engine.close()


def test_waiting_is_bounded_and_what_is_left_ends_as_an_error(toy: Toy) -> None:
    found = served(toy, "qwen3_moe", places=1, waiting=2)
    answers = [found.ask(prompts()[0], 0, max_tokens=10**6)]
    assert answers[0].get(timeout=60).finish is None
    answers += [found.ask(prompts()[0], 0) for _ in range(2)]
    with pytest.raises(BusyError, match="2 requests wait already"):
        found.ask(prompts()[0], 0)
    found.engine.close()
    assert not found.engine.alive
    assert [whole(answer)[1].finish for answer in answers] == ["error"] * 3


def test_a_failing_step_ends_its_requests_only(running: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    model = running.engine.model.subject.model
    forward = model.forward

    def out_of_memory(**inputs: Any) -> Any:
        if inputs["input_ids"].shape[1] == LENGTHS[2]:
            raise RuntimeError("out of memory")
        return forward(**inputs)

    monkeypatch.setattr(model, "forward", out_of_memory)
    bad, good = running.ask(prompts()[2], 0), running.ask(prompts()[0], 0)
    assert whole(bad)[1].finish == "error"
    assert whole(good)[0] == running.alone(prompts()[0], 0)


# --- sampling


def test_top_p_keeps_the_most_likely() -> None:
    logits, draw = torch.tensor([0.0, 2.0, 1.0]).log_softmax(-1), torch.Generator().manual_seed(0)
    kept = Sampling(max_tokens=1, temperature=1.0, top_p=0.6)
    assert {pick(logits, kept, draw) for _ in range(50)} == {1}
    assert pick(logits, Sampling(max_tokens=1), draw) == 1
    every = [pick(logits, Sampling(max_tokens=1, temperature=1.0), draw) for _ in range(3000)]
    shares = torch.bincount(torch.tensor(every), minlength=3) / 3000
    assert (shares - logits.exp()).abs().max() < 0.04


class Bytes:
    """A tokenizer whose tokens are bytes."""

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return bytes(ids).decode(errors="replace")


@pytest.mark.parametrize("stop", [(), ("xyz",)])
def test_characters_of_several_tokens_are_sent_whole(stop: tuple[str, ...]) -> None:
    text, tokenizer = Text(Bytes(), stop), "naïve 🙂 text"  # type: ignore[arg-type]
    parts = [text.add(byte) for byte in tokenizer.encode()] + [text.end()]
    assert "".join(parts) == tokenizer and "\N{REPLACEMENT CHARACTER}" not in "".join(parts)
    assert parts.count("") > 3


def test_the_beginning_of_a_stop_text_waits() -> None:
    text = Text(Bytes(), ("<end>", "</"))  # type: ignore[arg-type]
    sent = [text.add(byte) for byte in b"a<e b<end>"]
    assert sent[:4] == ["a", "", "", "<e "] and "".join(sent) == "a<e b" and text.stopped
