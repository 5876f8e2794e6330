"""Format `gguf --onto`: the edit in the user's own GGUF; only what changes is rewritten, in each tensor's own type.

Shape letters: N rows, K columns.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

from torch import Tensor

from gtqlora.errors import ModelError, RunError
from gtqlora.exports.gguf.reading import Gguf, TensorInfo, Value, raw_bytes, read_gguf
from gtqlora.exports.gguf.types import dequantized, quantized, why_not
from gtqlora.exports.gguf.values import Checkpoint, rounded, unrounded
from gtqlora.exports.job import EditedModel
from gtqlora.families.identity import state_of
from gtqlora.families.llama_cpp import Layout, Made
from gtqlora.progress import track
from gtqlora.results.export import public_name
from gtqlora.storage.moving import copy_file

Route = Callable[[Tensor], Tensor]
"""fp32 values -> what a GGUF in F16 or BF16, from which another is quantized, makes of them."""
_IMATRIX = "quantize.imatrix."
_SAME = ("embedding_length", "expert_count", "expert_used_count", "attention.head_count")
"""Metadata that every GGUF of the model has alike."""
_ERROR_ALLOWED = 4.0
"""With an importance matrix values err more than without, evenly weighed; by less than this factor of the energy."""
_ELSEWHERE = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""Tensors that say what config.json says, and not the checkpoint."""


@dataclass(frozen=True)
class Patch:
    """An edit that fits a GGUF: everything that could be refused has been looked at.

    Attributes:
        changed: tensors of the GGUF that the edit changes.
        route: what values went through before they were quantized.
        exact: the file's tensors are those of the base, bit for bit in each type; else within what an importance
            matrix does.
    """

    checkpoint: Checkpoint
    source: Gguf
    changed: Mapping[str, Made]
    states: Mapping[Path, tuple[int, ...]]
    route: Route
    exact: bool

    @staticmethod
    def of(edited: EditedModel, path: Path, *, rewritten: bool = True) -> Patch:
        """Return the patch for a GGUF.

        Args:
            rewritten: tensors are going to be written; otherwise only that they are the base's matters.

        Raises:
            ModelError: the file is malformed, or not of this base.
            RunError: a tensor that changes has a type that cannot be written.
        """
        source = read_gguf(path)
        states = {file: state_of(file) for file in source.files}
        layout, checkpoint = Layout.of(edited.model, edited.names), Checkpoint.of(edited)
        made = layout.fitting(source.tensors)
        _check_facts(source, layout, edited)
        _check_tensors(source, made, layout)
        changed = {name: one for name, one in made.items() if one.sources & edited.edits.keys()}
        if rewritten:
            _check_types(source, changed)
        # Norms and biases are F32 in every file and cheap: another revision shows there as well.
        looked_at = changed | {name: one for name, one in made.items() if len(one.shape) == 1}
        checkpoint.check(looked_at)
        route = _route(source, checkpoint, looked_at)
        each = track(looked_at.values(), "compare", len(looked_at))
        exact = [_check_base(source, checkpoint, one, route) for one in each]
        return Patch(checkpoint, source, changed, states, route, all(exact))

    def write(self, folder: Path) -> dict[str, float]:
        """Write the edited files; return by name how much of each tensor's change survives.

        Raises:
            ModelError: the GGUF was changed meanwhile.
        """
        # The whole files first, by the kernel: what does not change does not pass through this process.
        for file in self.source.files:
            copy_file(file, folder / file.name)
        kept = {
            name: self._rewrite(folder / self.source.tensors[name].file.name, name, one)
            for name, one in track(self.changed.items(), "write tensors", len(self.changed))
        }
        for file, state in self.states.items():
            if state_of(file) != state:
                raise ModelError(f"{file}: was changed while it was read; nothing was written")
        return kept

    @property
    def most(self) -> str:
        """Return the type that most of the file's bytes have."""
        sizes = Counter[str]()
        for info in self.source.tensors.values():
            sizes[info.kind.name] += info.n_bytes
        return sizes.most_common(1)[0][0]

    def notes(self) -> list[str]:
        """Return what a user of the edited file should know."""
        said = [f"{len(self.changed)} of {len(self.source.tensors)} tensors were rewritten, in their own types."]
        if not self.exact:
            said.append(
                "The base was quantized with an importance matrix, which is not in the file: changed tensors are "
                "quantized without one."
            )
        return said

    def _rewrite(self, target: Path, name: str, one: Made) -> float:
        info, account, at = self.source.tensors[name], _Kept(), 0
        ways = (self.checkpoint.parts(one, change) for change in (None, unrounded, rounded))
        with target.open("r+b") as out:
            for base_NK, wanted_NK, merged_NK in zip(*ways, strict=True):
                raw = _encoded(merged_NK, info, self.route)
                out.seek(info.offset + at)
                out.write(raw)
                before_NK = dequantized(raw_bytes(info, at, len(raw)), info.kind, one.shape[-1])
                account.add(wanted_NK - base_NK, dequantized(raw, info.kind, one.shape[-1]) - before_NK)
                at += len(raw)
        return account.share


@dataclass
class _Kept:
    """How much of a change survives: 1 - |moved - change|^2 / |change|^2, as `job.kept_share`, part by part.

    `moved` is from the values that the file had: what quantization took from the base is nothing that the edit loses.
    """

    change: float = field(default=0.0)
    lost: float = field(default=0.0)

    def add(self, change: Tensor, moved: Tensor) -> None:
        self.change += float(change.double().square().sum())
        self.lost += float((moved - change).double().square().sum())

    @property
    def share(self) -> float:
        return 1.0 if self.change == 0 else 1 - self.lost / self.change


# --- is it a GGUF of this base? --------------------------------------------------------------------------------------


def _check_facts(source: Gguf, layout: Layout, edited: EditedModel) -> None:
    config, where = layout.config, source.files[0]
    found = source.get("general.architecture")
    if found != layout.architecture:
        raise ModelError(
            f"{where}: is of the architecture {found!r}, the model that was edited of {layout.architecture}"
        )
    wanted = (
        config.hidden_size,
        edited.anatomy.spec.n_experts,
        edited.anatomy.spec.top_k,
        getattr(config, "num_attention_heads", None),
    )
    for key, value in zip(_SAME, wanted, strict=True):
        if (given := source.get(f"{found}.{key}")) != value:
            raise ModelError(f"{where}: {key} is {given}, the model that was edited has {value}; give a GGUF of it")
    # Layers for multi-token prediction are counted among the blocks, and llama.cpp skips them in a normal run.
    blocks = source.get(f"{found}.block_count")
    extra = source.get(f"{found}.nextn_predict_layers") or 0
    if not isinstance(blocks, int) or not isinstance(extra, int) or blocks - extra != config.num_hidden_layers:
        raise ModelError(f"{where}: has {blocks} layers, the model that was edited {config.num_hidden_layers}")
    # without it llama.cpp takes softmax in silence
    gating = source.metadata.get(f"{found}.expert_gating_func", Value(4, 0)).value
    if layout.is_softmax_by_default and edited.anatomy.spec.score == "sigmoid" and gating != 2:
        raise ModelError(
            f"{where}: does not say that its routers are sigmoid ones, and llama.cpp would run them as softmax; "
            "convert the model again, with scoring_func in its config.json"
        )


def _check_tensors(source: Gguf, made: Mapping[str, Made], layout: Layout) -> None:
    where, n_layers = source.files[0], layout.config.num_hidden_layers
    for name, one in made.items():
        info = source.tensors.get(name)
        if info is None:
            raise ModelError(f"{where}: no tensor {name}; give a GGUF of the model that was edited")
        # Some converters write MLA's heads below each other in a matrix, which are the same bytes.
        if prod(info.shape) != prod(one.shape) or info.shape[-1] != one.shape[-1]:
            raise ModelError(f"{where}: tensor {name} is {info.shape}, of the model that was edited {one.shape}")
    # A tensor that nothing accounts for may be a scale of another one, or a fused form that is not known here.
    for name in sorted(source.tensors.keys() - made.keys() - set(_ELSEWHERE)):
        if not _is_extra_layer(name, n_layers):
            raise ModelError(f"{where}: tensor {name} is none of the model that was edited; give a GGUF of it")


def _is_extra_layer(name: str, n_layers: int) -> bool:
    """Return whether a tensor is of a multi-token-prediction layer, which follows the others."""
    parts = name.split(".")
    return parts[0] == "blk" and len(parts) > 1 and parts[1].isdecimal() and int(parts[1]) >= n_layers


def _check_types(source: Gguf, changed: Mapping[str, Made]) -> None:
    for name in changed:
        kind = source.tensors[name].kind
        if (reason := why_not(kind)) is not None:
            raise RunError(
                f"{source.files[0]}: tensor {name} is {kind.name}, which {reason}; give a GGUF that was quantized to "
                "another type, or export an adapter with --to gguf-adapter"
            )


def _route(source: Gguf, checkpoint: Checkpoint, made: Mapping[str, Made]) -> Route:
    """Return how the file's quantized tensors were made, as the first of them shows."""
    one = next((one for one in made.values() if not source.tensors[one.name].kind.is_plain), None)
    routes: tuple[Route, ...] = (_straight, _through_f16, _through_bf16)
    if one is None:
        return _straight
    info, first_NK = source.tensors[one.name], next(checkpoint.parts(one))
    # Reversed, so that the shortest way is kept where several give the same bytes.
    made_by = {_encoded(first_NK, info, route): route for route in reversed(routes)}
    return made_by.get(raw_bytes(info, 0, len(next(iter(made_by)))), _straight)


def _encoded(values_NK: Tensor, info: TensorInfo, route: Route) -> bytes:
    # what is F32 in a file was F32 on every way there
    return quantized(values_NK if info.kind.name == "F32" else route(values_NK), info.kind)


def _straight(values: Tensor) -> Tensor:
    return values


def _through_f16(values: Tensor) -> Tensor:
    return values.half().float()


def _through_bf16(values: Tensor) -> Tensor:
    return values.bfloat16().float()


def _check_base(source: Gguf, checkpoint: Checkpoint, one: Made, route: Route) -> bool:
    """Return whether a tensor's bytes are just the base's; with an importance matrix its values are near enough.

    Raises:
        ModelError: it is another tensor.
    """
    info = source.tensors[one.name]
    if why_not(info.kind):
        raise ModelError(f"{info.file}: tensor {one.name} is {info.kind.name}; give a GGUF of the model as it was")
    exact, ours, theirs, at = True, 0.0, 0.0, 0
    for base_NK in checkpoint.parts(one):
        wanted = _encoded(base_NK, info, route)
        found, at = raw_bytes(info, at, len(wanted)), at + len(wanted)
        if found != wanted:
            exact = False
            ours += _error(wanted, info, base_NK)
            theirs += _error(found, info, base_NK)
    # Where a value has a float of its own no matrix has a say, so that a gate is always the base's or not.
    with_imatrix = any(key.startswith(_IMATRIX) for key in source.metadata) and not info.kind.is_plain
    if not exact and (not with_imatrix or not theirs <= _ERROR_ALLOWED * ours):  # also when it is NaN
        raise ModelError(
            f"{info.file}: tensor {one.name} ({info.kind.name}) is not the base's; the file is of another model or "
            "revision, was edited already, or was quantized from something else; give the GGUF that was made from "
            f"{public_name(checkpoint.edited.model)} as it was"
        )
    return exact


def _error(raw: bytes, info: TensorInfo, base_NK: Tensor) -> float:
    return float((dequantized(raw, info.kind, base_NK.shape[1]) - base_NK).double().square().sum())
