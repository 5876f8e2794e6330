"""The module that stands where a transformers MoE layer has its fused experts, and holds them frozen in 4 bits.

Shape letters: T tokens, D hidden, E experts held here, K experts chosen per token, H hidden and I intermediate size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, Self, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, ExpertsInterface

from gtqlora.errors import ModelError
from gtqlora.experts import kernels, tiles
from gtqlora.experts.exchange import Exchange
from gtqlora.experts.kernels.rows import Room
from gtqlora.experts.layout import Device, Format, Fused, Layout, Parts, bits_of

Projection = Literal["gate", "up", "down"]

PLACE: dict[Projection, tuple[Fused, int]] = {"gate": ("gate_up", 0), "up": ("gate_up", 1), "down": ("down", 0)}
"""The fused projection that holds a matrix, and which of its matrices it is."""
_INTERFACE = ExpertsInterface.__module__
"""Where transformers keeps the gate that all experts have who do not bring their own."""
_MATRICES: dict[Fused, int] = {"gate_up": 2, "down": 1}


class Waiting(ABC):
    """How a layer's weights, which wait on the host, come to where it computes; see `streaming`."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Return where the layer computes."""

    @abstractmethod
    def fetch(self, *, back: bool, returns: bool) -> FrozenExperts:
        """Return the layer with its weights there."""

    @abstractmethod
    def leave(self) -> None:
        """Be told that a pass has read the weights."""

    @abstractmethod
    def touched(self) -> None:
        """Be told that somebody may write to the weights."""

    @abstractmethod
    def move(self, device: torch.device) -> None:
        """Compute elsewhere from now on."""


class FrozenExperts(nn.Module):
    """A contiguous range of one layer's routed experts, frozen in 4 bits.

    The weights are buffers `gate_up_<part>` with leading dims [E, 2] (gate, up) and `down_<part>` with [E, 1]. They
    hold nothing meaningful until `put`, `quantize_into` or a state dict fills them, and no cast changes them.

    Args:
        format: how the weights are laid out.
        n_experts: routed experts of the whole layer.
        act_fn: the activation of the gate.
        config: the model's config, kept for those who ask the experts for it.
        first, count: the experts held here, all after `first` by default; others contribute zero, unless `exchange`
            (an attribute) says which ranks hold them.

    Raises:
        ModelError: the format cannot hold matrices of these sizes, or the range is not inside the layer.
    """

    def __init__(
        self,
        *,
        format: Format,
        n_experts: int,
        hidden_size: int,
        intermediate_size: int,
        act_fn: nn.Module | Callable[[Tensor], Tensor],
        config: PreTrainedConfig | None = None,
        first: int = 0,
        count: int | None = None,
        device: Device = None,
    ) -> None:
        super().__init__()
        self.format = format
        self.n_experts, self.first = n_experts, first
        self.count = n_experts - first if count is None else count
        self.hidden_size, self.intermediate_size = hidden_size, intermediate_size
        self.act_fn, self.config = act_fn, config
        self.kernel = "auto"
        self.exchange: Exchange | None = None
        self.room: Room | None = None
        self.tiled = False
        self.waiting: Waiting | None = None
        if first < 0 or self.count < 1 or first + self.count > n_experts:
            raise ModelError(f"experts {first} to {first + self.count - 1} are not a range of {n_experts} experts")
        for fused, matrices in _MATRICES.items():
            empty = format.empty((self.count, matrices), *self.sizes(fused), device=device)
            for name, part in empty.items():
                self.register_buffer(f"{fused}_{name}", part)

    def empty(self) -> None:
        """Let go of the weights, until somebody gives it others."""
        for name in self.layout():
            delattr(self, name)

    def make_room(self, device: Device) -> None:
        """Take memory for weights again, which then have to come."""
        for name, (shape, dtype) in self.layout().items():
            self.register_buffer(name, torch.empty(shape, dtype=dtype, device=device))

    def sizes(self, projection: Fused | Projection) -> tuple[int, int]:
        """Return rows and columns of one matrix: gate and up are [I, H], down is [H, I]."""
        if projection == "down":
            return self.hidden_size, self.intermediate_size
        return self.intermediate_size, self.hidden_size

    def layout(self) -> Layout:
        """Return shape and dtype of every buffer."""
        return {
            f"{fused}_{name}": ((self.count, matrices, *shape), dtype)
            for fused, matrices in _MATRICES.items()
            for name, (shape, dtype) in self.format.layout(*self.sizes(fused)).items()
        }

    @property
    def device(self) -> torch.device:
        """Return where these experts compute; their weights may wait elsewhere."""
        return next(self.buffers()).device if self.waiting is None else self.waiting.device

    def fetch(self, *, back: bool = False, returns: bool = True) -> FrozenExperts:
        """Return these experts with their weights where they compute: a kernel asks before it reads any.

        Args:
            back: whether it is for the backward pass.
            returns: whether a backward pass follows on this forward pass.
        """
        return self if self.waiting is None else self.waiting.fetch(back=back, returns=returns)

    def leave(self) -> None:
        """Be told that a kernel's pass has read the weights that were fetched, so that others may take their place."""
        if self.waiting is not None:
            self.waiting.leave()

    def parts(self, projection: Fused, experts: slice = slice(None)) -> Parts:
        """Views of the parts with leading dims [E, 2] or [E, 1]; `experts` counts from the first one held here."""
        self.arrange(tiled=False)
        return self._parts(projection, experts)

    def _parts(self, projection: Fused, experts: slice | int = slice(None)) -> Parts:
        if self.waiting is not None:
            self.waiting.touched()
        names = self.format.layout(*self.sizes(projection))
        return {name: self.get_buffer(f"{projection}_{name}").data[experts] for name in names}

    @torch.no_grad()
    def arrange(self, *, tiled: bool) -> None:
        """Put the weights into the order of `tiles`, or back into the plain one; in place, an expert at a time."""
        # those that wait on the host go where they compute for it, which is faster by far
        if tiled == self.tiled:
            return
        reorder, device = tiles.tiled if tiled else tiles.untiled, self.device
        for fused in _MATRICES:
            for expert in range(self.count):
                mine = self._parts(fused, expert)
                there = {name: part.to(device) for name, part in mine.items()}
                for name, part in reorder(self.format, there, *self.sizes(fused)).items():
                    mine[name].copy_(part)
        self.tiled = tiled

    @torch.no_grad()
    def put(self, expert: int, projection: Projection, parts: Parts) -> None:
        """Write one matrix's parts.

        Args:
            expert: its number in the whole layer.

        Raises:
            ModelError: the expert is not held here, or the parts are not those of such a matrix.
        """
        fused, place = PLACE[projection]
        if not self.first <= expert < self.first + self.count:
            raise ModelError(f"expert {expert} is not among {self.first} to {self.first + self.count - 1} held here")
        with _named(expert, projection):
            lead = self.format.check_parts(parts, *self.sizes(projection))
            if lead:
                raise ModelError(f"{self.format.name}: parts of {list(lead)} matrices, expected one matrix")
        for name, mine in self.parts(fused).items():
            mine[expert - self.first, place].copy_(parts[name])

    def quantize_into(self, expert: int, projection: Projection, matrix: Tensor) -> None:
        """Quantize one matrix [I, H] or [H, I] and write its parts.

        Raises:
            ModelError: NaN or infinity in it, another shape, or the expert is not held here.
        """
        with _named(expert, projection):
            if tuple(matrix.shape) != self.sizes(projection):
                raise ModelError(f"a matrix {list(matrix.shape)}, expected {list(self.sizes(projection))}")
            parts = self.format.quantize(matrix)
        self.put(expert, projection, parts)

    def weights(self, projection: Fused, experts: slice, dtype: torch.dtype) -> Tensor:
        """Dequantized weights, fused as in transformers: gate_up [E, 2I, H] with gate's rows first, down [E, H, I]."""
        return self.format.dequantize(self.parts(projection, experts), *self.sizes(projection), dtype).flatten(1, 2)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Weighted sums_TD of the experts' outputs, for hidden_states_TD, top_k_index_TK and top_k_weights_TK."""
        experts_forward: Any = partial(ALL_EXPERTS_FUNCTIONS[kernels.PREFIX + self.kernel], self)
        if self.exchange is None:
            return experts_forward(hidden_states, top_k_index, top_k_weights)
        return self.exchange(experts_forward, hidden_states, top_k_index, top_k_weights)

    # Files hold the plain order, whatever order a kernel left the weights in.

    def _save_to_state_dict(self, *arguments: Any, **more: Any) -> None:
        self.arrange(tiled=False)
        super()._save_to_state_dict(*arguments, **more)

    def _load_from_state_dict(self, *arguments: Any, **more: Any) -> None:
        self.arrange(tiled=False)
        super()._load_from_state_dict(*arguments, **more)

    # No cast may touch the weights: `model.half()` would round scales, and turn codes into halves.

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        if self.waiting is not None:  # the weights stay, and what changes is where they are wanted
            self.waiting.move(fn(torch.empty(0, dtype=torch.uint8, device=self.device)).device)
            for child in self.children():
                child._apply(fn)
            return self
        return super()._apply(_moving_bits(fn), recurse)

    def extra_repr(self) -> str:
        """Return what `print` shows of the module, beside its name."""
        held = "" if self.count == self.n_experts else f", held={self.first}..{self.first + self.count - 1}"
        return (
            f"{self.format.name}, n_experts={self.n_experts}{held}, hidden_size={self.hidden_size}, "
            f"intermediate_size={self.intermediate_size}, kernel={self.kernel}{', on the host' if self.waiting else ''}"
        )


_LAYOUT = {"is_concatenated": True, "has_gate": True, "is_transposed": False, "has_bias": False}
"""What transformers says of experts such as `FrozenExperts` computes: down(act(gate x) * up x), gate's rows first."""


def activation_of(experts: nn.Module, where: str) -> Callable[[Tensor], Tensor]:
    """Return the activation of a layer's own experts, if `FrozenExperts` can take their place.

    Raises:
        ModelError: they compute something else; the message says what.
    """
    own = getattr(type(experts), "_apply_gate", None)
    objections = [
        *(
            f"{name} is {getattr(experts, name, None)}"
            for name, value in _LAYOUT.items()
            if not _says(experts, name, value)
        ),
        *(["a norm after each expert"] if getattr(experts, "has_post_expert_norm", False) else []),
        *([] if own is not None and own.__module__ == _INTERFACE else ["a gate of its own (_apply_gate)"]),
        *([] if callable(getattr(experts, "act_fn", None)) else ["no act_fn"]),
    ]
    if objections:
        raise ModelError(
            f"{where}: {type(experts).__name__} computes what experts in 4 bits do not ({', '.join(objections)}); load "
            "the model with its experts as they are (bf16)"
        )
    return cast(Callable[[Tensor], Tensor], experts.act_fn)


def _says(experts: nn.Module, name: str, value: bool) -> bool:
    return getattr(experts, name, None) is value


class _named:
    """Puts the matrix's name before a format's complaint."""

    def __init__(self, expert: int, projection: str) -> None:
        self.name = f"expert {expert} {projection}"

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if isinstance(error, ModelError):
            raise ModelError(f"{self.name}: {error}") from error


def _moving_bits(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """`fn` of `nn.Module._apply`, without its casts: those leave integers alone, so it is given the tensor's bits."""

    def move(tensor: Tensor) -> Tensor:
        bits = bits_of(tensor)
        moved = fn(bits)
        return moved.view(tensor.dtype) if moved.dtype == bits.dtype else tensor.to(moved.device)

    return move
