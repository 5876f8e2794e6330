"""What a chat template can be told, and what it does about thoughts before an answer."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gtqlora.contrasts.template import before_answers, rendered
from gtqlora.errors import ContrastError
from gtqlora.judging.thoughts import closed_by, opened_by

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class Prompting:
    """What a chat template can be told, and where it has the model's answer begin.

    Attributes:
        reads: variables that the setting `template` can give.
        opens: what opens the thought inside of which its generation prompt ends; "" if it ends outside of any.
        closes: what closes the thought behind which it ends; "" if it ends behind none.
        before_answers: what conversations have before an answer and the generation prompt lacks, such as an empty
            thought; mostly "".
        switch: the setting with which answers begin right after the prompt; "" if there is none, or no need.
    """

    reads: tuple[str, ...]
    opens: str
    closes: str
    before_answers: str
    switch: str

    @property
    def thinks(self) -> bool:
        """Return whether a model that is asked in this way begins with a thought, or with another channel."""
        return bool(self.opens or self.before_answers)

    @property
    def sentence(self) -> str:
        """Return where answers begin, and what would have them begin right after the prompt."""
        mending = f"; set {self.switch} to switch it off" if self.switch else ""
        if self.opens:
            return (
                f"opens a thought: answers begin inside {self.opens}, and are trained behind an empty thought{mending}"
            )
        if self.before_answers:
            return (
                f"has {self.before_answers.strip()!r} before answers, which its generation prompt lacks: that is no "
                f"part of what is trained, and a model that is asked may write a thought of its own there{mending}"
            )
        return f"closes the thought ({self.closes}) before answers" if self.closes else "has nothing before answers"


def prompting_of(tokenizer: PreTrainedTokenizerBase) -> Prompting:
    """Return what the tokenizer's chat template reads and does, with the variables that it is rendered with.

    Raises:
        ModelError: the template fails.
    """
    # Only now, as in `template.rendered`: it needs transformers.
    from gtqlora.families.rendering import reads

    known, ends, before = reads(tokenizer), _ends(tokenizer), before_answers(tokenizer)
    opens = opened_by(ends)
    needed = bool(opens or before)
    return Prompting(
        reads=known,
        opens=opens,
        closes=closed_by(ends),
        before_answers="" if opens else before,
        switch=_switch(tokenizer, known) if needed else "",
    )


def _ends(tokenizer: PreTrainedTokenizerBase) -> str:
    try:
        return rendered(tokenizer, [{"role": "user", "content": "A"}], generation=True)
    except ContrastError:  # it demands other messages
        return ""


def _switch(tokenizer: PreTrainedTokenizerBase, known: tuple[str, ...]) -> str:
    """Return the setting that switches thinking off, tried out."""
    from gtqlora.families.rendering import variables_of, with_variables

    # By trying it: what a variable's name promises its template need not keep.
    for name in (name for name in known if "think" in name):
        other = with_variables(copy.copy(tokenizer), {**variables_of(tokenizer), name: False})
        if not opened_by(_ends(other)) and not before_answers(other):
            return f"template.{name}=false"
    return ""
