"""Tapping, replaying and ablating routers, removing a direction, and decoding, on tiny models of every family."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gtqlora import routing
from gtqlora.capture import (
    Decision,
    Handler,
    Mask,
    Recorder,
    Replay,
    Subject,
    direction_removed,
    left_padded,
    open_subject,
    router_hooks,
)
from gtqlora.decoding import Change, SourceRun, decode
from gtqlora.errors import ModelError
from tests.models import CORE, FAMILIES, OTHERS, moe_layers, save_tiny, some_tokens

TOKENS, OTHER_TOKENS = some_tokens(0), some_tokens(1)
MASKED = {0: (1, 4, 5), 1: (0,)}
PROMPTS = [[7, 8, 9, 30, 31], [40, 41, 42], [50, 51, 52, 53, 54, 55, 56, 57], [60]]
NEW = 6


@pytest.fixture(scope="module", params=(*CORE, *OTHERS))
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return open_subject(str(save_tiny(tmp_path_factory.mktemp("tiny"), request.param)))


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def _logits(subject: Subject, tokens: Tensor, *handlers: Handler) -> Tensor:
    with router_hooks(subject.model, subject.anatomy, *handlers):
        return subject.model(input_ids=tokens, use_cache=False).logits


def _recorded(subject: Subject, tokens: Tensor, *handlers: Handler) -> Recorder:
    recorder = Recorder()
    _logits(subject, tokens, *handlers, recorder)
    return recorder


def _hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


# --- recording


def test_the_recorder_sees_what_the_experts_get(subject: Subject) -> None:
    """Hooks of the test's own on the experts and before the routers."""
    used: dict[int, tuple[Any, ...]] = {}
    hidden: dict[int, Tensor] = {}
    handles = []
    for position, layer in enumerate(subject.anatomy.moe):
        experts, router = subject.model.get_submodule(layer.experts), subject.model.get_submodule(layer.router)
        handles += [
            experts.register_forward_pre_hook(lambda _m, args, p=position: used.__setitem__(p, args)),
            router.register_forward_pre_hook(lambda _m, args, p=position: hidden.__setitem__(p, args[0])),
        ]
    seen = _recorded(subject, TOKENS)
    for handle in handles:
        handle.remove()
    assert len(seen.decisions) == len(subject.anatomy.moe) == len(moe_layers(subject.anatomy.family.model_type))
    for position, decision in seen.decisions.items():
        assert decision.indices_TK.shape == (TOKENS.numel(), 2)
        assert torch.equal(used[position][1], decision.indices_TK)
        assert torch.equal(used[position][2], decision.weights_TK)
        weight = subject.model.get_submodule(subject.anatomy.routers[position]).weight
        expected = hidden[position].reshape(TOKENS.numel(), -1) @ weight.T
        torch.testing.assert_close(decision.logits_TE, expected, rtol=1e-4, atol=1e-4)


def test_recording_changes_nothing(subject: Subject) -> None:
    plain = subject.model(input_ids=TOKENS, use_cache=False).logits
    assert torch.equal(_logits(subject, TOKENS, Recorder()), plain)
    assert torch.equal(_logits(subject, TOKENS), plain)


def test_rows_of_a_recording(subject: Subject) -> None:
    places_BS = torch.arange(TOKENS.numel()).view(TOKENS.shape)
    picked = _recorded(subject, TOKENS).at(places_BS[[2, 0]].flatten()).decisions
    alone = _recorded(subject, TOKENS[[2, 0]]).decisions
    for position, decision in picked.items():
        assert torch.equal(decision.indices_TK, alone[position].indices_TK)
        torch.testing.assert_close(decision.logits_TE, alone[position].logits_TE, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("family", "groups"),
    [*((family, {}) for family in FAMILIES), ("deepseek_v3", {"n_group": 4, "topk_group": 2})],
    ids=[*FAMILIES, "in groups"],
)
def test_our_routing_is_the_model_s_own(
    tmp_path: Path, family: str, dtype: torch.dtype, groups: dict[str, Any]
) -> None:
    """`choose` and `weigh` answer as the router does, so that a mask differs from it by the mask alone."""
    subject = open_subject(str(save_tiny(tmp_path, family, dtype=dtype, **groups)))
    spec, bias_name = subject.anatomy.spec, subject.anatomy.family.correction_bias
    for position, decision in _recorded(subject, TOKENS).decisions.items():
        router = subject.model.get_submodule(subject.anatomy.routers[position])
        ours = routing.choose(decision.logits_TE, spec, getattr(router, bias_name) if bias_name else None)
        assert torch.equal(ours.sort(-1).values, decision.indices_TK.sort(-1).values)
        weights = routing.weigh(decision.logits_TE, decision.indices_TK, spec).to(decision.weights_TK)
        torch.testing.assert_close(weights, decision.weights_TK, rtol=1e-6, atol=0)


# --- replaying


def test_replaying_its_own_routing_changes_no_bit(subject: Subject) -> None:
    recorder = Recorder()
    plain = _logits(subject, TOKENS, recorder)
    assert torch.equal(_logits(subject, TOKENS, Replay(recorder)), plain)


def test_replaying_another_prompt_s_routing(subject: Subject) -> None:
    theirs = _recorded(subject, OTHER_TOKENS)
    used = _recorded(subject, TOKENS, Replay(theirs))
    for position, decision in used.decisions.items():
        assert torch.equal(decision.indices_TK, theirs.decisions[position].indices_TK)
        assert torch.equal(decision.weights_TK, theirs.decisions[position].weights_TK)
    assert not torch.allclose(_logits(subject, TOKENS, Replay(theirs)), _logits(subject, TOKENS), atol=1e-2)


# --- ablating


def test_a_mask_routes_around_its_experts_only(subject: Subject) -> None:
    plain = _recorded(subject, TOKENS).decisions
    masked = _recorded(subject, TOKENS, Mask(subject.anatomy, MASKED)).decisions
    for position, experts in MASKED.items():
        assert torch.isin(plain[position].indices_TK, torch.tensor(experts)).any()
        assert not torch.isin(masked[position].indices_TK, torch.tensor(experts)).any()
        used = masked[position]
        torch.testing.assert_close(
            used.weights_TK, routing.weigh(used.logits_TE, used.indices_TK, subject.anatomy.spec), rtol=1e-6, atol=0
        )
        assert used.weights_TK.sum(-1).std() < 1e-4  # still normalized
    untouched = ~torch.isin(plain[0].indices_TK, torch.tensor(MASKED[0])).any(-1)
    assert untouched.any()
    for ours, theirs in zip(masked[0].indices_TK[untouched], plain[0].indices_TK[untouched], strict=True):
        assert set(ours.tolist()) == set(theirs.tolist())
    assert not torch.allclose(_logits(subject, TOKENS, Mask(subject.anatomy, MASKED)), _logits(subject, TOKENS))


@pytest.mark.parametrize("empty", [{}, {0: ()}])
def test_an_empty_mask_changes_no_bit(subject: Subject, empty: dict[int, tuple[int, ...]]) -> None:
    assert torch.equal(_logits(subject, TOKENS, Mask(subject.anatomy, empty)), _logits(subject, TOKENS))


def test_masking_unused_experts_leaves_the_choice(subject: Subject) -> None:
    one = TOKENS[:1, :1]
    chosen = _recorded(subject, one).decisions
    unused = {p: tuple(sorted(set(range(8)) - set(d.indices_TK.flatten().tolist()))[:5]) for p, d in chosen.items()}
    torch.testing.assert_close(_logits(subject, one, Mask(subject.anatomy, unused)), _logits(subject, one))


def test_a_masked_expert_does_not_matter(subject: Subject) -> None:
    """The same logits whatever its weights are."""
    mask, bank = Mask(subject.anatomy, MASKED), subject.model.get_submodule(subject.anatomy.moe[0].experts)
    before, kept = _logits(subject, TOKENS, mask), bank.down_proj.data.clone()
    bank.down_proj.data[1] = 1e3
    changed, unmasked = _logits(subject, TOKENS, mask), _logits(subject, TOKENS)
    bank.down_proj.data.copy_(kept)
    assert torch.equal(changed, before)
    assert (unmasked - _logits(subject, TOKENS)).abs().max() > 0.1


# --- hooks


def test_no_hook_stays_after_a_failure(subject: Subject) -> None:
    before, plain = _hooks(subject.model), _logits(subject, TOKENS)
    direction = torch.randn(32, generator=torch.Generator().manual_seed(0))

    def fail(_position: int, _module: nn.Module, _decision: Decision) -> None:
        raise RuntimeError("in a handler")

    def fail_in_body() -> None:
        with router_hooks(subject.model, subject.anatomy), direction_removed(subject.model, subject.anatomy, direction):
            assert _hooks(subject.model) > before
            raise RuntimeError("in the body")

    for action in (fail_in_body, lambda: _logits(subject, TOKENS, fail)):
        with pytest.raises(RuntimeError):
            action()
        assert _hooks(subject.model) == before
    assert torch.equal(_logits(subject, TOKENS), plain)


# --- removing a direction


def _projected(subject: Subject, direction: Tensor) -> nn.Module:
    """A copy whose every writer of the residual stream had its weight multiplied by (I - r r^T)."""
    model, r = copy.deepcopy(subject.model), direction / direction.norm()
    keep = torch.eye(len(r)) - torch.outer(r, r)
    embedding = model.get_submodule("model.embed_tokens")
    embedding.weight.data = embedding.weight.data @ keep
    for path in subject.anatomy.residual_writers:
        writer = model.get_submodule(path)
        writer.weight.data = keep @ writer.weight.data
    for layer in subject.anatomy.moe:
        bank = model.get_submodule(layer.experts)
        bank.down_proj.data = torch.einsum("dc,ech->edh", keep, bank.down_proj.data)
    return model


def test_removing_a_direction_equals_projecting_every_writer(subject: Subject) -> None:
    direction = 3 * torch.randn(32, generator=torch.Generator().manual_seed(3))
    plain = _logits(subject, TOKENS)
    assert not subject.model.config.tie_word_embeddings
    with direction_removed(subject.model, subject.anatomy, direction):
        removed = subject.model(input_ids=TOKENS, use_cache=False, output_hidden_states=True)
    expected = _projected(subject, direction)(input_ids=TOKENS, use_cache=False).logits
    torch.testing.assert_close(removed.logits, expected, rtol=1e-3, atol=1e-3)
    assert (removed.logits - plain).abs().max() > 0.1
    for state in removed.hidden_states[:-1]:  # the last one has passed the final norm, which scales each dimension
        assert (state @ (direction / direction.norm())).abs().max() < 1e-4
    assert torch.equal(_logits(subject, TOKENS), plain)


def test_a_direction_can_be_switched_again_and_again(subject: Subject) -> None:
    plain, removal = _logits(subject, TOKENS), direction_removed(subject.model, subject.anatomy, torch.ones(32))
    removal.enable()
    first = _logits(subject, TOKENS)
    removal.disable()
    assert torch.equal(_logits(subject, TOKENS), plain)
    removal.enable()
    assert torch.equal(_logits(subject, TOKENS), first)
    removal.disable()
    removal.disable()
    assert torch.equal(_logits(subject, TOKENS), plain)
    assert not torch.equal(first, plain)


# --- opening in bf16


@pytest.mark.parametrize("family", FAMILIES)
def test_routers_are_fp32_in_a_bf16_model(tmp_path: Path, family: str) -> None:
    subject = open_subject(str(save_tiny(tmp_path, family, dtype=torch.bfloat16)))
    routers = {f"{path}.weight" for path in subject.anatomy.routers}
    dtypes = {name: p.dtype for name, p in subject.model.named_parameters()}
    assert {dtypes[name] for name in routers} == {torch.float32}
    assert {dtype for name, dtype in dtypes.items() if name not in routers} == {torch.bfloat16}
    recorder = Recorder()
    logits = _logits(subject, TOKENS, recorder, Mask(subject.anatomy, MASKED))
    assert logits.dtype == torch.bfloat16
    assert torch.isfinite(logits).all()
    assert {d.logits_TE.dtype for d in recorder.decisions.values()} == {torch.float32}
    assert all(decode(subject, PROMPTS, max_new_tokens=3).texts)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_bf16_model_routes_as_its_fp32_twin_from_the_same_states(tmp_path: Path, family: str) -> None:
    """The fp32 router gives the logits of the stored weights, with no rounding of its own."""
    subject = open_subject(str(save_tiny(tmp_path, family, dtype=torch.bfloat16)))
    path, seen = subject.anatomy.routers[0], {}
    router: Any = subject.model.get_submodule(path)
    parent = subject.model.get_submodule(path.rpartition(".")[0])
    handle = parent.register_forward_pre_hook(lambda _m, args: seen.setdefault("hidden", args[0]))
    decision = _recorded(subject, TOKENS).decisions[0]
    handle.remove()
    expected = seen["hidden"].reshape(TOKENS.numel(), -1).float() @ router.weight.T
    torch.testing.assert_close(decision.logits_TE, expected, rtol=1e-5, atol=1e-5)


# --- decoding


def _generated(subject: Subject, prompts: list[list[int]]) -> list[str]:
    """transformers' own greedy completions."""
    tokenizer: Any = subject.tokenizer
    ids, mask = left_padded(prompts, tokenizer.pad_token_id, subject.device)
    out = subject.model.generate(input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=NEW)
    stops, texts = set(subject.stop_ids.tolist()), []
    for row in out[:, ids.shape[1] :].tolist():
        end = next((i for i, token in enumerate(row) if token in stops), len(row))
        texts.append(tokenizer.decode(row[:end], skip_special_tokens=True).strip())
    return texts


def _completed(subject: Subject, prompts: list[list[int]], **settings: Any) -> list[str]:
    return decode(subject, prompts, Change(**settings), max_new_tokens=NEW).texts


def test_decoding_equals_generate(subject: Subject) -> None:
    texts = _completed(subject, PROMPTS)
    assert texts == _generated(subject, PROMPTS)
    assert len(set(texts)) > 1
    assert all(len(text.split()) >= 3 for text in texts)


def test_decoding_does_not_depend_on_the_batch(subject: Subject) -> None:
    together = _completed(subject, PROMPTS)
    assert [_completed(subject, [prompt])[0] for prompt in PROMPTS] == together
    assert _completed(subject, PROMPTS[::-1])[::-1] == together
    assert _completed(subject, [*PROMPTS, [5] * 30])[:-1] == together


def test_each_row_stops_at_its_own_end(subject: Subject) -> None:
    """A token that one completion holds in the middle is made a stop token."""
    free = _completed(subject, PROMPTS)
    words = next(text.split() for text in free if len(set(text.split())) > 3)
    stop = words[3]
    settings = subject.model.generation_config
    before = settings.eos_token_id
    settings.eos_token_id = [1, subject.tokenizer.convert_tokens_to_ids(stop)]
    try:
        texts, generated = _completed(subject, PROMPTS), _generated(subject, PROMPTS)
        alone = [_completed(subject, [prompt])[0] for prompt in PROMPTS]
    finally:
        settings.eos_token_id = before
    expected = [" ".join(text.split()[: text.split().index(stop)]) if stop in text.split() else text for text in free]
    assert texts == expected == generated == alone
    assert texts != free


def _replaying(prompts: list[list[int]] | None = None, switch: Any = nullcontext) -> dict[str, Any]:
    """Decode with the routing of a source_run."""
    recorder = Recorder()
    return {
        "handlers": [Replay(recorder)],
        "source_runs": [SourceRun(handlers=[recorder], prompts=prompts, switch=switch)],
    }


def test_decoding_with_its_own_routing_replayed(subject: Subject) -> None:
    plain = _completed(subject, PROMPTS)
    assert _completed(subject, PROMPTS, **_replaying()) == plain
    assert _completed(subject, PROMPTS, **_replaying(PROMPTS)) == plain


def test_decoding_with_another_prompt_s_routing(subject: Subject) -> None:
    """At the first token it is what replaying the other prompt's routing by hand gives."""
    others = [[t + 20 for t in prompt] for prompt in PROMPTS]
    texts = _completed(subject, PROMPTS, **_replaying(others))
    assert texts != _completed(subject, PROMPTS)
    for prompt, other, text in zip(PROMPTS, others, texts, strict=True):
        logits = _logits(subject, torch.tensor([prompt]), Replay(_recorded(subject, torch.tensor([other]))))
        first = int(logits[0, -1].argmax())
        assert first in subject.tokenizer.all_special_ids or text.split()[0] == subject.tokenizer.decode([first])


def test_a_teacher_s_prompts_must_match_token_for_token(subject: Subject) -> None:
    with pytest.raises(ValueError, match="same token counts"):
        _completed(subject, PROMPTS, **_replaying(PROMPTS[::-1]))


def test_handlers_act_while_decoding(subject: Subject) -> None:
    mask = Mask(subject.anatomy, MASKED)
    seen: list[Tensor] = []

    def keep(position: int, _module: nn.Module, decision: Decision) -> None:
        if position == 0:
            seen.append(decision.indices_TK)

    texts = _completed(subject, PROMPTS, handlers=[mask, keep])
    assert len(seen) == NEW  # the prompt, then one token at a time
    assert [len(indices) for indices in seen] == [len(PROMPTS) * 8] + [len(PROMPTS)] * (NEW - 1)
    assert not torch.isin(torch.cat(seen), torch.tensor(MASKED[0])).any()
    assert texts != _completed(subject, PROMPTS)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_is_named_not_decoded(subject: Subject, bad: float) -> None:
    head: Any = subject.model.get_submodule("lm_head")
    kept = head.weight.data.clone()
    head.weight.data[3] = bad
    try:
        with pytest.raises(ModelError, match="NaN or infinity"):
            _completed(subject, PROMPTS)
    finally:
        head.weight.data.copy_(kept)


def test_what_a_switch_does_ends_with_every_step(subject: Subject) -> None:
    """The source_run may run in another state than the student: here with a direction removed."""
    removal: Callable[[], Any] = lambda: direction_removed(subject.model, subject.anatomy, torch.ones(32))  # noqa: E731
    before = _hooks(subject.model)
    replayed = _completed(subject, PROMPTS, **_replaying(switch=removal))
    with removal():
        removed = _completed(subject, PROMPTS)
    assert _hooks(subject.model) == before
    assert len({tuple(replayed), tuple(removed), tuple(_completed(subject, PROMPTS))}) == 3
