"""How an export is loaded by each program that it is for, as code for its card."""

from __future__ import annotations

import fnmatch
import shlex

from gtqlora.results.export import ExportRecord

_BASE = "BASE"
"""Stands for the base's folder, where it has no name on the hub."""

_OVERLAY = "zz*-overlay-??.safetensors"
_OVERLAID = (
    "`{name}` holds the changed tensors a second time. transformers takes them from the file that sorts last: that one "
    "must keep its name and its place. Other programs were not tried, and may load the base's tensors; for them "
    "export without `--overlay`."
)


def loading(record: ExportRecord, hub_id: str | None, *, needs_us: bool) -> list[str]:
    """Return paragraphs and code blocks of Markdown.

    Args:
        hub_id: the base's name on the hub, if it has one.
        needs_us: the experts are in a format of gtqlora's own, which no server reads.
    """
    base = _BASE if hub_id is None else _one_line(hub_id)
    match record.format:
        case "peft":
            return _adapter(base, record.revision, record.target)
        case "gguf":
            return ["In llama.cpp:", "", *_shell(f"llama-server -m {shlex.quote(_gguf(record))}")]
        case "gguf-adapter":
            command = f"llama-server -m BASE.gguf --lora {shlex.quote(_gguf(record))}"
            return ["In llama.cpp, on a GGUF of the same base:", "", *_shell(command)]
        case _:
            return _merged(record, needs_us)


def _merged(record: ExportRecord, needs_us: bool) -> list[str]:
    ours = ["import gtqlora.experts"] if needs_us else []
    plain = ['model = AutoModelForCausalLM.from_pretrained("FOLDER", dtype="auto")']
    tokenizer = ['tokenizer = AutoTokenizer.from_pretrained("FOLDER")']
    code = [*ours, "from transformers import AutoModelForCausalLM, AutoTokenizer", "", *plain, *tokenizer]
    servers = ["vllm serve FOLDER", "python -m sglang.launch_server --model-path FOLDER"]
    overlays = sorted(fnmatch.filter(record.files, _OVERLAY))
    # servers have no code of ours, and would refuse the weights or read them as something else
    served = [] if needs_us or overlays else ["", "Or served:", "", *_shell(*servers)]
    if overlays:
        served = ["", _OVERLAID.format(name=overlays[-1])]
    return ["FOLDER is this folder, or its name on the hub.", "", *_python(*code), *served]


def _adapter(base: str, revision: str | None, target: str | None) -> list[str]:
    """Return how an adapter is loaded; what else the program needs to be told stands in the export's notes."""
    name = shlex.quote(base)
    at = "" if revision is None else f" --revision {shlex.quote(_one_line(revision))}"
    if target == "vllm":
        command = f"vllm serve {name}{at} --enable-lora --lora-modules edit=FOLDER"
        return ["In vLLM, with the rank that is named above:", "", *_shell(f"{command} --max-lora-rank RANK")]
    if target == "sglang":
        command = f"python -m sglang.launch_server --model-path {name}{at} --enable-lora --lora-paths edit=FOLDER"
        return ["In SGLang:", "", *_shell(command)]
    pinned = "" if revision is None else f", revision={_one_line(revision)!r}"
    return _python(
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM",
        "",
        f'base = AutoModelForCausalLM.from_pretrained({base!r}{pinned}, dtype="auto")',
        'model = PeftModel.from_pretrained(base, "FOLDER")',
    )


def _gguf(record: ExportRecord) -> str:
    """Return the file that is named to llama.cpp: the first one of several."""
    return _one_line(min((name for name in record.files if name.endswith(".gguf")), default="FILE.gguf"))


def _one_line(text: str) -> str:
    """Return text that cannot end a line, and so cannot end the block of code that it stands in."""
    return "".join(character for character in text if character.isprintable())


def _python(*lines: str) -> list[str]:
    return ["```python", *lines, "```"]


def _shell(*lines: str) -> list[str]:
    return ["```sh", *lines, "```"]
