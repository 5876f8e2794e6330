"""Written weights against the edit that was verified, a decoder layer at a time: never a whole model in memory.

Both are loaded as any checkpoint is, the one from the written folder, the other from the base with the edit on it. Each
layer's weights must be equal, bit for bit, and both models are run over the same tokens, one layer after the other.

Shape letters: T predicted tokens, B batch, S sequence, V vocabulary, D hidden.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from gtqlora.capture import Subject, by_length, left_padded, open_layer, positions
from gtqlora.certificate import Certificate
from gtqlora.contrasts import encode_prompt
from gtqlora.edits.edited import weights_merged, weights_projected
from gtqlora.errors import RunError
from gtqlora.experts.tensor_files import TensorFiles
from gtqlora.exports.job import Job
from gtqlora.families import language_model, load_tokenizer
from gtqlora.families.files import weight_files
from gtqlora.families.layers import Absent
from gtqlora.progress import track
from gtqlora.results.adapter import PROJECTION
from gtqlora.results.verdict import Outcome, of_kind

_PROBES = 16
"""Held-out prompts of a kind that both models are run on."""
_TOKENS = 16
"""First tokens of each recorded answer that are followed."""
_KL_ALLOWED = 1e-3
"""Nats per token. The weights are the same, bit for bit; kernels may add up in another order."""


@dataclass
class _Batch:
    """Some probes with their recorded answers, on their way through a model and another.

    Attributes:
        answers: of each probe, the tokens that follow its prompt.
        states: hidden states_BSD of the edited and the written model after the layers so far, and at last their
            logits_BSV where they predict the answers; None before the first layer.
    """

    ids_BS: Tensor
    mask_BS: Tensor
    answers: list[list[int]]
    states: tuple[Tensor | None, Tensor | None] = (None, None)

    @property
    def logits(self) -> Iterator[tuple[list[int], Tensor, Tensor]]:
        """Yield each probe's answer, and what both models predict for it and for what follows it: logits_TV."""
        edited_BSV, written_BSV = self.states
        assert edited_BSV is not None and written_BSV is not None
        for answer, edited_SV, written_SV in zip(self.answers, edited_BSV, written_BSV, strict=True):
            yield answer, edited_SV[-len(answer) - 1 :], written_SV[-len(answer) - 1 :]


def validate(staged: Path, job: Job) -> float:
    """Check that the written weights are the verified ones and compute what these do; return the largest divergence.

    The probes are harmful and benign held-out prompts with the answers that `verify` recorded. They are drawn by the
    edit's tensors, so that nobody orders them.

    Raises:
        RunError: a weight differs, or a distribution, or a greedy answer is not the recorded one while the edit's is.
    """
    config = job.certificate.config
    tokenizer = load_tokenizer(job.model, config.template)
    batches = _batches(job.certificate, tokenizer)
    folder, shards = weight_files(job.model)
    layers = range(job.anatomy.n_layers)
    with TensorFiles([folder / shard for shard in shards]) as files:
        for index in track(layers, "compare layers", len(layers)):
            edited = _edited_layer(job, files, tokenizer, index)
            written = open_layer(replace(config, model=str(staged)), job.anatomy, tokenizer, index)
            _check_equal(language_model(edited.model), language_model(written.model))
            for batch in batches:
                batch.states = _next(edited, batch, batch.states[0]), _next(written, batch, batch.states[1])
            # before the next ones are loaded, or four layers would be in memory
            del edited, written
    return _divergence([found for batch in batches for found in batch.logits])


def _batches(certificate: Certificate, tokenizer: PreTrainedTokenizerBase) -> list[_Batch]:
    probes = _probes(certificate)
    prompts = [encode_prompt(tokenizer, probe.prompt) for probe in probes]
    answers = [tokenizer.encode(probe.text_after, add_special_tokens=False)[:_TOKENS] for probe in probes]
    texts = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
    device, pad = torch.device(certificate.config.device), cast(int, tokenizer.pad_token_id)
    return [
        _Batch(*left_padded([texts[i] for i in chosen], pad, device), [answers[i] for i in chosen])
        for chosen in by_length(texts, certificate.config.batch_size)
    ]


def _probes(certificate: Certificate) -> list[Outcome]:
    draw, probes = random.Random(certificate.adapter.drawn_by), []
    for kind in ("harmful", "benign"):
        rows = of_kind(certificate.outcomes, kind)
        probes += draw.sample(rows, min(_PROBES, len(rows)))
    return probes


def _edited_layer(job: Job, files: TensorFiles, tokenizer: PreTrainedTokenizerBase, index: int) -> Subject:
    """Return a layer of the base with the edit merged, as `verify` had it."""
    certificate = job.certificate
    subject = open_layer(certificate.config, job.anatomy, tokenizer, index)
    if certificate.adapter.info.kind != PROJECTION:
        weights_merged(subject, job.model, files, job.names, job.edits).enable()
        return subject
    direction_D, keep = certificate.adapter.direction_D, certificate.adapter.info.norm_preserving
    weights_projected(subject, direction_D, norm_preserving=keep, as_written=True).enable()
    return subject


def _check_equal(edited: nn.Module, written: nn.Module) -> None:
    wanted = dict(_tensors(edited))
    for name, found in _tensors(written):
        # as bytes: 0 and -0 are equal numbers
        if not torch.equal(wanted[name].reshape(-1).view(torch.uint8), found.reshape(-1).view(torch.uint8)):
            raise RunError(
                f"{name}: the written weights are not those of the edit that was verified; nothing was written"
            )


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield parameters and buffers by name, as bytes: 0 and -0 are equal numbers."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        yield name, tensor.detach().reshape(-1).view(torch.uint8)


@torch.no_grad()
def _next(layer: Subject, batch: _Batch, states_BSD: Tensor | None) -> Tensor:
    """Return what a layer makes of the states before it; of the last layer, the logits in fp32 and on the CPU."""
    given = {"input_ids": batch.ids_BS} if states_BSD is None else {"inputs_embeds": states_BSD}
    given |= {"attention_mask": batch.mask_BS, "position_ids": positions(batch.mask_BS)}
    model, family = language_model(layer.model), layer.anatomy.family
    if isinstance(model.get_submodule(family.final_norm), Absent):
        return model.get_submodule(family.layers.rpartition(".")[0])(**given, use_cache=False).last_hidden_state
    # one more than the longest answer has: the token before each predicts it
    keep = 1 + max(map(len, batch.answers))
    return model(**given, use_cache=False, logits_to_keep=keep).logits.float().cpu()


def _divergence(probes: Sequence[tuple[list[int], Tensor, Tensor]]) -> float:
    """Return the largest KL(edited || written) of a token, in nats.

    Raises:
        RunError: it is too large, or answers differ.
    """
    kl, differing = 0.0, 0
    for answer, edited_TV, written_TV in probes:
        wanted_TV, found_TV = edited_TV.log_softmax(-1), written_TV.log_softmax(-1)
        each_T = (wanted_TV.exp() * (wanted_TV - found_TV)).sum(-1)
        kl = max(kl, float(each_T.nan_to_num(math.inf).max()))
        differing += _says(edited_TV, answer) and not _says(written_TV, answer)
    if differing or kl > _KL_ALLOWED:
        raise RunError(
            f"the written weights do not behave as the edit that was verified: {differing} of {len(probes)} recorded "
            f"answers differ, and a token's distribution by {kl:.3g} nats; nothing was written"
        )
    return kl


def _says(logits_TV: Tensor, answer: list[int]) -> bool:
    """Return whether these are the likeliest tokens."""
    return logits_TV.argmax(-1).tolist()[: len(answer)] == answer
