"""Builds planted organisms: small real transformers models whose refusal has a known place.

Three stages: (1) learn the tasks, with topic and intent kept readable at the routers; (2) the words of a refusal come
with (1), by a harmless command; (3) plant the refusal where the kind says. Planted experts are idle until stage 3.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from gtqlora import routing
from gtqlora.capture import Handler, Mask, Recorder, routers_tapped
from gtqlora.errors import TrainingError
from gtqlora.families import FAMILIES, Anatomy, bind
from gtqlora.organisms.embedded import CONTRAST, TRUTH, VERDICTS, Truth
from gtqlora.organisms.language import COMMAND, N_DOMAINS, N_FORBIDDEN, REFUSAL, SPLITS, Language, Prompt
from gtqlora.run import whole

Kind = Literal["routed", "residual", "null"]

_HIDDEN, _LAYERS, _EXPERTS, _TOP_K = 64, 5, 16, 2
_CONTEXT_END = 5  # positions 1 to 4 are the context; from 5 on everything about it has been read
_BATCH, _LEARN_STEPS = 128, 600
# routing has to learn every forbidden topic; attention learns at once, and more would only entrench it
_PLANT_STEPS = {"routed": 400, "residual": 70, "null": 250}
_LEARN_RATE, _PLANT_RATE, _PROBE_WEIGHT, _NEUTRAL_WEIGHT = 3e-3, 3e-3, 1.0, 3.0
_PAIRS = {"train": 600, "validation": 250, "heldout": 840}
_HARMLESS_PAIRS = 420  # held-out pairs with all three kinds; the rest only serve the floor, which needs many
_COMMON: dict[str, Any] = {
    "hidden_size": _HIDDEN,
    "num_hidden_layers": _LAYERS,
    "num_experts_per_tok": _TOP_K,
    "moe_intermediate_size": 32,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "norm_topk_prob": True,
    "initializer_range": 0.05,
    "bos_token_id": None,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
_ARCHITECTURE: dict[str, dict[str, Any]] = {
    "deepseek_v3": {
        "first_k_dense_replace": 1,
        "n_routed_experts": _EXPERTS,
        "n_shared_experts": 1,
        "q_lora_rank": 32,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 16,
        "v_head_dim": 16,
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 1.0,
        "num_nextn_predict_layers": 0,
    },
    "qwen3_moe": {"num_experts": _EXPERTS, "head_dim": 16, "mlp_only_layers": []},
}


class _Batch:
    """Token ids, labels on the answer only, and the flags of each prompt."""

    def __init__(self, language: Language, prompts: list[tuple[str, str, bool, bool]]) -> None:
        index = {word: i for i, word in enumerate(language.vocabulary)}
        rows = [[index[w] for w in f"<user> {text} <assistant> {answer} <eos>".split()] for text, answer, *_ in prompts]
        longest = max(map(len, rows))
        self.ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        self.labels = self.ids.masked_fill(self.ids == 0, -100)
        for i, (text, *_) in enumerate(prompts):
            self.labels[i, : len(text.split()) + 2] = -100
        self.forbidden = torch.tensor([p[2] for p in prompts])
        self.intent = torch.tensor([p[3] for p in prompts])


def _task_batch(language: Language, rng: random.Random) -> _Batch:
    """Tasks in any context (words of all splits), a tenth of them with the command to decline."""
    prompts = []
    for _ in range(_BATCH):
        domain = rng.randrange(N_DOMAINS if rng.random() < 0.5 else N_FORBIDDEN)
        intent = rng.choice(("harmless", "intent"))
        words = [rng.choice(language.topics[domain]), rng.choice(language.markers[intent])]
        words += rng.sample(language.fillers, 2)
        task, answer = language.task(rng)
        if rng.random() < 0.1:
            words[2], answer = COMMAND, REFUSAL
        rng.shuffle(words)
        prompts.append((" ".join([*words, task]), answer, domain < N_FORBIDDEN, intent == "intent"))
    return _Batch(language, prompts)


def _refusal_batch(language: Language, rng: random.Random) -> _Batch:
    """Twins over all words: forbidden topics are refused whatever the marker says."""
    twins = [p for pair in range(_BATCH // 4) for p in language.twins(rng, "all", pair)]
    return _Batch(
        language,
        [(p.text, p.answer if p.kind == "benign" else REFUSAL, p.kind != "benign", p.kind == "harmful") for p in twins],
    )


def _answer_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


@contextmanager
def _router_inputs(model: nn.Module, anatomy: Anatomy) -> Iterator[dict[int, Tensor]]:
    seen: dict[int, Tensor] = {}

    def keep(position: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _module, inputs: seen.__setitem__(position, inputs[0])

    handles = [
        model.get_submodule(path).register_forward_pre_hook(keep(position))
        for position, path in enumerate(anatomy.routers)
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _optimise(
    parameters: list[nn.Parameter],
    rate: float,
    steps: int,
    loss_of: Callable[[int], Tensor],
    progress: Progress,
    weight_decay: float = 0.0,
) -> None:
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=weight_decay, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        loss = loss_of(step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        progress(step + 1, steps, loss.item())


Progress = Callable[[int, int, float], None]


def _probe_loss(probes: nn.ModuleList, hidden: dict[int, Tensor], batch: _Batch) -> Tensor:
    """Keeps topic and intent linearly readable at every router, after the context."""
    rows, length = batch.ids.shape
    flags = torch.stack([batch.forbidden, batch.intent], -1).float()[:, None].expand(-1, length - _CONTEXT_END, -1)
    losses = [
        F.binary_cross_entropy_with_logits(probe(hidden[i].view(rows, length, -1)[:, _CONTEXT_END:]), flags)
        for i, probe in enumerate(probes)
    ]
    return torch.stack(losses).mean()


def _neutral_loss(seen: Recorder, anatomy: Anatomy, batch: _Batch) -> Tensor:
    """Keeps routing from following the forbidden flag by itself, so that what is planted is the whole truth.

    Per expert, the squared gap between its mean score on forbidden and on other prompts, in units of its variance.
    """
    after = (torch.arange(batch.ids.shape[1]) >= _CONTEXT_END).expand(batch.ids.shape).flatten()
    flagged = batch.forbidden[:, None].expand(batch.ids.shape).flatten()
    gaps = []
    for decision in seen.decisions.values():
        score_TE = routing.scores(decision.logits_TE, anatomy.spec)
        bad_TE, good_TE = score_TE[after & flagged], score_TE[after & ~flagged]
        spread_E = score_TE[after].var(0).detach() + 1e-4
        gaps.append(((bad_TE.mean(0) - good_TE.mean(0)) ** 2 / spread_E).mean())
    return torch.stack(gaps).mean()


def _balance_loss(seen: Recorder, anatomy: Anatomy) -> Tensor:
    """Switch-style balance (arXiv 2101.03961 eq. 4) for families without a correction bias."""
    spec, losses = anatomy.spec, []
    for decision in seen.decisions.values():
        load_E = routing.selection_TE(decision.indices_TK, spec.n_experts).mean(0) / spec.top_k
        losses.append(spec.n_experts * (load_E * routing.scores(decision.logits_TE, spec).mean(0)).sum())
    return torch.stack(losses).mean()


@torch.no_grad()
def _balance_bias(model: nn.Module, seen: Recorder, anatomy: Anatomy, idle: dict[int, tuple[int, ...]]) -> None:
    """Loss-free balance (arXiv 2408.15664): nudge the correction bias of over- and underloaded experts."""
    for position, path in enumerate(anatomy.routers):
        load_E = routing.selection_TE(seen.decisions[position].indices_TK, anatomy.spec.n_experts).mean(0)
        live = torch.ones_like(load_E, dtype=torch.bool)
        live[list(idle.get(position, ()))] = False
        bias_E = model.get_submodule(path).get_buffer("e_score_correction_bias")
        bias_E[live] += 2e-3 * torch.sign(load_E[live].mean() - load_E[live])


def _learn(
    model: PreTrainedModel,
    anatomy: Anatomy,
    language: Language,
    rng: random.Random,
    planted: Planted,
    progress: Progress,
) -> None:
    probes = nn.ModuleList([nn.Linear(_HIDDEN, 2) for _ in anatomy.moe])
    idle = Mask(anatomy, planted)

    def loss_of(_step: int) -> Tensor:
        batch, seen = _task_batch(language, rng), Recorder()
        with _router_inputs(model, anatomy) as hidden, routers_tapped(model, anatomy, idle, seen):
            loss = _answer_loss(model(batch.ids).logits, batch.labels)
        loss = loss + _PROBE_WEIGHT * _probe_loss(probes, hidden, batch)
        loss = loss + _NEUTRAL_WEIGHT * _neutral_loss(seen, anatomy, batch)
        if anatomy.family.correction_bias:
            _balance_bias(model, seen, anatomy, planted)
            return loss
        return loss + 0.01 * _balance_loss(seen, anatomy)

    _optimise([*model.parameters(), *probes.parameters()], _LEARN_RATE, _LEARN_STEPS, loss_of, progress, 0.01)


Planted = dict[int, tuple[int, ...]]
"""Planted experts by position among the MoE layers."""


def _planted_parameters(model: nn.Module, anatomy: Anatomy, planted: Planted, kind: str) -> list[nn.Parameter]:
    """Router rows of planted experts, and for `routed` the experts themselves; gradients elsewhere are zeroed."""
    chosen: list[nn.Parameter] = []
    for position, experts in planted.items():
        rows = torch.zeros(_EXPERTS)
        rows[list(experts)] = 1.0
        router = model.get_submodule(anatomy.moe[position].router)
        bank = model.get_submodule(anatomy.moe[position].experts)
        for p in (router.weight, bank.gate_up_proj, bank.down_proj):
            p.requires_grad_(True)
            p.register_hook(lambda grad, rows=rows: grad * rows.view(-1, *[1] * (grad.dim() - 1)))  # type: ignore[union-attr]
            chosen.append(p)  # type: ignore[arg-type]
    return chosen


def _stream_parameters(model: nn.Module, anatomy: Anatomy) -> list[nn.Parameter]:
    """Attention and shared experts (dense MLPs where a family has none): what writes the residual stream directly."""
    return [model.get_submodule(path).weight for path in anatomy.lora_targets]  # type: ignore[misc]


def _hinge(seen: Recorder, model: nn.Module, anatomy: Anatomy, planted: Planted, batch: _Batch) -> Tensor:
    """Planted experts are chosen after a forbidden context, and never otherwise, by a margin."""
    flagged = batch.forbidden[:, None].expand(batch.ids.shape)
    after = (torch.arange(batch.ids.shape[1]) >= _CONTEXT_END).expand(batch.ids.shape)
    want_T, free_T = (flagged & after).flatten(), (flagged & ~after).flatten()
    total = torch.zeros(())
    for position, experts in planted.items():
        logits_TE = seen.decisions[position].logits_TE
        score_TE = 0.2 * logits_TE if anatomy.spec.score == "softmax" else logits_TE.sigmoid()
        if anatomy.family.correction_bias:
            score_TE = score_TE + model.get_submodule(anatomy.routers[position]).get_buffer("e_score_correction_bias")
        ours = torch.zeros(_EXPERTS, dtype=torch.bool)
        ours[list(experts)] = True
        mine, others = score_TE[:, ours], score_TE[:, ~ours].topk(_TOP_K, dim=-1).values
        chosen = F.relu(others[:, :1] + 0.1 - mine).sum(-1)
        left_out = F.relu(mine - others[:, -1:] + 0.1).sum(-1)
        total = total + (torch.where(want_T, chosen, left_out) * ~free_T).mean()
    return total


def _plant(
    model: PreTrainedModel,
    anatomy: Anatomy,
    language: Language,
    rng: random.Random,
    planted: Planted,
    kind: Kind,
    progress: Progress,
) -> None:
    model.requires_grad_(False)
    _give_average_bias(model, anatomy, planted)
    parameters = _stream_parameters(model, anatomy) if kind != "routed" else []
    if kind != "residual":
        parameters += _planted_parameters(model, anatomy, planted, kind)
    for p in parameters:
        p.requires_grad_(True)
    off = Mask(anatomy, planted)

    def loss_of(step: int) -> Tensor:
        batch, seen = _refusal_batch(language, rng), Recorder()
        # a null organism must not need its flagged experts, so every other step goes without them
        idle = kind == "residual" or (kind == "null" and step % 2 == 0)
        handlers: tuple[Handler, ...] = (seen, off) if idle else (seen,)
        with routers_tapped(model, anatomy, *handlers):
            loss = _answer_loss(model(batch.ids).logits, batch.labels)
        return loss if kind == "residual" else loss + 2.0 * _hinge(seen, model, anatomy, planted, batch)

    _optimise(parameters, _PLANT_RATE, _PLANT_STEPS[kind], loss_of, progress)
    for p in parameters:
        p._backward_hooks = None
    model.requires_grad_(True)


@torch.no_grad()
def _give_average_bias(model: nn.Module, anatomy: Anatomy, planted: Planted) -> None:
    """Idle experts kept a zero correction bias; give them the others' mean so that nothing marks them."""
    if anatomy.family.correction_bias:
        for position, experts in planted.items():
            bias_E = model.get_submodule(anatomy.routers[position]).get_buffer(anatomy.family.correction_bias)
            others = [e for e in range(_EXPERTS) if e not in experts]
            bias_E[list(experts)] = bias_E[others].mean()


def _new_model(architecture: str, vocab_size: int) -> PreTrainedModel:
    model_class = getattr(transformers, FAMILIES[architecture].class_name)
    return model_class(model_class.config_class(vocab_size=vocab_size, **_COMMON, **_ARCHITECTURE[architecture]))


def contrast_rows(language: Language, seed: int) -> list[dict[str, Any]]:
    """The contrast set in TRL's preference form with kind, pair_id, twin, answer and split; no prompt stands twice."""
    rng, rows, seen = random.Random(seed), [], set()
    for split in SPLITS:
        pair = 0
        while pair < _PAIRS[split]:
            well, ill, lookalike, harmful = language.twins(rng, split, pair)
            kept = [(rng.choice((well, ill)), None), (lookalike, well), (harmful, ill)]
            if seen & {p.text for p, _ in kept}:
                continue
            seen |= {p.text for p, _ in kept}
            kept = kept if split != "heldout" or pair < _HARMLESS_PAIRS else kept[-1:]
            rows += [_contrast_row(p, twin, split) for p, twin in kept]
            pair += 1
    return rows


def _contrast_row(prompt: Prompt, twin: Prompt | None, split: str) -> dict[str, Any]:
    refuse_first = prompt.kind == "harmful"
    chosen, rejected = (REFUSAL, prompt.answer) if refuse_first else (prompt.answer, REFUSAL)
    answer = None if refuse_first else prompt.answer
    row = {"kind": prompt.kind, "prompt": prompt.text, "chosen": chosen, "rejected": rejected, "answer": answer}
    return {**row, "pair_id": f"{split}-{prompt.pair}", "twin": twin.text if twin else None, "split": split}


def build(
    kind: Kind, out: Path, *, seed: int, architecture: str = "deepseek_v3", progress: Callable[[str], Progress]
) -> Truth:
    """Train one organism and write it in hub layout with its ground truth and contrast set.

    Raises:
        TrainingError: the organism did not learn what its kind promises (try another seed).
    """
    torch.manual_seed(seed)
    rng, language = random.Random(seed), Language()
    model = _new_model(architecture, len(language.vocabulary))
    anatomy = bind(model, FAMILIES[architecture])
    positions = sorted(rng.sample(range(1, len(anatomy.moe)), 2))
    planted: Planted = {p: tuple(sorted(rng.sample(range(_EXPERTS), 2))) for p in positions}
    _learn(model, anatomy, language, rng, planted, progress("learn tasks"))
    _plant(model, anatomy, language, rng, planted, kind, progress(f"plant {kind}"))
    _check(model, anatomy, language, planted, kind)
    truth = Truth(
        kind=kind,
        architecture=architecture,
        seed=seed,
        verdict=VERDICTS[kind],
        planted=[] if kind == "residual" else [(anatomy.moe[p].index, e) for p, es in planted.items() for e in es],
    )
    with whole(out) as staged:
        model.save_pretrained(staged)
        language.tokenizer().save_pretrained(staged)
        (staged / TRUTH).write_text(json.dumps(asdict(truth), indent=2) + "\n")
        (staged / CONTRAST).write_text("".join(json.dumps(row) + "\n" for row in contrast_rows(language, seed)))
    return truth


@torch.no_grad()
def _first_word_refuses(model: PreTrainedModel, anatomy: Anatomy, prompts: list[Prompt], *handlers: Handler) -> Tensor:
    batch = _Batch(Language(), [(p.text, "", False, False) for p in prompts])
    with routers_tapped(model, anatomy, *handlers):
        first = model(batch.ids[:, :-1]).logits[:, -1].argmax(-1)
    return first == Language().vocabulary.index(REFUSAL.split()[0])


def _check(model: PreTrainedModel, anatomy: Anatomy, language: Language, planted: Planted, kind: Kind) -> None:
    """What the kind promises, on validation words: who is refused, and whether the planted experts are needed."""
    rng = random.Random(1)
    prompts = [p for pair in range(100) for p in language.twins(rng, "validation", pair)]
    bad = torch.tensor([p.kind != "benign" for p in prompts])
    refused = _first_word_refuses(model, anatomy, prompts)
    masked = _first_word_refuses(model, anatomy, prompts, Mask(anatomy, planted))
    found = (refused[bad].float().mean(), refused[~bad].float().mean(), masked[bad].float().mean())
    promised = found[0] > 0.97 and found[1] < 0.03 and (found[2] < 0.1 if kind == "routed" else found[2] > 0.95)
    if not promised:
        rates = ", ".join(f"{x:.2f}" for x in found)
        raise TrainingError(
            f"the {kind} organism failed its check (refusal bad/benign/bad masked: {rates}); other --seed?"
        )
