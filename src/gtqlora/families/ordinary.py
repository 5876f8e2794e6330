"""Loads models of transformers' own classes that nothing is edited in, such as judges, from untrusted folders.

As everywhere, no code from the folder runs, and only JSON and safetensors are read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from gtqlora.errors import ModelError
from gtqlora.families import files
from gtqlora.families.config_checks import check_sizes, check_total, check_types
from gtqlora.families.headers import read_headers
from gtqlora.families.identity import pinned
from gtqlora.families.loading import NOT_ARCHITECTURE, check_finite, quiet
from gtqlora.families.tokenizers import at_fault, chat_template, check_files, check_generation
from gtqlora.families.weight_checks import check_size
from gtqlora.progress import track
from gtqlora.run import sha256_file, sha256_json

# These say what a classifier's outputs are, so that they are wanted here.
_OUTPUTS = {"id2label", "label2id", "problem_type", "is_decoder", "is_encoder_decoder"}
_RETURNS = {"output_attentions", "output_hidden_states", "output_router_logits", "return_dict"}
_MOST_LABELS = 1000


@dataclass(frozen=True, kw_only=True)
class OrdinaryModel:
    """A model's files, found and checked, and not loaded yet.

    Attributes:
        name: as the user gave it.
        folder: where the files are.
        weights: names of the safetensors files.
        config: as transformers' class has it.
        digest: the hub's commit, or a hash of what a folder holds.
    """

    name: str
    folder: Path
    weights: tuple[str, ...]
    config: PreTrainedConfig
    digest: str


def find(model: str) -> OrdinaryModel:
    """Find MODEL's files, from the hub if need be, and check what they say.

    Raises:
        ModelError: no such model, no safetensors, links that lead out, an architecture that needs code of its own, or
            a config.json that makes no model.
    """
    config = _config(model, files.read_json(files.config_file(model)))
    # By its commit from here on: between two downloads the hub's branch may move.
    name = pinned(model)
    folder, weights = files.weight_files(name)
    digest = _digest(folder, weights) if files.is_local(model) else f"commit:{name.partition('@')[2]}"
    return OrdinaryModel(name=model, folder=folder, weights=weights, config=config, digest=digest)


def _digest(folder: Path, weights: tuple[str, ...]) -> str:
    # What is read and nothing else: a README may change.
    names = sorted({*files.small_names(folder), *weights})
    hashed = track((sha256_file(files.checked_file(folder, name)) for name in names), "hashing the judge", len(names))
    return f"sha256:{sha256_json(dict(zip(names, hashed, strict=True)))}"


def _config(model: str, raw: dict[str, object]) -> PreTrainedConfig:
    check_types(model, raw)
    check_sizes(model, raw)
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        own = ", which needs code of its own, and no code from a model folder runs" if "auto_map" in raw else ""
        raise ModelError(f"{model}: model_type {kind!r} is none of transformers'{own}; take a model of a known class")
    if "quantization_config" in raw:
        raise ModelError(f"{model}: quantized; give the bf16, fp16 or fp32 checkpoint")
    if isinstance(labels := raw.get("id2label"), dict) and len(labels) > _MOST_LABELS:
        raise ModelError(f"{model}: config.json names {len(labels):,} labels; at most {_MOST_LABELS:,} are taken")
    dropped = (NOT_ARCHITECTURE - _OUTPUTS) | _RETURNS
    settings = {key: value for key, value in raw.items() if key not in dropped and not key.startswith("_")}
    config_class: Any = CONFIG_MAPPING[kind]
    with at_fault(model, f"config.json does not fit {kind}"):
        return config_class(**settings)


def load(found: OrdinaryModel, auto_class: Any, device: str) -> PreTrainedModel:
    """Return the model on a device, all its weights there and finite.

    Args:
        auto_class: one of transformers' `AutoModelFor...`.

    Raises:
        ModelError: the architecture has no such form, or weights are missing, corrupt or not finite.
    """
    _check_size(found, auto_class)
    wanted: dict[str, object] = {"use_safetensors": True, "trust_remote_code": False, "local_files_only": True}
    try:
        with quiet():
            model, info = auto_class.from_pretrained(
                str(found.folder), config=found.config, dtype="auto", output_loading_info=True, **wanted
            )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        raise ModelError(f"{found.name}: the weights cannot be loaded ({files.first_line(error)})") from error
    if missing := sorted(info["missing_keys"]):
        raise ModelError(
            f"{found.name}: {len(missing)} tensors of {type(model).__name__} are missing, e.g. {missing[0]}; "
            "it is not a model of this kind"
        )
    check_finite(found.name, model)
    return model.to(device).eval()


def _check_size(found: OrdinaryModel, auto_class: Any) -> None:
    with at_fault(found.name, "its architecture makes no such model"), torch.device("meta"):
        skeleton = auto_class.from_config(found.config, trust_remote_code=False)
    # Before memory is taken: a config of a few bytes may describe more than the machine holds.
    parameters = sum(parameter.numel() for parameter in skeleton.parameters())
    check_total(found.name, parameters)
    check_size(found.name, parameters, read_headers(found.folder, found.weights))


def load_tokenizer(found: OrdinaryModel, *, chats: bool = False) -> PreTrainedTokenizerBase:
    """Return the model's tokenizer.

    Args:
        chats: whether it has to have a chat template.

    Raises:
        ModelError: it cannot be loaded, has no token to pad with or no template, or does not go with the model.
    """
    check_files(found.folder)
    check_generation(found.name, found.folder, _vocabulary(found))
    with at_fault(found.name, "the tokenizer cannot be loaded"):
        tokenizer = AutoTokenizer.from_pretrained(found.folder, trust_remote_code=False, local_files_only=True)
    template = chat_template(found.folder)
    if chats and template is None:
        raise ModelError(f"{found.name}: the tokenizer has no chat template; put a {files.TEMPLATE} into the folder")
    # Ours and not what transformers found: of several places it may have taken another one.
    tokenizer.chat_template = template
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise ModelError(f"{found.name}: the tokenizer has neither a pad_token nor an eos_token; name one")
    if (largest := max(tokenizer.get_vocab().values(), default=0)) >= _vocabulary(found):
        raise ModelError(
            f"{found.name}: the tokenizer has a token {largest}, and the model's embedding {_vocabulary(found)} rows"
        )
    return tokenizer


def _vocabulary(found: OrdinaryModel) -> int:
    return int(found.config.get_text_config().vocab_size)


def labels_of(found: OrdinaryModel) -> Mapping[int, str]:
    """Return what a classifier's outputs are called."""
    return {int(number): str(name) for number, name in (found.config.id2label or {}).items()}
