"""What a served model says to many prompts: some at once, each noted as it comes, so that nothing is asked twice."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import takewhile

from transformers import PreTrainedTokenizerBase

from gtqlora.capture import Subject
from gtqlora.config.addresses import served_at
from gtqlora.contrasts.template import completions, tokens
from gtqlora.decoding import Decoded, Tokens
from gtqlora.errors import ContrastError
from gtqlora.progress import track
from gtqlora.served.server import Completion, Question, Server
from gtqlora.storage.contents import sha256_bytes
from gtqlora.storage.journal import Journal


@dataclass(frozen=True, kw_only=True)
class Served:
    """A model behind a server that says what one of ours would.

    Attributes:
        name: as a setting has it, `NAME` or `URL#NAME`.
        stops: token ids that end a completion; all are below `vocabulary`.
        at_once: prompts that are asked together.
        journal: where answers are noted; without one they are not.
    """

    name: str
    server: Server
    tokenizer: PreTrainedTokenizerBase
    stops: frozenset[int]
    vocabulary: int
    at_once: int
    journal: Journal | None = None

    @staticmethod
    def of(subject: Subject, url: str, name: str, *, at_once: int, journal: Journal | None = None) -> Served:
        """Return the model of a server, `NAME` or `URL#NAME`, in the place of one that is open here."""
        stops = frozenset(subject.stop_ids.tolist())
        server = Server(*served_at(url, name))
        return Served(
            name=name,
            server=server,
            tokenizer=subject.tokenizer,
            stops=stops,
            vocabulary=subject.vocabulary,
            at_once=at_once,
            journal=journal,
        )

    def __call__(self, prompts: Sequence[Tokens], max_new_tokens: int, label: str | None = None) -> Decoded:
        """Return what it says to prompts, greedily.

        Args:
            label: shown as progress.

        Raises:
            ModelError: as `Server.complete`.
            RunError: the journal cannot be written.
        """
        return self.say([self._question(ids, max_new_tokens) for ids in prompts], label)

    def drawn(
        self, prompts: Sequence[Tokens], max_new_tokens: int, temperature: float, seeds: Sequence[int]
    ) -> Decoded:
        """Return answers that are drawn, each by a seed of its own; arguments and errors as of a call."""
        pairs = zip(prompts, seeds, strict=True)
        return self.say([self._question(ids, max_new_tokens, temperature, seed) for ids, seed in pairs])

    def say(self, questions: Sequence[Question], label: str | None = None) -> Decoded:
        """Return the completions of questions; arguments and errors as of a call."""
        names = [_name(self.server, question) for question in questions]
        found = {i: known for i, name in enumerate(names) if (known := self._noted(name)) is not None}
        rest = [i for i in range(len(questions)) if i not in found]
        asked = self._asked([questions[i] for i in rest])
        for place, said in asked if label is None else track(asked, label, len(rest)):
            found[rest[place]] = said
            if self.journal is not None:
                self.journal.add({names[rest[place]]: [said.text, said.tokens, said.ended]})
        return self._decoded(questions, [found[i] for i in range(len(questions))])

    def _question(self, ids: Tokens, most: int, temperature: float = 0.0, seed: int = 0) -> Question:
        return Question(ids=ids, text=self.text_of(ids), most=most, temperature=temperature, seed=seed)

    def text_of(self, ids: Tokens) -> str | None:
        """Return the text of a prompt's tokens; None if the tokenizer makes other ones of it."""
        text = str(self.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))
        return text if tokens(self.tokenizer, text) == list(ids) else None

    def _asked(self, questions: Sequence[Question]) -> Iterator[tuple[int, Completion]]:
        """Yield the completions as they come, each with its question's place."""
        first = 0
        # One first, by which the server's way is found.
        if questions and not self.server.settled:
            first = 1
            yield 0, self.server.complete(questions[0])
        with ThreadPoolExecutor(self.at_once) as pool:
            waiting: dict[Future[Completion], int] = {
                pool.submit(self.server.complete, questions[i]): i for i in range(first, len(questions))
            }
            try:
                yield from _as_they_come(waiting)
            except BaseException:  # such as Ctrl-C
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _noted(self, name: str) -> Completion | None:
        """Return what the journal has, which a stranger may have written."""
        entry = self.journal[name] if self.journal is not None and name in self.journal else None
        if not isinstance(entry, list) or len(entry) != 3 or not isinstance(entry[0], str):
            return None
        ids = entry[1] if isinstance(entry[1], list) and all(type(token) is int for token in entry[1]) else None
        return Completion(text=entry[0], tokens=ids, ended=entry[2] is True)

    def _decoded(self, questions: Sequence[Question], said: Sequence[Completion]) -> Decoded:
        every = [self._tokens(one) for one in said]
        kept = [list(takewhile(lambda token: token not in self.stops, ids)) for ids in every]
        texts = completions(self.tokenizer, [question.ids for question in questions], kept)
        stopped = [len(own) < len(ids) for own, ids in zip(kept, every, strict=True)]
        ended = [one.ended or cut for one, cut in zip(said, stopped, strict=True)]
        return Decoded(texts, kept, ended, [])

    def _tokens(self, said: Completion) -> list[int]:
        """Return the tokens of a completion, which the server tells or else its text has."""
        try:
            found = tokens(self.tokenizer, said.text) if said.tokens is None else said.tokens
        except ContrastError as error:
            raise self.server.fault("its answer is in no words of the model's tokenizer") from error
        if not all(0 <= token < self.vocabulary for token in found):
            raise self.server.fault("it tells token ids that the model does not have")
        return found


def _as_they_come(waiting: Mapping[Future[Completion], int]) -> Iterator[tuple[int, Completion]]:
    """Yield completions with their places; if one fails what waits is dropped, and what was under way still comes."""
    failed: BaseException | None = None
    for done in as_completed(waiting):
        if done.cancelled():
            continue
        if (error := done.exception()) is None:
            yield waiting[done], done.result()
        elif failed is None:
            failed = error
            for each in waiting:
                each.cancel()
    if failed is not None:
        raise failed


def _name(server: Server, asked: Question) -> str:
    """Return the name of an answer in a journal."""
    what = [server.url, server.model, list(asked.ids), asked.most, asked.temperature, asked.seed]
    return sha256_bytes(json.dumps(what).encode())
