"""Layers of experts that wait on the host: the same bits, in every order of passes, from memory or disk."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from weakref import ref

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gtqlora.config import ModelConfig
from gtqlora.edits.frozen import assert_experts_frozen, frozen_state, sum_of_bits
from gtqlora.errors import ConfigError, ModelError, TrainingError
from gtqlora.experts import FORMATS, FrozenExperts, FrozenExpertsConfig, format_of, host_memory, load_model
from gtqlora.experts.host_memory import homes, in_file, in_memory
from gtqlora.experts.streaming import Streaming, bytes_of, waiting
from gtqlora.planning.cards import GIB
from gtqlora.planning.memory import on_host, spaced
from tests import models
from tests.helpers import same

CPU = torch.device("cpu")
EXPERTS, HIDDEN, INNER, TOP_K, TOKENS = 4, 256, 128, 2, 12
Results = tuple[Tensor, Tensor, Tensor]
DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


def layer(number: int, name: str = "int4-g128", device: str = "cpu", count: int | None = None) -> FrozenExperts:
    """Experts of random weights, the same for the same number."""
    made = FrozenExperts(
        format=format_of(name),
        n_experts=EXPERTS,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        act_fn=nn.SiLU(),
        first=0 if count is None else 1,
        count=count,
    )
    drawn = torch.Generator().manual_seed(number)
    for expert in range(made.first, made.first + made.count):
        for projection in ("gate", "up", "down"):
            made.quantize_into(expert, projection, 0.03 * torch.randn(made.sizes(projection), generator=drawn))
    return made.to(device)


def stack(layers: int, places: set[int], name: str = "int4-g128", device: str = "cpu", disk: Path | None = None) -> Any:
    """All layers, those at these places waiting on the host; and what makes them come."""
    made = [layer(number, name, device) for number in range(layers)]
    return made, Streaming([made[i] for i in sorted(places)], torch.device(device), disk)


def both_passes(layers: list[FrozenExperts], *, again: bool, device: str = "cpu", seed: int = 0) -> Results:
    """Output and gradients of a stack, of which each layer is computed again on the way back or is not."""
    drawn = torch.Generator().manual_seed(seed)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    hidden_TD = torch.randn(TOKENS, HIDDEN, generator=drawn).to(device, dtype).requires_grad_()
    weights_TK = torch.rand(TOKENS, TOP_K, generator=drawn).to(device).requires_grad_()
    out: Any = hidden_TD
    for experts in layers:
        index_TK = torch.rand(TOKENS, EXPERTS, generator=drawn).topk(TOP_K).indices.to(device)
        given = (out, index_TK, weights_TK)
        out = out + (checkpoint(experts, *given, use_reentrant=False) if again else experts(*given))
    out.float().pow(2).sum().backward()
    assert hidden_TD.grad is not None and weights_TK.grad is not None
    return out.detach(), hidden_TD.grad, weights_TK.grad


@torch.no_grad()
def forward_pass(layers: list[FrozenExperts], seed: int = 0) -> Tensor:
    drawn = torch.Generator().manual_seed(seed)
    out = torch.randn(TOKENS, HIDDEN, generator=drawn)
    for experts in layers:
        index_TK = torch.rand(TOKENS, EXPERTS, generator=drawn).topk(TOP_K).indices
        out = out + experts(out, index_TK, torch.full((TOKENS, TOP_K), 0.5))
    return out


def assert_equal(found: Results, expected: Results) -> None:
    for what, mine, theirs in zip(("output", "gradient", "weights' gradient"), found, expected, strict=True):
        assert theirs.isfinite().all() and torch.equal(mine, theirs), what


def loads(streaming: Streaming, run: Callable[[], object]) -> float:
    """How many layers come while something runs."""
    before = streaming.copied
    run()
    return (streaming.copied - before) / (streaming.size / len(streaming.homes))


# --- the same as on the GPU


@DEVICES
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("again", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("places", [{0, 1, 2, 3, 4, 5}, {1, 3, 5}, {2}], ids=str)
def test_bits_and_gradients_are_those_of_resident_layers(name: str, again: bool, places: set[int], device: str) -> None:
    resident = [layer(number, name, device) for number in range(6)]
    streamed, _ = stack(6, places, name, device)
    for seed in range(3):  # one step after another
        expected = both_passes(resident, again=again, device=device, seed=seed)
        assert_equal(both_passes(streamed, again=again, device=device, seed=seed), expected)


@DEVICES
def test_layers_come_from_files_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    monkeypatch.setattr(host_memory, "available", lambda: 3 * bytes_of(layer(0)))  # two of five, and a tenth to spare
    resident = [layer(number, device=device) for number in range(5)]
    streamed, streaming = stack(5, set(range(5)), device=device, disk=tmp_path)
    if device == "cuda":
        assert [home.is_pinned() for home in streaming.homes] == [False, True, False, True, False]
    for seed in range(2):
        expected = both_passes(resident, again=True, device=device, seed=seed)
        assert_equal(both_passes(streamed, again=True, device=device, seed=seed), expected)
    assert list(tmp_path.iterdir()) == []  # files have no name


def test_a_range_of_the_experts_streams_as_well() -> None:
    resident, streamed = ([layer(number, count=2) for number in range(4)] for _ in range(2))
    Streaming(streamed, CPU)
    assert_equal(both_passes(streamed, again=False), both_passes(resident, again=False))


def test_a_pass_forward_goes_round() -> None:
    resident = [layer(number) for number in range(5)]
    streamed, streaming = stack(5, set(range(5)))
    for seed in range(3):
        assert torch.equal(forward_pass(streamed, seed), forward_pass(resident, seed))
    # each layer once a pass, the first ones of the next already there
    assert loads(streaming, lambda: forward_pass(streamed)) == 5


# --- what comes when


def test_each_layer_comes_once_a_pass_and_both_at_the_turn_are_still_there() -> None:
    streamed, streaming = stack(6, set(range(6)))
    both_passes(streamed, again=False)
    for again in (False, True):
        # of six there and six back, two are there at each turn
        assert loads(streaming, lambda: both_passes(streamed, again=again)) == 2 * 6 - 4  # noqa: B023


def test_the_next_layer_is_there_before_it_is_asked_for() -> None:
    streamed, streaming = stack(6, set(range(6)))

    def held() -> set[int | None]:
        return {slot.layer for slot in streaming._slots}

    seen = []
    forth = [{0, 1}, {1, 2}, {2, 3}, {3, 4}, {4, 5}, {4, 5}]
    for _ in range(2):
        for number in range(6):
            streamed[number].fetch()
            seen.append(held())
            streamed[number].leave()
            seen.append(held())
        assert seen == [here for one, two in zip(forth, [*forth[1:], {4, 5}], strict=True) for here in (one, two)]
        seen.clear()
        for number in reversed(range(6)):
            streamed[number].fetch()  # computed again
            streamed[number].leave()
            streamed[number].fetch(back=True)
            seen.append(held())
            streamed[number].leave()
            seen.append(held())
        back = [{5, 4}, {4, 3}, {3, 2}, {2, 1}, {1, 0}, {1, 0}]
        assert seen == [here for one, two in zip(back, [*back[1:], {1, 0}], strict=True) for here in (one, two)]
        seen.clear()
    for number in range(6):
        streamed[number].fetch(returns=False)
        streamed[number].leave()
    assert held() == {0, 1}  # there was no way back: the first ones are next


def test_what_was_not_foreseen_comes_when_it_is_asked_for() -> None:
    resident = [layer(number) for number in range(6)]
    streamed, _ = stack(6, set(range(6)))
    for number in (3, 0, 5, 5, 1, 4, 2):
        some = [resident[number]], [streamed[number]]
        assert_equal(*(both_passes(one, again=False) for one in some))


def test_nothing_comes_of_a_model_that_is_there() -> None:
    made = layer(0)
    assert made.fetch() is made
    assert waiting([made]) == []


# --- what a layer that waits is to others


def test_weights_are_on_the_host_as_they_were(tmp_path: Path) -> None:
    made, other = layer(0), layer(0)
    expected = {name: buffer.clone() for name, buffer in made.named_buffers()}
    Streaming([made], CPU)
    assert waiting([made, other]) == [made]
    assert same(dict(made.state_dict()), expected)
    assert made.layout() == {name: (tuple(b.shape), b.dtype) for name, b in other.named_buffers()}
    assert all(torch.equal(mine, other.parts("down")[name]) for name, mine in made.parts("down").items())
    assert "on the host" in repr(made) and "on the host" not in repr(other)


def test_what_is_written_to_a_layer_shows_in_its_next_pass() -> None:
    streamed, _ = stack(4, set(range(4)))
    both_passes(streamed, again=False)
    streamed[0].quantize_into(1, "up", torch.full((INNER, HIDDEN), 0.01))
    streamed[3].load_state_dict(layer(9).state_dict())
    changed = [layer(0), layer(1), layer(2), layer(9)]
    changed[0].quantize_into(1, "up", torch.full((INNER, HIDDEN), 0.01))
    assert_equal(both_passes(streamed, again=False), both_passes(changed, again=False))


def test_another_order_of_the_weights_reaches_the_host_once() -> None:
    streamed, streaming = stack(4, set(range(4)))
    plain = {name: buffer.clone() for name, buffer in streamed[1].named_buffers()}
    before = frozen_state(nn.ModuleList(streamed))
    here = streamed[1].fetch()
    here.arrange(tiled=True)  # as a kernel does that wants it
    assert streamed[1].tiled and not streamed[0].tiled
    for name, buffer in streamed[1].named_buffers():
        assert torch.equal(buffer, here.get_buffer(name))
        assert not torch.equal(buffer, plain[name])
    streamed[3].fetch()
    streamed[0].fetch()
    assert streamed[1].fetch().tiled and loads(streaming, lambda: streamed[1].fetch().arrange(tiled=True)) == 0
    assert same(dict(streamed[1].state_dict()), plain)  # which has the plain order, as every file
    assert not streamed[1].fetch().tiled
    streamed[1].fetch().arrange(tiled=True)
    assert_experts_frozen(nn.ModuleList(streamed), before)  # they were put in order, and not written to
    assert_equal(both_passes(streamed, again=False), both_passes([layer(i) for i in range(4)], again=False))


def test_casts_and_moves_leave_the_weights_alone() -> None:
    streamed, streaming = stack(3, {0, 1, 2})
    bits = [sum_of_bits(buffer) for buffer in streamed[0].buffers()]
    nn.ModuleList(streamed).half().to("cpu").double()
    assert [sum_of_bits(buffer) for buffer in streamed[0].buffers()] == bits
    assert streaming.device == CPU
    assert_equal(both_passes(streamed, again=False), both_passes([layer(i) for i in range(3)], again=False))


@pytest.mark.gpu
def test_a_model_goes_from_one_device_to_the_other_and_its_waiting_layers_stay() -> None:
    streamed, _ = stack(4, {0, 1, 2, 3}, device="cuda")
    model = nn.ModuleList(streamed)
    on_gpu = both_passes(streamed, again=False, device="cuda")
    expected = both_passes([layer(i) for i in range(4)], again=False)
    assert_equal(both_passes(list(model.cpu()), again=False), expected)  # type: ignore[arg-type]
    assert_equal(both_passes(list(model.cuda()), again=False, device="cuda"), on_gpu)  # type: ignore[arg-type]
    assert all(buffer.device == CPU for buffer in model.buffers())


def test_nothing_is_left_of_layers_that_nobody_holds() -> None:
    streamed, streaming = stack(4, {0, 1, 2, 3})
    both_passes(streamed, again=True)
    gone = ref(streaming), ref(streamed[2])
    del streamed, streaming
    assert [one() for one in gone] == [None, None]


# --- streams


@pytest.mark.gpu
def test_no_slot_is_written_to_before_it_was_read() -> None:
    """Kernels wait behind a long computation, so that copies that did not wait for them would overtake them."""
    resident = [layer(number, device="cuda") for number in range(8)]
    streamed, _ = stack(8, set(range(8)), device="cuda")
    expected = both_passes(resident, again=True, device="cuda")
    both_passes(streamed, again=True, device="cuda")  # kernels are compiled, and weights in their order
    large = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    for stream in (torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.Stream()):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(20):
                torch.mm(large, large)
            found = both_passes(streamed, again=True, device="cuda")
        torch.cuda.synchronize()
        assert_equal(found, expected)


@pytest.mark.gpu
def test_a_fetch_does_not_wait_for_the_gpu() -> None:
    streamed, _ = stack(6, set(range(6)), device="cuda")
    both_passes(streamed, again=False, device="cuda")
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for number in (0, 1, 2, 3, 4, 5, 4, 3, 2, 1, 0):
            streamed[number].fetch()
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.gpu
def test_memory_is_locked_exactly_and_given_back() -> None:
    size = 2**26 + 4096
    found = in_memory(size, torch.device("cuda"))
    assert found.is_pinned() and len(found) == size
    view = found[-1:]
    assert view.is_pinned()
    del found, view
    again = in_memory(size, torch.device("cuda"))
    again.fill_(1)
    assert int(again.cuda().sum()) == size


# --- which layers wait


def test_as_few_wait_as_have_to() -> None:
    assert on_host(10, 100, 1000) == 0
    assert on_host(10, 100, 999) == 3  # seven stay, and two places are for those on their way
    assert on_host(10, 100, 200) == 10
    assert on_host(10, 100, 199) is None
    assert on_host(2, 100, 199) is None and on_host(1, 100, 99) is None
    assert spaced(6, 3) == {0, 2, 5} and spaced(6, 6) == set(range(6)) and spaced(6, 0) == set()
    assert spaced(7, 3) == {0, 3, 6} and spaced(60, 30) >= {0, 59} and len(spaced(60, 59)) == 59


@pytest.fixture
def checkpoint_of_six(tmp_path: Path) -> Path:
    return models.save_tiny(tmp_path / "m", "qwen3_moe", num_hidden_layers=7, moe_intermediate_size=32)


def _gib(layers: float, of: Any) -> float:
    return layers * bytes_of(next(iter(waiting_or_all(of)))) / GIB


def waiting_or_all(model: nn.Module) -> Iterator[FrozenExperts]:
    return (module for module in model.modules() if isinstance(module, FrozenExperts))


def test_a_model_loads_with_layers_on_the_host_and_is_the_same(checkpoint_of_six: Path, tmp_path: Path) -> None:
    _, whole = load_model(str(checkpoint_of_six), expert_format="nf4")
    _, model = load_model(str(checkpoint_of_six), expert_format="nf4", memory=_gib(4.5, whole))
    every = list(waiting_or_all(model))
    # two of six stay, two places are for those on their way
    assert [module.waiting is not None for module in every] == [True, False, True, True, False, True]
    assert same(dict(model.state_dict()), dict(whole.state_dict()))
    ids = models.some_tokens()
    with torch.no_grad():
        assert torch.equal(model(ids).logits, whole(ids).logits)
    model.save_pretrained(tmp_path / "again")
    assert "memory" not in (tmp_path / "again" / "config.json").read_text()
    _, again = load_model(str(tmp_path / "again"), expert_format="native", memory=_gib(2, whole))
    assert len(waiting(again.modules())) == 6
    assert same(dict(again.state_dict()), dict(whole.state_dict()))


def test_frozen_state_sees_what_is_written_to_a_layer_that_waits(checkpoint_of_six: Path) -> None:
    _, whole = load_model(str(checkpoint_of_six), expert_format="int4-g32")
    _, model = load_model(str(checkpoint_of_six), expert_format="int4-g32", memory=_gib(3, whole))
    before = frozen_state(model)
    assert {name: bits for name, (_, bits) in before.items()} == {
        name: bits for name, (_, bits) in frozen_state(whole).items()
    }
    with torch.no_grad():
        model(models.some_tokens())
    assert_experts_frozen(model, before)
    there = waiting(model.modules())[2].get_buffer("down_packed")
    there[1] ^= 1
    with pytest.raises(TrainingError, match=r"down_packed"):
        assert_experts_frozen(model, before)


@pytest.mark.gpu
def test_a_model_larger_than_its_share_of_the_gpu_is_never_whole_there(checkpoint_of_six: Path) -> None:
    _, whole = load_model(str(checkpoint_of_six), expert_format="int4-g32", device="cuda")
    _, model = load_model(str(checkpoint_of_six), expert_format="int4-g32", device="cuda", memory=_gib(2, whole))
    assert all(module.get_buffer("down_packed").is_pinned() for module in waiting(model.modules()))
    ids = models.some_tokens().cuda()
    with torch.no_grad():
        assert torch.equal(model(ids).logits, whole(ids).logits)
    assert same(dict(model.cpu().state_dict()), dict(whole.cpu().state_dict()))  # pyright: ignore[reportCallIssue]


# --- what cannot be


def test_too_little_memory_for_two_layers_says_how_much_it_takes(checkpoint_of_six: Path) -> None:
    with pytest.raises(ConfigError, match=r"expert_memory = 1e-06: 2 layers .* set expert_memory = 0\.01"):
        load_model(str(checkpoint_of_six), expert_format="nf4", memory=1e-6)


def test_experts_that_are_not_in_4_bits_do_not_wait(checkpoint_of_six: Path) -> None:
    with pytest.raises(ConfigError, match="set expert_format = 'nf4'"):
        ModelConfig(model=str(checkpoint_of_six), expert_memory=8)
    with pytest.raises(ConfigError, match="expert_format = 'bf16'"):
        load_model(str(checkpoint_of_six), memory=8)
    with pytest.raises(ConfigError, match="must be positive"):
        ModelConfig(model=str(checkpoint_of_six), expert_format="nf4", expert_memory=0)


def test_a_model_on_several_devices_does_not_stream(checkpoint_of_six: Path) -> None:
    from transformers import AutoModelForCausalLM

    settings = FrozenExpertsConfig(format="nf4", memory=1)
    with pytest.raises(ConfigError, match="one device"):
        AutoModelForCausalLM.from_pretrained(
            checkpoint_of_six, quantization_config=settings, device_map={"model": "cpu", "lm_head": "cpu"}
        )


def test_a_host_that_is_too_small_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "available", lambda: 1000)
    with pytest.raises(ModelError, match=r"3 layers .* raise expert_memory, set expert_disk = FOLDER"):
        homes([400, 400, 400], CPU, None)
    monkeypatch.undo()
    monkeypatch.setattr(host_memory, "available", lambda: 2**62)
    with pytest.raises(ModelError, match=r"could be had of the .* raise expert_memory"):
        homes([4096, 2**60], CPU, None)  # more than any machine maps


def test_what_is_free_is_known() -> None:
    assert 2**20 < host_memory.available() < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_a_folder_that_cannot_hold_them_says_so(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"expert_disk = .*nowhere"):
        in_file(4096, tmp_path / "nowhere")
    with pytest.raises(ModelError, match="cannot be kept there"):
        in_file(2**60, tmp_path)
