"""What is wrong with what was accepted; looked at by plain libraries, not by what accepted it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, GenerationConfig, Qwen3MoeConfig, Qwen3MoeForCausalLM

from tests import helpers
from tests.chaos import scenes
from tests.chaos.world import World


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, dict | list):
        for entry in value.values() if isinstance(value, dict) else value:
            yield from _numbers(entry)
    elif isinstance(value, int | float):
        yield value


def inspected(world: World, command: tuple[str, ...], out: str) -> str | None:
    """The numbers are finite and those of a model that plain transformers builds from this config."""
    found = json.loads(out)
    if not all(math.isfinite(number) for number in _numbers(found)):
        return "a number is not finite"
    config = {k: v for k, v in json.loads(Path("model/config.json").read_text()).items() if not _set_aside(k)}
    with torch.device("meta"):
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**config))
    count = sum(p.numel() for p in model.parameters())
    if found["text_parameters"] != count:
        return f"{found['text_parameters']} parameters, but the model has {count}"
    if not 1 <= found["top_k"] <= found["experts"]:
        return f"top {found['top_k']} of {found['experts']} experts"
    return None


def _set_aside(key: str) -> bool:
    """Settings that gtqlora overrides or does not read, whatever they are."""
    return key.startswith("__") or key in ("quantization_config", "output_router_logits", "output_attentions")


def rendered(world: World, command: tuple[str, ...], out: str) -> str | None:
    """Different prompts become different tokens, all of them of the model's vocabulary."""
    tokenizer = AutoTokenizer.from_pretrained("model")
    vocabulary = json.loads(Path("model/config.json").read_text())["vocab_size"]
    prompts = [json.loads(line)["prompt"] for line in Path("few.jsonl").read_text().splitlines()][:4]
    seen = [tuple(_ids(tokenizer, prompt)) for prompt in prompts]
    if any(not ids for ids in seen):
        return "a prompt renders to nothing"
    if len(set(seen)) < len(set(map(str, prompts))):
        return "different prompts render alike"
    if max(max(ids) for ids in seen) >= vocabulary:
        return "a token beyond the vocabulary"
    return None


def _ids(tokenizer: Any, prompt: str | list[dict[str, str]]) -> list[int]:
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]


def generates(world: World, command: tuple[str, ...], out: str) -> str | None:
    """Every special token named is a token."""
    vocabulary = json.loads(Path("model/config.json").read_text())["vocab_size"]
    settings = GenerationConfig.from_pretrained("model").to_dict()
    for key in ("eos_token_id", "pad_token_id", "bos_token_id"):
        value = settings.get(key)
        for token in value if isinstance(value, list) else [value]:
            if token is not None and not (type(token) is int and 0 <= token < vocabulary):
                return f"{key} is {token!r}"
    return None


def checked(world: World, command: tuple[str, ...], out: str) -> str | None:
    """Every row has its parts, a harmful one refuses, and nothing is there twice."""
    rows = _rows(Path(command[2]))
    keys: set[str] = set()
    for row in rows:
        if row["kind"] not in ("benign", "lookalike", "harmful"):
            return f"kind {row['kind']!r}"
        chosen, rejected = _text(row["chosen"]), _text(row["rejected"])
        if not chosen.strip() or not rejected.strip():
            return "an answer is empty"
        if row["kind"] == "harmful" and not helpers.refuses(chosen):
            return "a harmful row's chosen does not refuse"
        if (key := json.dumps([row["prompt"], chosen, rejected])) in keys:
            return "a row is there twice"
        keys.add(key)
    return None if rows else "no rows"


def _rows(file: Path) -> list[dict[str, Any]]:
    if file.suffix == ".parquet":
        return pq.read_table(file).to_pylist()
    return [json.loads(line) for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else value[0]["content"]


def trained(world: World, command: tuple[str, ...], out: str) -> str | None:
    """What was trained is finite, and the weights it was trained on were floats and finite."""
    edit = load_file(next(Path().glob("*/adapter/edit.safetensors")))
    if not all(tensor.isfinite().all() for tensor in edit.values()):
        return "the edit is not finite"
    for file in Path(command[1]).glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            if not tensor.is_floating_point() or not tensor.isfinite().all():
                return f"{name} is {tensor.dtype}, or not finite"
    return None


def resumed(world: World, command: tuple[str, ...], out: str) -> str | None:
    """Whatever the run's files say, the edit is the one that training makes, bit for bit."""
    found = scenes.contents(world.trial, ("run/adapter/edit.safetensors",))
    return None if found == world.adapter else "another edit than an undisturbed training's"


def ran(world: World, command: tuple[str, ...], out: str) -> str | None:
    """Of a run: exported weights are the certified ones, a passed verdict is of the edit that was trained."""
    match command[0]:
        case "export":
            found = {n: h for n, h in scenes.contents(world.trial, ("out",)).items() if n.endswith(".safetensors")}
            wanted = {n: h for n, h in world.exported.items() if n.endswith(".safetensors")}
            return None if found == wanted else "exported other weights than the certified ones"
        case "verify":
            verdict = json.loads(Path("run/verdict.json").read_text())
            same = all(verdict[key] == world.verdict[key] for key in ("adapter", "table", "lost"))
            return None if same else "passed something else than what was trained"
        case "train":
            return resumed(world, command, out)
        case _:
            page = Path("run/report.html").read_text()
            return "the report is not whole" if not page.rstrip().endswith("</html>") else _odd_words(page)


def _odd_words(page: str) -> str | None:
    if "<script>alert(1)" in page:
        return "markup goes into the report as it is"
    found = re.search(r">[^<]*\b(nan|NaN|inf)\b ?%?[^<]*<", page)
    return f"the report says {found.group(0)[:80]!r}" if found else None
