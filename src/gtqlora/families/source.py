"""A config.json as it is read before anything heavy is imported: its family, and its sizes within their bounds."""

from __future__ import annotations

from dataclasses import dataclass

from gtqlora.errors import ModelError
from gtqlora.families import files, packed
from gtqlora.families.config_checks import check_sizes, check_types, with_floats
from gtqlora.families.facts import Family, family_of


@dataclass(frozen=True, kw_only=True)
class Source:
    """A config.json, read: its family, all of it, and the language model's part."""

    model: str
    family: Family
    raw: dict[str, object]
    text: dict[str, object]

    def first(self, *keys: str) -> object:
        """Return the first value present, the language model's own before the whole model's."""
        return next((part[key] for part in (self.text, self.raw) for key in keys if part.get(key) is not None), None)

    @property
    def quantization(self) -> dict[str, object] | None:
        """What it says of how the checkpoint is quantized, or None."""
        return packed.settings_of(self.raw, self.family.text_key, self.model)


def read_source(model: str) -> Source:
    """Return the config.json of MODEL (folder, config.json, or hub id).

    Raises:
        ModelError: no such model, unreadable config.json, dense or unknown architecture, sizes out of bounds.
    """
    raw = with_floats(model, files.read_json(files.config_file(model)))
    if not isinstance(raw, dict):
        raise ModelError(f"{model}: config.json must hold an object with the model's settings")
    family = family_of(raw, model)
    text = raw.get(family.text_key) if family.text_key else raw
    if not isinstance(text, dict):
        raise ModelError(f"{model}: config.json has no {family.text_key!r} section")
    if family.text_types and text.get("model_type") not in family.text_types:
        known = ", ".join(family.text_types)
        raise ModelError(
            f"{model}: {family.text_key}.model_type is {text.get('model_type')!r}, expected one of {known}"
        )
    # The outer part, too, where the language model's is nested: tokenizers and other programs read it as a whole.
    for part in (raw, text):
        check_types(model, part)
        check_sizes(model, part)
    return Source(model=model, family=family, raw=raw, text=text)
