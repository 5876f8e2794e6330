"""How a variant is spoken with: its tokenizer and chat template, and the tokens that end its answers."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from transformers import GenerationConfig, PreTrainedTokenizerBase

from gtqlora.capture import Subject
from gtqlora.config.stages import check_variables
from gtqlora.config.values import Scalar
from gtqlora.errors import ConfigError, ModelError
from gtqlora.families import load_tokenizer
from gtqlora.families.files import CONFIG, GENERATION, checked_file, config_file, has, read_json, small_names


@dataclass(frozen=True, kw_only=True)
class Voice:
    """A tokenizer with a chat template, and the tokens that end an answer."""

    tokenizer: PreTrainedTokenizerBase
    stop_ids: frozenset[int]


def voice_of(subject: Subject) -> Voice:
    """Return the voice of a model as it was opened."""
    return Voice(tokenizer=subject.tokenizer, stop_ids=frozenset(subject.stop_ids.tolist()))


def check_recorded(template: Mapping[str, Scalar], file: Path) -> None:
    """Check the variables of a chat template that a record has.

    Raises:
        ModelError: one is no variable; the message names the file.
    """
    try:
        check_variables(template)
    except ConfigError as error:
        raise ModelError(f"{file}: {error}") from error


def own_voice(subject: Subject, base: str, folder: Path | None, template: Mapping[str, Scalar]) -> Voice:
    """Return the voice of a variant of a base.

    Args:
        folder: with its own tokenizer, template and settings; None where the base's hold.
        template: variables of the template.

    Raises:
        ModelError: they cannot be read, or do not go with the base.
        ConfigError: the template reads a variable of nearly the name of one of these.
    """
    if folder is None:
        return voice_of(replace(subject, tokenizer=load_tokenizer(base, template)))
    with TemporaryDirectory() as whole:  # what `bitdelta apply` would put beside the weights
        shutil.copyfile(config_file(base), Path(whole, CONFIG))
        for name in small_names(folder):
            Path(whole, name).parent.mkdir(exist_ok=True)
            shutil.copyfile(checked_file(folder, name), Path(whole, name))
        tokenizer = load_tokenizer(whole, template)
    settings = subject.model.generation_config
    if has(folder, GENERATION):
        settings = GenerationConfig.from_dict(read_json(folder / GENERATION))
    return _with_settings(replace(subject, tokenizer=tokenizer), settings)


def _with_settings(subject: Subject, settings: GenerationConfig) -> Voice:
    # `stop_ids` of the subject asks the model's settings, so that there is one rule for what ends an answer
    before, subject.model.generation_config = subject.model.generation_config, settings
    try:
        return voice_of(subject)
    finally:
        subject.model.generation_config = before
