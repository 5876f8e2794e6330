"""Loads and saves models with frozen 4-bit experts through transformers' own `from_pretrained` and `save_pretrained`.

transformers merges all experts of a layer before a quantizer sees them, so they are kept away from it: `FrozenExperts`
take their place before the weights come, and are filled from the files, one matrix at a time, once the others are in.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightTransform
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

from gtqlora.errors import ModelError
from gtqlora.experts import sources
from gtqlora.experts.counts import quantized_expert_counts
from gtqlora.experts.formats import FORMATS, Format, format_of
from gtqlora.experts.module import FrozenExperts, activation_of
from gtqlora.experts.placing import chosen, device_of
from gtqlora.experts.settings import KEEP, NATIVE, NF4, FrozenExpertsConfig, saved_settings
from gtqlora.experts.sharding import is_worth_it, shard
from gtqlora.experts.streaming import Streaming
from gtqlora.experts.tensor_files import TensorFiles
from gtqlora.families import packed
from gtqlora.families.facts import DOWN, GATE_UP, Family, family_of
from gtqlora.families.files import CONFIG, read_json
from gtqlora.families.layers import moe_layers_of
from gtqlora.families.names import TensorNames


@dataclass(frozen=True, kw_only=True)
class _Checkpoint:
    """The checkpoint that is being loaded.

    Attributes:
        settings: its own quantization settings, None if it is not quantized.
    """

    folder: Path
    files: tuple[Path, ...]
    family: Family
    settings: Any

    @property
    def ours(self) -> FrozenExpertsConfig | None:
        if self.settings is None or packed.method_of(self.settings) != packed.OURS:
            return None
        return saved_settings(self.settings)


def _checkpoint(paths: Iterable[str] | None, model: PreTrainedModel) -> _Checkpoint:
    files = tuple(Path(path) for path in paths or ())
    if not files:
        raise ModelError("frozen experts are read from safetensors files; give from_pretrained a model folder")
    folder = files[0].parent
    raw = read_json(folder / CONFIG)
    family = family_of(raw, str(folder))
    if type(model).__name__ != family.class_name:
        raise ModelError(
            f"{folder}: opened as {type(model).__name__}, expected {family.class_name}; load it with "
            "gtqlora.experts.load_model"
        )
    settings = packed.settings_of(raw, family.text_key, str(folder))
    return _Checkpoint(folder=folder, files=files, family=family, settings=settings)


@contextmanager
def _naming(folder: Path) -> Iterator[None]:
    """Put the folder before the complaints about what is in it."""
    try:
        yield
    except ModelError as error:
        raise ModelError(f"{folder}: {error}") from error


def _source(
    checkpoint: _Checkpoint, wanted: str, matrices: tuple[sources.Matrix, ...], files: TensorFiles
) -> sources.Source:
    """Return how the experts lie in the checkpoint, if that goes with the format that is wanted.

    Raises:
        ModelError: it does not, or the checkpoint is quantized in a way that is not read.
    """
    ours = checkpoint.ours
    if checkpoint.settings is None:
        if wanted == NATIVE:
            raise ModelError(f"format {NATIVE!r}, but the checkpoint is not quantized; use one of {', '.join(FORMATS)}")
        return _unquantized(format_of(wanted), matrices, files)
    if ours is not None:
        if wanted not in (NATIVE, ours.format):
            raise ModelError(
                f"format {wanted!r}, but the experts were saved as {ours.format}; use {ours.format!r} or {NATIVE!r}"
            )
        return sources.PartsSource(format=format_of(ours.format))
    group = packed.packed_group(checkpoint.settings)
    if wanted != NATIVE:
        raise ModelError(f"format {wanted!r}, but the checkpoint's experts are INT4 already; use {NATIVE!r}")
    return sources.PackedSource(format=format_of(f"int4-g{group}"))


def _unquantized(format: Format, matrices: tuple[sources.Matrix, ...], files: TensorFiles) -> sources.Source:
    fused = sources.FusedSource(format=format, n_experts=1 + max(matrix.expert for matrix in matrices))
    is_fused = fused.wanted(matrices[0]).keys() <= files.where.keys()
    return fused if is_fused else sources.PlainSource(format=format)


def experts_of(model: nn.Module, family: Family) -> dict[int, FrozenExperts]:
    """Return the frozen experts of a language model, by layer."""
    found = {i: model.get_submodule(family.experts_of(i)) for i in moe_layers_of(model, family)}
    return {layer: module for layer, module in found.items() if isinstance(module, FrozenExperts)}


@register_quantizer(packed.OURS)
class FrozenExpertsQuantizer(HfQuantizer):
    """transformers' hooks around loading and saving; see the module's docstring."""

    quantization_config: FrozenExpertsConfig
    requires_calibration = False

    def __init__(self, quantization_config: FrozenExpertsConfig, **kwargs: Any) -> None:
        # A copy, because what the checkpoint settles is written into it.
        super().__init__(copy.deepcopy(quantization_config), **kwargs)
        self._dense: Bnb4BitHfQuantizer | None = None
        self._checkpoint: _Checkpoint | None = None
        self._source: sources.Source | None = None
        self._matrices: tuple[sources.Matrix, ...] = ()
        self._shape_dtype = torch.int64
        self._device = torch.device("cpu")
        self._waiting: list[FrozenExperts] = []
        self._later: list[FrozenExperts] = []

    # --- loading

    def validate_environment(self, *_args: object, **_kwargs: object) -> None:
        """Check that bitsandbytes is there, if dense weights go through it."""
        if self.quantization_config.dense == NF4 and find_spec("bitsandbytes") is None:
            raise ModelError(f"dense = {NF4!r} needs bitsandbytes, which is not installed: pip install bitsandbytes")

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> PreTrainedModel:
        checkpoint, config = _checkpoint(checkpoint_files, model), self.quantization_config
        family = checkpoint.family
        self._checkpoint = checkpoint
        with _naming(checkpoint.folder), TensorFiles(checkpoint.files) as files:
            names = TensorNames(model, family, files.where)
            self._matrices = matrices = tuple(sources.matrices(family, model, names))
            if not family.moe_layers(model.config):  # pyright: ignore[reportArgumentType]
                raise ModelError("this config has no MoE layer, so there are no experts to freeze")
            if matrices:  # a model that is loaded a layer at a time may have a dense one
                self._source = _source(checkpoint, config.format, matrices, files)
                replace_experts(model, family, self._source.format, config)
                sources.check(self._source, matrices, family, names, files)
            self._settle(checkpoint, names)
            if isinstance(self._source, sources.PackedSource):
                self._shape_dtype = self._source.shape_dtype(matrices[0], files)
        self._device = device_of(kwargs.get("device_map"), config)
        experts = list(experts_of(model, family).values())
        self._waiting = chosen(model, experts, config, self._device)
        # where dense weights are split among ranks, each rank has all of them before its experts need the room
        self._later = [module for module in experts if module not in self._waiting] if self._splits(model) else []
        for module in (*self._waiting, *self._later):
            module.empty()  # of what transformers would put on the GPU
        _hide_experts(model, family)
        self._replace_dense(model, family, kwargs.get("dtype"))
        return model

    def _splits(self, model: PreTrainedModel) -> bool:
        """Tell whether ranks each keep a part of dense weights, as they are."""
        assert self._checkpoint is not None
        return self.quantization_config.dense == KEEP and is_worth_it(model, self._checkpoint.family)

    def _settle(self, checkpoint: _Checkpoint, names: TensorNames) -> None:
        """Take over the settings that follow from the checkpoint."""
        config, ours = self.quantization_config, checkpoint.ours
        if ours is not None:
            config.format = ours.format
            if ours.dense != config.dense and ours.dense != KEEP:
                raise ModelError(f"dense = {config.dense!r}, but the checkpoint was saved with dense = {ours.dense!r}")
        elif checkpoint.settings is not None:
            config.on_disk = _named_in_memory(checkpoint.settings, names)
        # What transformers takes for quantized already; it then leaves dtypes alone, so only where that is needed.
        self.pre_quantized = ours is not None and ours.dense == NF4

    def _replace_dense(self, model: PreTrainedModel, family: Family, dtype: torch.dtype | None) -> None:
        if self.quantization_config.dense != NF4:
            return
        layers = family.moe_layers(model.config)
        # Of the others a 4-bit router or gate would choose otherwise, and has too few weights to be worth it.
        kept = [*map(family.router_of, layers), *(f"{family.layer(i)}.{gate}" for i in layers for gate in family.gates)]
        settings = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=NF4,
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype or torch.bfloat16,
            llm_int8_skip_modules=[family.head, *kept],
        )
        self._dense = Bnb4BitHfQuantizer(settings, pre_quantized=self.pre_quantized)
        self._dense._process_model_before_weight_loading(model, device_map=None)

    def update_weight_conversions(
        self, weight_conversions: list[WeightTransform], model: PreTrainedModel | None = None
    ) -> list[WeightTransform]:
        """Return all conversions but those that would merge experts."""
        assert self._checkpoint is not None
        kept = [entry for entry in weight_conversions if not _merges(entry, self._checkpoint.family)]
        return kept + (self._dense.get_weight_conversions() if self._dense else [])

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: object) -> bool:
        """Return whether bitsandbytes quantizes this parameter; experts are no parameters."""
        return self._dense is not None and self._dense.param_needs_quantization(model, param_name, **kwargs)

    def param_element_size(self, model: PreTrainedModel, param_name: str, param: Tensor) -> float:
        """Return the bytes of one element of a parameter."""
        sizes = self._dense or super()
        return sizes.param_element_size(model, param_name, param)

    def get_quantize_ops(self) -> ConversionOps:
        """Return what quantizes the parameters that need it."""
        assert self._dense is not None
        return self._dense.get_quantize_ops()

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_kwargs: object) -> PreTrainedModel:
        checkpoint, source, config = self._checkpoint, self._source, self.quantization_config
        assert checkpoint is not None
        experts = experts_of(model, checkpoint.family)
        if self._later:
            shard(model, checkpoint.family)
        for module in self._later:
            module.make_room(self._device)
        if self._waiting:
            Streaming(self._waiting, self._device, Path(config.disk) if config.disk else None)
        _check_placed(experts)
        if source is not None:
            with _naming(checkpoint.folder), TensorFiles(checkpoint.files) as files:
                sources.stream(source, self._matrices, experts, files)
        if self._dense is not None:
            from gtqlora.experts.dense import same_everywhere

            self._dense._process_model_after_weight_loading(model)
            same_everywhere(model)
        # Saved as the language model that it is, whose config.json does not go with a prefix that the checkpoint had.
        model.__dict__["_weight_conversions"] = []
        if source is not None:
            quantized_expert_counts(model, checkpoint.family)
        # DDP would send every buffer from the first rank to all others, in every step.
        held = {id(buffer) for module in experts.values() for buffer in module.buffers()}
        model.__dict__["_ddp_params_and_buffers_to_ignore"] = [n for n, b in model.named_buffers() if id(b) in held]
        return model

    # --- saving

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Return what `save_pretrained` writes: experts under the names from which they are read, the rest as it is.

        Raises:
            ModelError: the model holds part of the experts only, or no single config.json would describe it.
        """
        config = self.quantization_config
        if config.expert_range is not None:
            rank, n_ranks = config.expert_range
            raise ModelError(f"the model holds part {rank} of {n_ranks} of its experts; save one that holds all")
        if config.on_disk is not None and config.dense != KEEP:
            raise ModelError(f"{NATIVE} experts cannot be saved with dense = {config.dense!r}; use dense = {KEEP!r}")
        assert self._checkpoint is not None and isinstance(self._source, sources.Source)
        family = self._checkpoint.family
        names = TensorNames(model, replace(family, wrapper_prefix=None), wrapped=False)
        native = isinstance(self._source, sources.PackedSource)
        source = (sources.PackedSource if native else sources.PartsSource)(format=self._source.format)
        experts = experts_of(model, family)
        held = tuple(f"{family.experts_of(layer)}." for layer in experts)
        state = {names.whole(name): tensor for name, tensor in model.state_dict().items() if not name.startswith(held)}
        matrices = sources.matrices(family, model, names)
        state.update(sources.saved(source, matrices, experts, self._shape_dtype))
        return state, {}

    def is_serializable(self, *_args: object, **_kwargs: object) -> bool:
        """Return that such a model can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Return whether gradients pass: through the experts, not into them."""
        return True


def replace_experts(model: PreTrainedModel, family: Family, format: Format, config: FrozenExpertsConfig) -> None:
    """Put frozen experts, on meta, where the model has its own."""
    text: Any = model.config
    first, count = config.held(family.n_experts(text))
    for layer in moe_layers_of(model, family):
        path = family.experts_of(layer)
        frozen = FrozenExperts(
            format=format,
            n_experts=family.n_experts(text),
            hidden_size=text.hidden_size,
            intermediate_size=family.inner_size(text),
            act_fn=activation_of(model.get_submodule(path), path),
            config=text,
            first=first,
            count=count,
            device="meta",
        )
        frozen.kernel = config.kernel
        model.set_submodule(path, frozen)


def _hide_experts(model: PreTrainedModel, family: Family) -> None:
    """Keep the experts out of transformers' reports: `sources.check` has accounted for each of their tensors."""
    paths = "|".join(re.escape(family.experts_of(layer)) for layer in family.moe_layers(model.config))
    pattern = rf"(^|\.)({paths})\."
    for name in ("_keys_to_ignore_on_load_missing", "_keys_to_ignore_on_load_unexpected"):
        setattr(model, name, {*(getattr(model, name, None) or ()), pattern})


def _merges(entry: object, family: Family) -> bool:
    fused = [f".{family.experts}.{name}" for name in (GATE_UP, DOWN)]
    return isinstance(entry, WeightConverter) and any(
        name.endswith(target) for name in fused for target in entry.target_patterns
    )


def _check_placed(experts: dict[int, FrozenExperts]) -> None:
    for layer, module in experts.items():
        if any(buffer.is_meta for buffer in module.buffers()):
            raise ModelError(
                f"layer {layer}: a device_map cannot offload frozen experts; give one without a disk, and the settings "
                "memory and disk to FrozenExpertsConfig"
            )


def _named_in_memory(settings: dict[str, Any], names: TensorNames) -> dict[str, Any]:
    """Return settings that go with the names of a saved language model, which stands alone; patterns stay."""
    ignore = [entry if entry.startswith("re:") else names.module(entry) for entry in settings.get("ignore") or ()]
    return {**settings, "ignore": ignore}
