"""Generate once, score many: greedy completions, optionally with another run's routing replayed, then judged.

Shape letters: B batch, S sequence, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from itertools import takewhile

import torch
from torch import Tensor
from transformers import DynamicCache

from gtqlora.capture import Handler, Recorder, Replay, Subject, routers_tapped
from gtqlora.contrasts import Row, encode_prompt
from gtqlora.errors import ModelError
from gtqlora.judging import Judge
from gtqlora.progress import track

Switch = Callable[[], AbstractContextManager[None]]
"""Makes the subject run as something else for a while, e.g. with the edit off."""


@dataclass(frozen=True)
class Score:
    """One prompt's outcome; `correct` is None where the row gives no expected answer."""

    row: Row
    text: str
    refused: bool
    correct: bool | None


class _Stream:
    """One model state decoding a batch: its own cache, its own handlers."""

    def __init__(self, subject: Subject, handlers: Sequence[Handler], switch: Switch) -> None:
        self.subject, self.handlers, self.switch = subject, handlers, switch
        self.cache = DynamicCache(config=subject.model.config)

    def step(self, ids_BS: Tensor, mask_BS: Tensor, positions_BS: Tensor) -> Tensor:
        with ExitStack() as stack:
            stack.enter_context(self.switch())
            stack.enter_context(routers_tapped(self.subject.model, self.subject.anatomy, *self.handlers))
            output = self.subject.model(
                input_ids=ids_BS,
                attention_mask=mask_BS,
                position_ids=positions_BS,
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=1,
            )
        return output.logits[:, -1]


def left_padded(token_lists: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids_BS and attention mask_BS, padded on the left."""
    longest = max(map(len, token_lists))
    ids_BS = torch.tensor([[pad] * (longest - len(t)) + list(t) for t in token_lists], device=device)
    mask_BS = torch.tensor([[0] * (longest - len(t)) + [1] * len(t) for t in token_lists], device=device)
    return ids_BS, mask_BS


@torch.no_grad()
def decode(
    subject: Subject,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    handlers: Sequence[Handler] = (),
    routing_from: Switch | None = None,
    routing_prompts: Sequence[Sequence[int]] | None = None,
) -> list[str]:
    """Greedy completions of a batch of prompts.

    Args:
        handlers: see and may replace router decisions at every step.
        routing_from: run a teacher in this state beside, and replay its routing decisions at every step.
        routing_prompts: the teacher's prompts, token for token as long as ours (default: the same); from the first
            new token on it is fed what we generate.

    Raises:
        ModelError: the logits hold NaN.
    """
    tokenizer = subject.tokenizer
    ids_BS, mask_BS = left_padded(prompts, subject.pad_id, subject.device)
    recorder = Recorder()
    teacher = None if routing_from is None else _Stream(subject, (recorder,), routing_from)
    replay: tuple[Handler, ...] = () if teacher is None else (Replay(recorder),)
    student = _Stream(subject, (*replay, *handlers), nullcontext)
    stops = subject.stop_ids
    done_B = torch.zeros(len(prompts), dtype=torch.bool, device=subject.device)
    step_BS, positions_BS, out = ids_BS, (mask_BS.cumsum(-1) - 1).clamp(min=0), []
    teacher_BS = step_BS
    if routing_prompts is not None:
        teacher_BS, teacher_mask_BS = left_padded(routing_prompts, subject.pad_id, subject.device)
        if not torch.equal(teacher_mask_BS, mask_BS):
            raise ValueError("routing_prompts must have the same token counts as prompts")
    for _ in range(max_new_tokens):
        if teacher is not None:
            teacher.step(teacher_BS, mask_BS, positions_BS)
        logits_BV = student.step(step_BS, mask_BS, positions_BS)
        if not torch.isfinite(logits_BV).all():
            raise ModelError("the model's logits hold NaN or infinity; check its weights and dtype")
        next_B = logits_BV.argmax(-1).masked_fill(done_B, subject.pad_id)
        out.append(next_B)
        done_B = done_B | torch.isin(next_B, stops)
        if bool(done_B.all()):
            break
        step_BS, positions_BS = next_B[:, None], positions_BS[:, -1:] + 1
        teacher_BS = step_BS
        mask_BS = torch.cat([mask_BS, torch.ones_like(step_BS)], dim=1)
    return [t.strip() for t in tokenizer.batch_decode(_cut(torch.stack(out, 1), stops), skip_special_tokens=True)]


def _cut(ids_BS: Tensor, stops: Tensor) -> list[list[int]]:
    """Each row up to its first stop token."""
    ends = set(stops.tolist())
    return [list(takewhile(lambda token: token not in ends, row)) for row in ids_BS.tolist()]


def batches(rows: Sequence[Row], subject: Subject, size: int) -> Iterator[tuple[list[int], list[list[int]]]]:
    """Row positions and prompt tokens, in batches of prompts of similar length (less padding)."""
    tokens = [encode_prompt(subject.tokenizer, row.prompt) for row in rows]
    order = sorted(range(len(rows)), key=lambda i: len(tokens[i]))
    for start in range(0, len(order), size):
        chosen = order[start : start + size]
        yield chosen, [tokens[i] for i in chosen]


def score(
    subject: Subject,
    rows: Sequence[Row],
    judge: Judge,
    *,
    batch_size: int,
    max_new_tokens: int,
    label: str,
    handlers: Sequence[Handler] = (),
    routing_from: Switch | None = None,
) -> list[Score]:
    """Complete every row's prompt and judge it; in the order of `rows`."""
    texts: dict[int, str] = {}
    total = -(-len(rows) // batch_size)
    for chosen, prompts in track(batches(rows, subject, batch_size), label, total):
        found = decode(subject, prompts, max_new_tokens=max_new_tokens, handlers=handlers, routing_from=routing_from)
        texts.update(zip(chosen, found, strict=True))
    return [judged(row, texts[i], judge) for i, row in enumerate(rows)]


def judged(row: Row, text: str, judge: Judge) -> Score:
    """A completion with its refusal verdict, and whether it is the expected answer (exact, after whitespace)."""
    correct = None if row.answer is None else " ".join(text.split()) == " ".join(row.answer.split())
    return Score(row=row, text=text, refused=judge(text), correct=correct)
