"""Loads configs and models of known families, from a local folder or a hub id, and checks what came.

No code from a model folder is ever run: remote code is off, and only JSON and safetensors are read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, TypedDict

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gtqlora.config.values import Scalar
from gtqlora.errors import ModelError
from gtqlora.families import files, fp8, packed
from gtqlora.families.config_checks import (
    MAX_EXPERTS,
    check_aliases,
    check_sizes,
    check_token_ids,
    check_total,
    switched_off,
)
from gtqlora.families.facts import Family
from gtqlora.families.headers import read_headers
from gtqlora.families.layers import absent, with_layer
from gtqlora.families.names import TensorNames
from gtqlora.families.rendering import warm_up, with_variables
from gtqlora.families.source import Source, read_source
from gtqlora.families.tokenizers import check_generation, read_tokenizer
from gtqlora.families.weight_checks import check_experts, check_headers, check_size

if TYPE_CHECKING:
    from transformers import PreTrainedConfig
    from transformers.utils.quantization_config import QuantizationConfigMixin

    from gtqlora.families.facts import TextConfig

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_QUANTIZED = ("quantization_config", "compression_config")
# Settings that steer the loader (other weight files, patched modules, kernels from the hub), or serve other tasks
# (10^9 labels would each get a name), and not the architecture.
NOT_ARCHITECTURE = {
    *("model_type", "auto_map", "architectures", "dtype", "torch_dtype", "transformers_version", *_QUANTIZED),
    *("num_labels", "id2label", "label2id", "problem_type", "pruned_heads", "is_encoder_decoder", "torchscript"),
    *("base_model_tp_plan", "base_model_pp_plan", "base_model_ep_plan", "keys_to_ignore_at_inference"),
    *("gradient_checkpointing", "add_cross_attention", "is_decoder", "cross_attention_hidden_size"),
    *("transformers_weights", "fusion_config", "distributed_config", "attn_implementation", "experts_implementation"),
}


def _dtype(source: Source) -> torch.dtype | None:
    name = source.first("dtype", "torch_dtype")
    if name is None:
        return None
    dtype = _DTYPES.get(str(name).removeprefix("torch."))
    if dtype is None:
        raise ModelError(f"{source.model}: dtype {name!r} in config.json; known: {', '.join(_DTYPES)}")
    return dtype


def _config(source: Source) -> TextConfig:
    config_class = getattr(transformers, source.family.class_name).config_class
    settings = {k: v for k, v in source.text.items() if k not in NOT_ARCHITECTURE and not k.startswith("_")}
    check_aliases(source.model, settings, config_class.attribute_map)
    try:
        config = config_class(**switched_off(source.model, settings), dtype=_dtype(source))
    except (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError, ArithmeticError) as error:
        detail = files.first_line(" ".join(str(error).split()))
        raise ModelError(f"{source.model}: config.json does not fit {source.family.model_type} ({detail})") from error
    # Once more, with the class's defaults filled in: the default of a key that is left out may not fit the others.
    check_sizes(source.model, vars(config))
    check_token_ids(f"{source.model}: config.json", vars(config), config.vocab_size)
    _check_experts_total(source, config)
    return config


def _check_experts_total(source: Source, config: PreTrainedConfig) -> None:
    total = len(source.family.moe_layers(config)) * source.family.n_experts(config)
    if total > MAX_EXPERTS:
        raise ModelError(f"{source.model}: config.json describes {total:,} experts; at most {MAX_EXPERTS:,} are taken")


def load_config(model: str) -> tuple[Family, TextConfig]:
    """Return the family and the language model's transformers config of MODEL (folder, config.json, or hub id).

    `config.dtype` is the checkpoint's, or None if config.json does not say. Quantized checkpoints are fine here.

    Raises:
        ModelError: no such model, unreadable config.json, dense or unknown architecture.
    """
    source = read_source(model)
    return source.family, _config(source)


def meta_model(family: Family, config: PreTrainedConfig) -> PreTrainedModel:
    """Return the model with shapes and no memory, for anatomy from a config alone; bf16 if the config names no dtype.

    Raises:
        ModelError: the config's sizes make no model.
    """
    # The sizes fit their bounds one by one, but what a class does with all of them together only it can say.
    try:
        with torch.device("meta"):
            model = getattr(transformers, family.class_name)(config)
    except (RuntimeError, ValueError, TypeError, KeyError, ArithmeticError, AssertionError) as error:
        raise ModelError(f"{family.model_type}: the config makes no model ({files.first_line(error)})") from error
    check_total(family.model_type, sum(parameter.numel() for parameter in model.parameters()))
    return model.to(config.dtype or torch.bfloat16)


def _skeleton(family: Family, config: PreTrainedConfig) -> PreTrainedModel:
    """Return a `meta_model` to look at and not to change: that of last time for the same config.

    A stage that goes through a model layer by layer loads it once for each.
    """
    of = (family.model_type, config.to_json_string(use_diff=False))
    found = _last.get(of)
    if found is None:
        found = meta_model(family, config)
        _last.clear()
        _last[of] = found
    return found


_last: dict[tuple[str, str], PreTrainedModel] = {}


def tensor_names(model: str, family: Family, skeleton: PreTrainedModel) -> TensorNames:
    """Return what MODEL's tensors are called on disk and in memory, from the headers of its files.

    Raises:
        ModelError: there are no weights, or a file is corrupt.
    """
    folder, names = files.weight_files(model)
    return TensorNames(skeleton, family, read_headers(folder, names))


def names_on_disk(model: str) -> tuple[str, ...]:
    """Return the names of MODEL's tensors as its index, or else its one file's header, has them; none if neither can.

    Raises:
        ModelError: as `files.small_files`, or the index is not in order.
    """
    folder = files.small_files(model)
    mapped = files.weight_map(folder)
    if mapped is None and files.has(folder, files.WEIGHTS):
        with suppress(ModelError):  # whoever loads the weights says what is wrong with them
            return tuple(read_headers(folder, (files.WEIGHTS,)))
    return tuple(mapped or ())


def load_tokenizer(model: str, variables: Mapping[str, Scalar] | None = None) -> PreTrainedTokenizerBase:
    """Return the tokenizer of MODEL, left-padding, with a chat template, and no token of its own beyond the embedding.

    Args:
        variables: what the chat template is rendered with, such as `enable_thinking`.

    Raises:
        ModelError: as `load_config`, or it cannot be loaded, has no chat template, or does not go with the model.
        ConfigError: the template reads a variable of nearly the name of one that is given.
    """
    tokenizer = read_tokenizer(model, load_config(model)[1].vocab_size)
    warm_up()
    return with_variables(tokenizer, variables or {})


def load_model(
    model: str,
    *,
    dtype: str = "auto",
    device: str = "cpu",
    quantization_config: QuantizationConfigMixin | None = None,
    layer: int | None = None,
) -> tuple[Family, PreTrainedModel]:
    """Return the language model of MODEL, every tensor accounted for and finite; other towers are left out.

    Args:
        quantization_config: a transformers quantization config, used instead of the checkpoint's own. Its quantizer
            answers for the tensors it takes, and works on `device`.
        layer: load this decoder layer only, see `layers.with_layer`.

    Raises:
        ModelError: quantized, pickled, missing, corrupt or mismatched weights, or NaN in them.
    """
    # What costs nothing comes first: config, then names and headers, then memory for the weights, then every value.
    source = read_source(model)
    dequantizing = quantization_config is None and packed.is_block_fp8(source.quantization)
    if quantization_config is None and not dequantizing:
        _refuse_quantized(source)
    config = _config(source)
    folder, names = files.weight_files(model)
    headers = read_headers(folder, names, files.weight_map(folder))
    check_generation(model, folder, config.vocab_size)
    skeleton = _skeleton(source.family, config)
    tensors = TensorNames(skeleton, source.family, headers)
    check_headers(model, source.family, tensors, headers, source.quantization)
    check_size(model, sum(p.numel() for p in skeleton.parameters()), headers)
    quantizing: dict[str, object] = {}
    if quantization_config is None:
        check_experts(model, source.family, config, tensors)
    if dequantizing:
        quantization_config = fp8.DequantizedFP8Config()  # pyright: ignore[reportCallIssue]
    if quantization_config is not None:
        quantizing = {"quantization_config": quantization_config, "device_map": {"": _indexed(device)}}
    loaded, info = _from_pretrained(str(folder), source.family, config, dtype, model, layer, **quantizing)
    _check_loading(model, (*source.family.extra_layers(config), *absent(loaded)), source.family, info)
    check_finite(model, loaded)
    return source.family, loaded.to(torch.device(device)).eval()  # pyright: ignore[reportArgumentType]


def _indexed(device: str) -> torch.device:
    """Return the device with its number: trainers compare devices, and `cuda` is not equal to `cuda:0`."""
    found = torch.device(device)
    if found.type == "cuda" and found.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return found


def quantization(model: str) -> str | None:
    """Return how MODEL's checkpoint is quantized (its `quant_method`), or None if it is not.

    Raises:
        ModelError: no such model, unreadable config.json, dense or unknown architecture.
    """
    settings = quantization_settings(model)
    return None if settings is None else packed.method_of(settings)


def quantization_settings(model: str) -> dict[str, object] | None:
    """Return what MODEL's config.json says of how its checkpoint is quantized, or None.

    Raises:
        ModelError: no such model, unreadable config.json, dense or unknown architecture.
    """
    return read_source(model).quantization


def _refuse_quantized(source: Source) -> None:
    settings = source.quantization
    if settings is None:
        return
    method = packed.method_of(settings)
    if method == packed.OURS or packed.is_packed_int4(settings):
        what = "saved with 4-bit experts" if method == packed.OURS else "INT4"
        raise ModelError(
            f"{source.model}: the checkpoint is {what} (quant_method {method}); use --expert-format native to keep its "
            "experts as they are, or give the bf16, fp16 or fp32 checkpoint"
        )
    raise ModelError(
        f"{source.model}: the checkpoint is quantized (quant_method {method}); this version loads bf16, fp16 and fp32 "
        "checkpoints, FP8 ones (blocks of 128 x 128), and compressed-tensors INT4 ones with --expert-format native. "
        "`gtqlora inspect` works on it"
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Hold back transformers' load report: `_check_loading` judges the same facts and knows which are in order."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(before)


class _LoadingInfo(TypedDict):
    """What transformers says of a loaded checkpoint; a mismatch is (name, shape on disk, shape by config)."""

    missing_keys: set[str]
    unexpected_keys: set[str]
    mismatched_keys: set[tuple[str, tuple[int, ...], tuple[int, ...]]]


def _from_pretrained(
    folder: str, family: Family, config: PreTrainedConfig, dtype: str, model: str, layer: int | None, **more: object
) -> tuple[PreTrainedModel, _LoadingInfo]:
    model_class: Any = getattr(transformers, family.class_name)
    if layer is not None:
        model_class = with_layer(model_class, family, layer)
    # The class's own mapping knows no such wrapper. A nested model whose wrapper it does know has no `wrapper_prefix`.
    renames = {rf"^{re.escape(family.wrapper_prefix)}\.": ""} if family.wrapper_prefix else None
    try:
        with quiet():
            return model_class.from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                key_mapping=renames,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                ignore_mismatched_sizes=True,  # so that they come back by name; `_check_loading` refuses them
                output_loading_info=True,
                **more,
            )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        raise ModelError(f"{model}: the weights cannot be loaded ({files.first_line(error)})") from error


def _check_loading(model: str, left_out: tuple[str, ...], family: Family, info: _LoadingInfo) -> None:
    known = (*family.other_towers, *left_out)
    unexpected = [key for key in info["unexpected_keys"] if not key.startswith(known)]
    mismatched = [
        f"{key} {tuple(disk)} on disk, {tuple(memory)} by config" for key, disk, memory in info["mismatched_keys"]
    ]
    # Shapes first: a tensor of another shape may count as missing, too, and the shape says more.
    for what, keys in (
        ("of another shape than config.json says", mismatched),
        ("missing", info["missing_keys"]),
        ("not of this architecture", unexpected),
    ):
        if keys:
            raise ModelError(f"{model}: {len(keys)} tensors {what}, e.g. {', '.join(sorted(keys)[:3])}")


def check_finite(model: str, loaded: PreTrainedModel) -> None:
    """Check every value of a loaded model.

    Raises:
        ModelError: one is NaN or infinite; the message names the tensor.
    """
    for name, tensor in loaded.state_dict().items():
        bad = _bad_part(tensor)
        if bad is not None:
            raise ModelError(f"{model}: tensor {name}{bad} holds NaN or infinity; get the weights again")


def _bad_part(tensor: Tensor) -> str | None:
    """Return where a tensor is not finite: "" for a plain one, "[expert]" for fused experts, None if it is in order."""
    if not tensor.is_floating_point():
        return None
    # Fused experts are a layer's largest tensor; looked at one by one, the mask takes memory for one only.
    if tensor.ndim < 3:
        return None if bool(tensor.isfinite().all()) else ""
    return next((f"[{i}]" for i, part in enumerate(tensor) if not part.isfinite().all()), None)
