"""Layers of frozen experts that do not fit the GPU wait on the host, and come when it is their turn.

Two slots on the GPU hold a layer each: one computes while the next arrives, on a stream of its own. As soon as a pass
has read a layer, the one after the next takes its slot, in the direction in which layers are asked for. Of a layer
those matrices come first that are read first, and a kernel waits for what it reads. At the turn from forward to
backward the last two layers are still there, and at the end the first two are. Layers that wait lie evenly among those
that stay, under whose work copies hide.

A layer's buffers lie on the host for good, and what kernels are given is a visitor: experts of the same kind whose
buffers are views into a slot. So whoever looks at a model finds its bits where they were, and nothing is ever swapped.

On a CPU the same happens by plain copies.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import cycle, pairwise
from pathlib import Path
from threading import Lock
from weakref import ref

import torch
from torch import Tensor, nn

from gtqlora.experts.host_memory import homes, in_memory
from gtqlora.experts.module import FrozenExperts, Waiting
from gtqlora.experts.packed_memory import size_of, starts_of, tensor_at
from gtqlora.planning.memory import IN_FLIGHT

_PIECE = 2**26
"""Bytes of a file that are read at a time."""


@dataclass(frozen=True)
class _Part:
    """A buffer's place in the bytes of its layer."""

    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def end(self) -> int:
        return self.start + size_of(self.shape, self.dtype)

    def of(self, bytes: Tensor) -> Tensor:
        return tensor_at(bytes, self.start, self.shape, self.dtype)


def _parts_of(module: FrozenExperts) -> tuple[dict[str, _Part], int]:
    """Return the places of a layer's buffers, and the bytes that they take together."""
    layout = module.layout()
    *starts, end = starts_of(size_of(*part) for part in layout.values())
    return {name: _Part(start, *part) for start, (name, part) in zip(starts, layout.items(), strict=True)}, end


def _read_first(parts: dict[str, _Part]) -> int:
    """Return where gate and up end, which a layer's forward pass reads first: they come first."""
    return min(part.start for name, part in parts.items() if name.startswith("down"))


class _Visitor(FrozenExperts):
    """A layer's experts in a slot. Where a kernel wants another order of the weights, the host gets it, too: once."""

    def __init__(self, home: FrozenExperts, parts: dict[str, _Part], bytes: Tensor) -> None:
        super().__init__(
            format=home.format,
            n_experts=home.n_experts,
            hidden_size=home.hidden_size,
            intermediate_size=home.intermediate_size,
            act_fn=home.act_fn,
            config=home.config,
            first=home.first,
            count=home.count,
            device="meta",
        )
        self._places, self._home, self._at_home = parts, ref(home), bytes
        self._slot: _Slot | None = None

    def enter(self, slot: _Slot) -> None:
        """Take the weights that are in a slot, or on their way there."""
        if self._slot is not slot:
            self._slot = slot
            for name, part in self._places.items():
                self._buffers[name] = part.of(slot.bytes)

    def get_buffer(self, target: str) -> Tensor:
        """Return a part of the weights, for which this stream waits."""
        if self._slot is not None:
            self._slot.wait(self._places[target].end)
        return super().get_buffer(target)

    def arrange(self, *, tiled: bool) -> None:
        """Put the weights into this order here and at home."""
        home, slot = self._home(), self._slot
        if tiled == self.tiled or home is None or slot is None:
            return
        super().arrange(tiled=tiled)
        # in another order they are what they were, so this counts for no write to them
        self._at_home.data.copy_(slot.bytes[: len(self._at_home)])
        home.tiled = tiled


@dataclass(eq=False)
class _Slot:
    """Room for one layer; which one is in it, and which streams have read it since.

    Attributes:
        ready: up to which byte it is there when; the last event is for all of it.
        coming: what puts its copy on a stream.
    """

    bytes: Tensor
    layer: int | None = None
    ready: list[tuple[int, torch.cuda.Event]] = field(default_factory=list)
    coming: Future[None] | None = None
    readers: set[torch.cuda.Stream] = field(default_factory=set)

    def wait(self, end: int) -> None:
        """Let the stream that asks wait for the bytes up to one; the processor goes on."""
        for there, event in self.ready:
            if end <= there:
                torch.cuda.current_stream(self.bytes.device).wait_event(event)
                return

    def arrived(self) -> None:
        """Wait until its copy is on its stream; only a file's is put there by another thread."""
        if self.coming is not None:
            self.coming.result()
            self.coming = None


class _Files:
    """Copies what lies in files: through two page-locked pieces, by a thread that reads while the GPU copies."""

    def __init__(self, device: torch.device) -> None:
        self._pieces = [(in_memory(_PIECE, device), torch.cuda.Event()) for _ in range(2)]
        self._thread = ThreadPoolExecutor(1, "experts from disk")

    def copy(self, source: Tensor, target: Tensor, stream: torch.cuda.Stream, ready: torch.cuda.Event) -> Future[None]:
        """Begin a copy, which records `ready` in the end."""
        return self._thread.submit(self._copy, source, target, stream, ready)

    def _copy(self, source: Tensor, target: Tensor, stream: torch.cuda.Stream, ready: torch.cuda.Event) -> None:
        with torch.cuda.stream(stream):
            for some, there, (piece, done) in zip(
                source.split(_PIECE), target.split(_PIECE), cycle(self._pieces), strict=False
            ):
                done.synchronize()
                piece[: len(some)].copy_(some)
                there.copy_(piece[: len(some)], non_blocking=True)
                done.record(stream)
            ready.record(stream)


class Streaming:
    """The layers of one model that wait on the host, in the order of its passes.

    Attributes:
        device: where they compute.
        homes: the memory in which each waits.
        copied: bytes that went to the slots so far.

    Raises:
        ModelError: as `host_memory.homes`.
    """

    def __init__(self, layers: Sequence[FrozenExperts], device: torch.device, disk: Path | None = None) -> None:
        self.device, self.copied = device, 0
        self._parts, sizes = zip(*map(_parts_of, layers), strict=True)
        self.homes = homes(sizes, device, disk)
        self._layers = [ref(layer) for layer in layers]
        self._visitors: list[_Visitor | None] = [None] * len(layers)
        self._slots: list[_Slot] = []
        self._stream: torch.cuda.Stream | None = None
        self._files: _Files | None = None
        self._last, self._step, self._back, self._returns = 0, 1, False, True
        self._lock = Lock()
        for index, (layer, parts, home) in enumerate(zip(layers, self._parts, self.homes, strict=True)):
            for name, part in parts.items():
                mine, before = part.of(home), layer._buffers.get(name)
                if before is not None and not before.is_meta:
                    mine.copy_(before)
                layer.register_buffer(name, mine)
            layer.waiting = _Place(self, index)

    @property
    def size(self) -> int:
        """Bytes of all layers."""
        return sum(map(len, self.homes))

    def move(self, device: torch.device) -> None:
        """Compute elsewhere from now on."""
        if device != self.device:
            self.device, self._slots, self._files = device, [], None

    def touched(self, index: int) -> None:
        """Be told that a layer's weights at home may have changed."""
        for slot in self._slots:
            if slot.layer == index:
                slot.layer = None

    def fetch(self, index: int, *, back: bool, returns: bool) -> FrozenExperts:
        """Return a layer whose weights are there for the stream that asks, and let the next one come.

        Args:
            back: whether it is asked for by a backward pass.
            returns: whether the backward pass comes next, once the last layer is done, and not another forward pass.
        """
        with self._lock:
            self._open()
            self._step = self._direction(index, back)
            self._last, self._back, self._returns = index, back, returns
            mine = self._held(index) or self._load(index, self._slots[-1])
            # the other slot is last from here on: it is the one to fill
            self._slots.sort(key=lambda slot: slot is not mine)
            self._foresee(1, self._slots[-1])
            return self._visitor(index, self._asked(mine))

    def leave(self, index: int) -> None:
        """Be told that the pass which fetched a layer last has read it: the one after the next may take its slot."""
        with self._lock:
            mine = self._held(index)
            again = self._step < 0 and not self._back  # on the way back it was computed again, and is needed once more
            if mine is not None and index == self._last and not again:
                self._foresee(2, mine)

    def _direction(self, index: int, back: bool) -> int:
        if back:
            return -1
        if index == self._last:  # computed again, if not after its backward pass
            return 1 if self._back else self._step
        around = self._last == len(self._layers) - 1 and index == 0
        return 1 if index > self._last or around else -1

    def _foresee(self, steps: int, slot: _Slot) -> None:
        """Let the layer come that will be asked for after so many steps."""
        count, ahead = len(self._layers), self._last + steps * self._step
        if ahead >= count and not self._returns:
            ahead %= count
        if 0 <= ahead < count and self._held(ahead) is None:
            self._load(ahead, slot)

    @torch.inference_mode(False)
    def _open(self) -> None:
        if self._slots:
            return
        on_gpu = self.device.type == "cuda"
        self._stream = torch.cuda.Stream(self.device) if on_gpu else None
        self._visitors = [None] * len(self._layers)
        most, count = max(map(len, self.homes)), min(IN_FLIGHT, len(self._layers))
        rooms = [torch.empty(most, dtype=torch.uint8, device=self.device) for _ in range(count)]
        if self._stream is not None:
            # before the allocator's earlier owner of these bytes is done, nothing may be copied to them
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
            for room in rooms:
                room.record_stream(self._stream)
        self._slots = [_Slot(room) for room in rooms]  # all or none: one alone would be overwritten while it is read

    def _held(self, index: int) -> _Slot | None:
        return next((slot for slot in self._slots if slot.layer == index), None)

    def _load(self, index: int, slot: _Slot) -> _Slot:
        home = self.homes[index]
        target = slot.bytes[: len(home)]
        self.copied += len(home)
        slot.arrived()
        slot.layer = None
        if self._stream is None:
            target.copy_(home)
        else:
            self._send(home, target, slot, self._stream, _read_first(self._parts[index]))
        slot.layer = index
        return slot

    def _send(self, home: Tensor, target: Tensor, slot: _Slot, stream: torch.cuda.Stream, read_first: int) -> None:
        for reader in slot.readers:  # all that read what was there before is on these streams by now
            stream.wait_stream(reader)
        slot.readers.clear()
        slot.ready = []
        if home.is_pinned():
            with torch.cuda.stream(stream):
                for start, end in pairwise((0, read_first, len(home))):
                    target[start:end].copy_(home[start:end], non_blocking=True)
                    slot.ready.append((end, event := torch.cuda.Event()))
                    event.record(stream)
        else:
            self._files = self._files or _Files(self.device)
            slot.ready.append((len(home), event := torch.cuda.Event()))
            slot.coming = self._files.copy(home, target, stream, event)

    def _asked(self, slot: _Slot) -> _Slot:
        """Note who will read a slot."""
        if slot.ready:
            slot.arrived()
            slot.readers.add(torch.cuda.current_stream(self.device))
        return slot

    def _visitor(self, index: int, slot: _Slot) -> FrozenExperts:
        home = self._layers[index]()
        assert home is not None  # it asks
        visitor = self._visitors[index] = self._visitors[index] or _Visitor(home, self._parts[index], self.homes[index])
        visitor.enter(slot)
        visitor.tiled = home.tiled
        return visitor


@dataclass(frozen=True)
class _Place(Waiting):
    """A layer's number among those that wait."""

    streaming: Streaming
    index: int

    @property
    def device(self) -> torch.device:
        """Return where the layer computes."""
        return self.streaming.device

    def fetch(self, *, back: bool, returns: bool) -> FrozenExperts:
        """Return the layer where it computes."""
        return self.streaming.fetch(self.index, back=back, returns=returns)

    def leave(self) -> None:
        """Be told that a pass has read the weights."""
        self.streaming.leave(self.index)

    def touched(self) -> None:
        """Be told that the weights may have changed."""
        self.streaming.touched(self.index)

    def move(self, device: torch.device) -> None:
        """Compute elsewhere from now on."""
        self.streaming.move(device)


def waiting(modules: Iterable[nn.Module]) -> list[FrozenExperts]:
    """Return those layers of experts that wait on the host."""
    return [module for module in modules if isinstance(module, FrozenExperts) and module.waiting is not None]


def bytes_of(module: FrozenExperts) -> int:
    """Return the bytes that a layer takes, on its way and at rest."""
    return _parts_of(module)[1]
