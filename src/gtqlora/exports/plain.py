"""An edit as plain transformers and PEFT run it: the base as it is, and a PEFT folder on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import transformers
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel

from gtqlora.capture import Subject, open_subject
from gtqlora.certificate import Certificate
from gtqlora.exports.job import Said, ready_rows
from gtqlora.families import bind, load_config, load_tokenizer, quantization
from gtqlora.families.files import weight_files
from gtqlora.judging.judge import judge_of
from gtqlora.results.verdict import Outcome
from gtqlora.scoring import Runner, log_probs


@dataclass(frozen=True)
class PlainForm:
    """The base, and the base with an adapter, as their own libraries load them; one of them in memory at a time.

    Attributes:
        folder: opens the PEFT adapter, for as long as it is read.
    """

    certificate: Certificate
    folder: Callable[[], AbstractContextManager[Path]]

    @property
    def name(self) -> str:
        """Return what it is called in messages."""
        return "adapter in plain PEFT on the unmerged base"

    def said(self, rows: Sequence[Outcome], *, edited: bool) -> list[Said]:
        """Return what the base says, with the adapter or without."""
        config = self.certificate.config
        runner = Runner.of(self._opened(edited), judge_of(config.judge), config)
        harmful = ready_rows(rows)
        answers = runner.answers(rows, label="with the adapter" if edited else "without it")
        ready = log_probs(
            runner, [rows[i] for i in harmful], [rows[i].rejected for i in harmful], label="readiness to answer"
        )
        of_row = dict(zip(harmful, ready, strict=True))
        return [
            Said(text=a.text, tokens=len(a.tokens), ended=a.ended, rejected_log_prob=of_row.get(i))
            for i, a in enumerate(answers)
        ]

    def _opened(self, edited: bool) -> Subject:
        model, device = self.certificate.config.model, self.certificate.config.device
        if quantization(model) is None:
            base = plain_model(model).to(device)  # pyright: ignore[reportArgumentType]
            subject = Subject(
                base, load_tokenizer(model, self.certificate.config.template), bind(base, load_config(model)[0])
            )
        else:  # plain transformers has nothing that reads such experts
            subject = open_subject(self.certificate.config)
        if not edited:
            return subject
        with self.folder() as folder:
            adapted = PeftModel.from_pretrained(subject.model, str(folder))
        return Subject(adapted.eval(), subject.tokenizer, subject.anatomy)


def plain_model(model: str) -> PreTrainedModel:
    """Return the language model of MODEL as plain transformers loads it, in the checkpoint's dtype."""
    folder, _ = weight_files(model)
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # it reports towers that are not loaded
    try:
        return AutoModelForCausalLM.from_pretrained(
            str(folder), dtype="auto", use_safetensors=True, trust_remote_code=False, local_files_only=True
        ).eval()
    finally:
        transformers.logging.set_verbosity(before)
