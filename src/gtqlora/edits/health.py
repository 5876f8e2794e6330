"""Router health in training: how evenly experts are used, and how far routing left the original model's.

Shape letters: B rows, S sequence, T = B*S tokens, E experts, L MoE layers, N kinds of rows.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gtqlora import routing
from gtqlora.capture import Recorder
from gtqlora.contrasts import ALL_KINDS
from gtqlora.families import Anatomy
from gtqlora.ranks import summed
from gtqlora.results.metrics import LOGITS_BY_GATES, LOGITS_BY_LORA


class Health:
    """Router health of one optimizer batch against the original model, however many parts and ranks it comes in.

    Counts of experts run over the whole training.
    """

    def __init__(self, anatomy: Anatomy, dead_budget: int) -> None:
        self.spec, self.dead_budget = anatomy.spec, dead_budget
        self.used_LE = torch.zeros(len(anatomy.moe), anatomy.spec.n_experts)
        self.tokens = 0
        self._clear()

    def _clear(self) -> None:
        self._now_LE, self._then_LE = torch.zeros_like(self.used_LE), torch.zeros_like(self.used_LE)
        self._by_kind_L3N = torch.zeros(len(self.used_LE), 3, len(ALL_KINDS))  # sums of overlap and KL, tokens
        self._moved_L2 = torch.zeros(len(self.used_LE), 2)  # sums of squares, by gates and by LoRA

    def add(self, edited: Recorder, original: Recorder, lora: Recorder, mask_BS: Tensor, kind_B: Tensor) -> None:
        """Count one part of the batch; all recorders saw the same tokens, `mask_BS` says which are real.

        Args:
            lora: of the model with its routers as they were, and LoRA.
        """
        real_T = mask_BS.flatten() > 0
        kind_T = kind_B[:, None].expand(mask_BS.shape).flatten()[real_T]
        kind_TN = nn.functional.one_hot(kind_T, len(ALL_KINDS)).float()
        for position, ours in edited.decisions.items():
            theirs = original.decisions[position]
            self._now_LE[position] += self._counts(ours.indices_TK[real_T]).cpu()
            self._then_LE[position] += self._counts(theirs.indices_TK[real_T]).cpu()
            same_T = routing.overlap_T(ours.indices_TK, theirs.indices_TK)[real_T].float()
            kl_T = routing.divergence_T(theirs.logits_TE, ours.logits_TE, self.spec, theirs.bias_E)[real_T].float()
            was_TE, between_TE, now_TE = (
                routing.log_scores_TE(seen.decisions[position].logits_TE[real_T], self.spec)
                for seen in (original, lora, edited)
            )
            moved = [(now_TE - between_TE).square().mean(-1).sum(), (between_TE - was_TE).square().mean(-1).sum()]
            self._moved_L2[position] += torch.stack(moved).cpu()
            self._by_kind_L3N[position] += (torch.stack([same_T, kl_T, torch.ones_like(kl_T)]) @ kind_TN).cpu()

    def figures(self) -> dict[str, float]:
        """Return means over MoE layers of what was added since the last call; empty if there was nothing."""
        for sums in (self._now_LE, self._then_LE, self._by_kind_L3N, self._moved_L2):
            sums.copy_(summed(sums))
        tokens_N = self._by_kind_L3N[0, 2]
        if not bool(tokens_N.any()):
            return {}
        now, then = ([routing.load(load_E) for load_E in load_LE] for load_LE in (self._now_LE, self._then_LE))
        layers = {"load_cv": [load.cv for load in now], "load_cv_original": [load.cv for load in then]}
        layers |= {"max_vio": [load.max_vio for load in now], "load_entropy": [load.entropy for load in now]}
        found = {f"health/{key}": sum(values) / len(values) for key, values in layers.items()}
        for index, kind in enumerate(ALL_KINDS):
            if tokens_N[index] > 0:
                means_L2 = self._by_kind_L3N[:, :2, index] / tokens_N[index]
                overlap, kl = means_L2.mean(0).tolist()
                found |= {f"health/overlap_{kind}": overlap, f"health/kl_{kind}": kl}
                found[f"health/overlap_{kind}_worst"] = float(means_L2[:, 0].min())
        by_gates, by_lora = (self._moved_L2 / tokens_N.sum()).mean(0).sqrt().tolist()
        found |= {LOGITS_BY_GATES: by_gates, LOGITS_BY_LORA: by_lora}
        self.used_LE += self._now_LE
        self.tokens += int(tokens_N.sum())
        self._clear()
        if self.tokens >= self.dead_budget:
            found["health/dead_experts"] = float((self.used_LE == 0).sum())
        return found

    def _counts(self, indices_TK: Tensor) -> Tensor:
        return torch.bincount(indices_TK.flatten(), minlength=self.spec.n_experts).float()
