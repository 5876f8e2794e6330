"""Ask a base and a variant of it, with the tokenizer, template and stops that each of them has where it is run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from transformers import GenerationConfig, PreTrainedTokenizerBase

from gtqlora.bitdelta.checkpoints import Checkpoints
from gtqlora.bitdelta.container import Tensors
from gtqlora.bitdelta.placing import place
from gtqlora.bitdelta.verdict import said
from gtqlora.capture import Subject, open_subject
from gtqlora.config import VerifyConfig
from gtqlora.contrasts import Row, encode_prompt
from gtqlora.exports.job import Said
from gtqlora.judging.judge import NamedJudge
from gtqlora.scoring import Runner


@dataclass(frozen=True, kw_only=True)
class Own:
    """What a fine-tune reads and stops with.

    Attributes:
        stops: token ids that end an answer.
    """

    tokenizer: PreTrainedTokenizerBase
    generation: GenerationConfig
    stops: frozenset[int]

    @staticmethod
    def of(subject: Subject) -> Own:
        """Return what a model that is open has."""
        stops = frozenset(subject.stop_ids.tolist())
        return Own(tokenizer=subject.tokenizer, generation=subject.model.generation_config, stops=stops)

    def same_as(self, other: Own, rows: Sequence[Row]) -> bool:
        """Return whether another model has the same template and tokens, reads these rows alike, and stops alike."""
        # by what they do: the same tokenizer is written in other bytes by each version of transformers
        mine, theirs = self.tokenizer, other.tokenizer
        if mine.chat_template != theirs.chat_template or mine.get_vocab() != theirs.get_vocab():
            return False
        alike = (encode_prompt(mine, row.prompt) == encode_prompt(theirs, row.prompt) for row in rows)
        return self.stops == other.stops and all(alike)


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a base and a variant said.

    Attributes:
        own: whether the variant needs the fine-tune's tokenizer, and was asked with it: the base's is another.
    """

    base: list[Said]
    variant: list[Said]
    own: bool


def ask(
    both: Checkpoints, tensors: Tensors, own: Own, rows: Sequence[Row], judge: NamedJudge, config: VerifyConfig
) -> Asked:
    """Ask the base, then put the variant's weights into it, and ask again.

    Args:
        own: what the fine-tune has.
        config: how models are opened and asked.
    """
    subject = open_subject(replace(config, model=both.base.model))
    base = said(Runner.of(subject, judge, config), rows, "the base")
    differs = not own.same_as(Own.of(subject), rows)
    place(subject, both.names, both.base, tensors.edits)
    # just what will surround the weights where they are served or applied
    if differs:
        subject.model.generation_config = own.generation
        subject = replace(subject, tokenizer=own.tokenizer)
    return Asked(base=base, variant=said(Runner.of(subject, judge, config), rows, "the variant"), own=differs)
