"""The settings of an export: which format, for which program, onto which file."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal, get_args, get_type_hints

from gtqlora.config.values import coerce, require

Format = Literal["safetensors", "peft", "gguf", "gguf-adapter"]
FORMATS: tuple[Format, ...] = get_args(Format)
_TAKEN_BY = {
    "target": ("peft",),
    "onto": ("gguf",),
    "overlay": ("safetensors",),
    "link": ("safetensors",),
    "tokenizer": ("gguf",),
    "base": ("gguf-adapter",),
}
"""Which formats take an option."""


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """What an edit is written as.

    Attributes:
        to: "safetensors" (merged weights in hub layout), "peft" (an adapter), "gguf" (merged weights for llama.cpp) or
            "gguf-adapter" (an adapter for llama.cpp).
        target: the program that loads a PEFT adapter: "peft" where none is named, "vllm" or "sglang".
        onto: the user's own GGUF of the base, whole or the first file of several: only changed tensors are rewritten.
        overlay: write changed tensors into one more file beside links to the base's own.
        link: share unchanged bytes with the base's files where the file system can.
        tokenizer: a GGUF of the same model whose tokenizer a whole GGUF takes.
        base: the user's own GGUF of the base that an adapter will be loaded on, quantized or not: it is judged on it.
    """

    to: Format = "safetensors"
    target: Literal["peft", "vllm", "sglang"] | None = None
    onto: str | None = None
    overlay: bool = False
    link: bool = False
    tokenizer: str | None = None
    base: str | None = None

    def __post_init__(self) -> None:
        # "hub" is of the command line alone, and publishes what one of the formats has written
        require(self.to in FORMATS, f"--to {self.to}: must be one of {', '.join(FORMATS)}, or hub to publish an export")
        require(self.target != "llama.cpp", "--for goes with --to peft; for llama.cpp use --to gguf or gguf-adapter")
        for name, hint in get_type_hints(type(self)).items():
            object.__setattr__(self, name, coerce(getattr(self, name), hint, _flag(name)))
        for field in fields(self):
            taken = _TAKEN_BY.get(field.name, (self.to,))
            given = getattr(self, field.name) != field.default
            require(not given or self.to in taken, f"{_flag(field.name)} goes with --to {' or '.join(taken)} only")
        require(not (self.onto and self.tokenizer), "--tokenizer goes without --onto, whose GGUF keeps its own")
        if self.to == "peft" and self.target is None:
            object.__setattr__(self, "target", "peft")


def _flag(name: str) -> str:
    """Return what the command line calls an option."""
    return "--for" if name == "target" else f"--{name}"
