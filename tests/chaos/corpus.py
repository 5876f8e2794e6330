"""Inputs that once hung the tool, made it end in a traceback, or were accepted in ablate: each is one clear error."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.chaos import fuzz
from tests.chaos.world import CHECK, TRAIN, TRAIN_SHARDED

Change = Callable[[bytes], bytes]


@dataclass(frozen=True)
class Known:
    """`file` changed, and the command that reads it; `code` is how that ends."""

    name: str
    file: str
    change: Change
    command: tuple[str, ...]
    code: int = 2


def keys(**changes: Any) -> Change:
    return lambda data: json.dumps({**json.loads(data), **changes}).encode()


def text(new: str) -> Change:
    return lambda data: new.encode()


def before_end(more: str) -> Change:
    """More keys as text, which JSON writers would not write."""
    return lambda data: data.rstrip()[:-1] + f", {more}}}".encode()


def first_row(**changes: Any) -> Change:
    return lambda data: b"\n".join([keys(**changes)(data.splitlines()[0]), *data.splitlines()[1:]])


def first_line(more: str) -> Change:
    return lambda data: b"\n".join([before_end(more)(data.splitlines()[0]), *data.splitlines()[1:]])


def header(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Change:
    def changed(data: bytes) -> bytes:
        size = struct.unpack("<Q", data[:8])[0]
        written = json.dumps(change(json.loads(data[8 : 8 + size]))).encode()
        return struct.pack("<Q", len(written)) + written + data[8 + size :]

    return changed


def _as_integers(found: dict[str, Any]) -> dict[str, Any]:
    return {k: {**v, "dtype": "I32"} if k.endswith("q_proj.weight") else v for k, v in found.items()}


_INSPECT = ("inspect", "model", "--json")
_CONFIG, _TEMPLATE, _GENERATION = "model/config.json", "model/chat_template.jinja", "model/generation_config.json"


def _config(name: str, **changes: Any) -> Known:
    return Known(name, _CONFIG, keys(**changes), _INSPECT)


def _template(template: str) -> Known:
    return Known(f"template {template[:60]}", _TEMPLATE, text(template), CHECK)


def _in_run(file: str, content: str, *commands: tuple[str, ...], code: int = 2) -> list[Known]:
    return [Known(f"{file} {content[:30]} {c[0]}", f"run/{file}", text(content), c, code) for c in commands]


_PAIRS = ("contrast", "check", "pairs.jsonl", *CHECK[3:5])
KNOWN = (
    _config("a thousand million layers", num_hidden_layers=10**9),
    _config("epsilon that is no number", rms_norm_eps=float("nan")),
    _config("no heads", num_attention_heads=0),
    _config("no width", hidden_size=0),
    _config("a thousand million experts", num_experts=10**9),
    _config("a vocabulary without end", vocab_size=10**15),
    _config("more experts chosen than there are", num_experts_per_tok=9),
    _config("quantized by a word", quantization_config="nf4"),
    _config("quantized by a number", quantization_config=7),
    _config("quantized by a list", quantization_config={"quant_method": ["x"]}),
    _config("layers as text", num_hidden_layers="3"),
    _config("nested a thousand deep", deep=json.loads("[" * 900 + "]" * 900)),
    Known("a key twice", _CONFIG, before_end('"num_experts": 4'), _INSPECT),
    Known("5000 digits", _CONFIG, before_end('"x": ' + "9" * 5000), _INSPECT),
    Known("config without end", _CONFIG, text("[" * 100_000), _INSPECT),
    _template("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"),
    _template("{% for i in range(99999) %}{{ 'x' * 999 }}{% endfor %}"),
    _template("{{ messages + 1 }}"),
    _template("{{ 1/0 }}"),
    _template("{{ range(10**12) | list }}"),
    _template("{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}"),
    _template("{{ 'a' * 10**12 }}"),
    _template("{% include 'x' %}"),
    _template("hello"),
    _template(""),
    Known("end token as text", _GENERATION, keys(eos_token_id="x"), _INSPECT),
    Known("end token nested", _GENERATION, keys(eos_token_id=[[1]]), _INSPECT),
    Known("end token beyond the vocabulary", _GENERATION, keys(eos_token_id=10**9), _INSPECT),
    Known("end token negative", _GENERATION, keys(eos_token_id=-1), _INSPECT),
    Known("generation settings cut off", _GENERATION, text('{"eos'), _INSPECT),
    Known("chosen twice", "pairs.jsonl", first_line('"chosen": "refuse sorry"'), _PAIRS),
    Known("a row of numbers", "pairs.jsonl", first_row(chosen=7), _PAIRS),
    Known("a row with 5000 digits", "pairs.jsonl", first_line('"x": ' + "9" * 5000), _PAIRS),
    Known("weights as integers", "model/model.safetensors", header(_as_integers), TRAIN),
    Known(
        "an index of a file elsewhere",
        "sharded/model.safetensors.index.json",
        lambda data: json.dumps({"weight_map": dict.fromkeys(json.loads(data)["weight_map"], "../x")}).encode(),
        TRAIN_SHARDED,
    ),
    *(
        known
        for content in ("[]", "{}", "null", '{"floor": 7}', "{", "\x80\x04K\x01.")
        for known in _in_run("verdict.json", content, fuzz._REPORT)
    ),
    *(known for content in ("[]", "{}", "null") for known in _in_run("verdict.json", content, fuzz._EXPORT)),
    *(
        known
        for content in ("[]", "7", '{"format": "1", "stages": {}}', '{"format": 1, "stages": []}')
        for known in _in_run("manifest.json", content, fuzz._REPORT, fuzz._EXPORT, fuzz._VERIFY)
    ),
    *_in_run("adapter/gtqlora.json", "\x80\x04K\x01.", fuzz._VERIFY, fuzz._EXPORT),
    *_in_run("adapter/gtqlora.json", '{"kind": "gt-qlora", "details": []}', fuzz._VERIFY, fuzz._EXPORT),
    *_in_run("adapter/adapter_config.json", '{"r": "x"}', fuzz._VERIFY, fuzz._EXPORT),
    Known("another scale", "run/adapter/adapter_config.json", keys(alpha_pattern={".*": 1e-6}), fuzz._EXPORT),
    Known("no alpha", "run/adapter/adapter_config.json", keys(lora_alpha=None), fuzz._EXPORT),
)
