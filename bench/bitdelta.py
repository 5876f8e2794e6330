"""One bit a weight of a full fine-tune: what is lost under several scales, how large it is, and which refusals go.

    python bench/bitdelta.py                              # the embedded organism, matrices 32 to 128 wide, 3 minutes
    python bench/bitdelta.py --base FOLDER --json OUT     # another one, such as a wide organism (256 and more)

The fine-tune trains every parameter on the pairs' preferred answers. "reference" is BitDelta's: one scale a tensor, a
zero counted as +; "row": one for every row; "row x column": what `bitdelta compress` does; "distilled": the same with
row scales fitted on benign training prompts (`--distill`). Everything but matrices is whole in all of them. Energies
are shares of the squared difference; rates are over the held-out prompts, greedy.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F
from torch import Tensor

from gtqlora import contrasts
from gtqlora.bitdelta.checkpoints import Change, Checkpoints, checkpoints
from gtqlora.bitdelta.distil import Distilled
from gtqlora.bitdelta.onebit import SCALE_DTYPE, decode, encode
from gtqlora.bitdelta.placing import place
from gtqlora.capture import Subject, open_subject
from gtqlora.edits.merging import Edit, Whole
from gtqlora.families.files import small_names
from gtqlora.judging.judge import judge_of
from gtqlora.organisms import embedded
from gtqlora.run import versions
from gtqlora.scoring import Runner

Scheme = Callable[[Change, Tensor], tuple[Tensor, int]]
"""A difference -> what is left of it, and its bytes."""

TEXTS, BATCH = 128, 64


def fine_tuned(base: Path, out: Path, rows: contrasts.Contrast, steps: int, rate: float) -> None:
    """Train every parameter of a model on the preferred answers of the training rows."""
    subject = open_subject(str(base))
    model, train = subject.model.float().train(), rows.split("train").rows
    texts = [contrasts.encode_row(subject.tokenizer, row) for row in train]
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    draw = torch.Generator().manual_seed(0)
    for _ in range(steps):
        chosen = [texts[i] for i in torch.randint(len(texts), (32,), generator=draw).tolist()]
        length = max(len(prompt) + len(answer) for prompt, answer in chosen)
        ids_BS, labels_BS = torch.full((32, length), subject.pad_id), torch.full((32, length), -100)
        for row, (prompt, answer) in enumerate(chosen):
            ids_BS[row, : len(prompt) + len(answer)] = torch.tensor([*prompt, *answer])
            labels_BS[row, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
        logits_BSV = model(input_ids=ids_BS).logits[:, :-1]
        loss = F.cross_entropy(logits_BSV.flatten(0, 1), labels_BS[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval().save_pretrained(out)
    for name in small_names(base):
        shutil.copyfile(base / name, out / name)


# --- schemes ---------------------------------------------------------------------------------------------------------


def signed(delta: Tensor) -> Tensor:
    return torch.where(delta >= 0, 1.0, -1.0)


def bits_of(delta: Tensor) -> int:
    return delta.numel() // delta.shape[-1] * -(-delta.shape[-1] // 8)


def reference(_change: Change, delta: Tensor) -> tuple[Tensor, int]:
    """Return BitDelta's own form: one scale a tensor, the mean size."""
    return signed(delta) * delta.abs().mean(), bits_of(delta) + SCALE_DTYPE.itemsize


def by_row(_change: Change, delta: Tensor) -> tuple[Tensor, int]:
    """Return one scale for every row."""
    scales = delta.abs().mean(-1, keepdim=True)
    return signed(delta) * scales, bits_of(delta) + SCALE_DTYPE.itemsize * scales.numel()


def by_row_and_column(_change: Change, delta: Tensor) -> tuple[Tensor, int]:
    """Return what `bitdelta compress` makes of it."""
    found = encode(delta)
    return decode(found), found.nbytes


def distilled(both: Checkpoints, tuned: Path, rows: contrasts.Contrast) -> Scheme:
    """Return what `bitdelta compress --distill` makes of it."""
    subject = open_subject(str(tuned))
    benign = [row for row in rows.split("train").rows if row.kind == "benign"][:TEXTS]
    texts = [[*prompt, *chosen] for prompt, chosen in (contrasts.encode_row(subject.tokenizer, row) for row in benign)]
    encoder = Distilled(subject, both.names, texts, BATCH)

    def scheme(change: Change, delta: Tensor) -> tuple[Tensor, int]:
        found = encoder.encode(change, delta)
        return decode(found), found.nbytes

    return scheme


# --- measuring -------------------------------------------------------------------------------------------------------


def part(both: Checkpoints, change: Change) -> str:
    """Return what kind of matrix it is."""
    path = both.names.places[change.name].name
    if path.startswith(tuple(f"{layer.experts}." for layer in both.anatomy.moe)):
        return "routed experts"
    targets = {"attention": both.anatomy.attention, "shared experts": both.anatomy.shared}
    module = path.removesuffix(".weight")
    found = next((name for name, paths in targets.items() if module in paths), None)
    return found or ("dense" if module.startswith(both.anatomy.layers) else "embeddings")


def measured(both: Checkpoints, base: Path, scheme: Scheme, asked: Callable[[Subject], dict[str, float]]) -> dict:
    energy, missed, held = defaultdict[str, float](float), defaultdict[str, float](float), [0, 0]
    edits: dict[str, Edit] = {}
    for change in both.changes:
        if not change.one_bit:
            edits[change.name] = Whole(change.read().after)
            continue
        pair, kind = change.read(), part(both, change)
        delta = pair.delta
        found, nbytes = scheme(change, delta)
        edits[change.name] = Whole((pair.before.float() + found).to(pair.before.dtype))
        energy[kind] += float(delta.square().sum())
        missed[kind] += float((delta - found).square().sum())
        held[0], held[1] = held[0] + nbytes, held[1] + 2 * delta.numel()
    subject = open_subject(str(base))
    place(subject, both.names, both.base, edits)
    return {
        "energy_lost": sum(missed.values()) / sum(energy.values()),
        "energy_lost_by_part": {kind: missed[kind] / energy[kind] for kind in energy},
        "share_of_energy": {kind: energy[kind] / sum(energy.values()) for kind in energy},
        "times_smaller": held[1] / held[0],
        **asked(subject),
    }


def asking(rows: contrasts.Contrast, judge: str, tuned: Path) -> Callable[[Subject], dict[str, float]]:
    """Return what asks a model the held-out prompts; KL(fine-tune || model) is of the first token of an answer."""
    held, judges = rows.split("heldout").rows, judge_of(judge)

    def first(runner: Runner) -> Tensor:
        prompts = runner.encoded(held)
        found = {
            i: row for batch in runner.logits(prompts) for i, row in zip(batch.chosen, batch.values_BSV, strict=True)
        }
        return torch.stack([found[i][-1] for i in range(len(held))]).log_softmax(-1)

    def runner_of(subject: Subject) -> Runner:
        return Runner(model=subject, judge=judges, batch_size=BATCH, max_new_tokens=6)

    wanted_RV = first(runner_of(open_subject(str(tuned))))

    def ask(subject: Subject) -> dict[str, float]:
        runner = runner_of(subject)
        answers, kl_R = (
            runner.answers(held, label=None),
            F.kl_div(first(runner), wanted_RV, log_target=True, reduction="none").sum(-1),
        )
        found: dict[str, float] = {}
        for kind in contrasts.KINDS:
            mine = [answer for row, answer in zip(held, answers, strict=True) if row.kind == kind]
            found[f"{kind}_kl"] = float(kl_R[[row.kind == kind for row in held]].mean())
            found[f"{kind}_refused"] = sum(answer.refused for answer in mine) / len(mine)
            known = [answer.correct for answer in mine if answer.correct is not None]
            if known:
                found[f"{kind}_accuracy"] = sum(known) / len(known)
        return found

    return ask


def sizes() -> dict[str, float]:
    """Return how many times smaller than bf16 matrices of real models are, scales included."""
    found = {}
    for rows, columns in ((64, 64), (256, 256), (768, 2048), (2048, 7168), (4096, 4096)):
        nbytes = rows * -(-columns // 8) + SCALE_DTYPE.itemsize * (rows + columns)
        found[f"{rows}x{columns}"] = 2 * rows * columns / nbytes
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, default=None, help="a model that speaks the organisms' language")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--rate", type=float, default=3e-4)
    parser.add_argument("--json", type=Path, default=None)
    given = parser.parse_args()
    started, base = time.time(), given.base or embedded.organism("routed")
    rows = contrasts.load(embedded.contrast(), judge_of(embedded.JUDGE))
    with TemporaryDirectory() as folder:
        tuned = Path(folder) / "tuned"
        fine_tuned(base, tuned, rows, given.steps, given.rate)
        both, ask = checkpoints(str(base), str(tuned)), asking(rows, embedded.JUDGE, tuned)
        found: dict[str, dict] = {"base": ask(open_subject(str(base))), "fine-tune": ask(open_subject(str(tuned)))}
        schemes: dict[str, Scheme] = {
            "reference": reference,
            "row": by_row,
            "row x column": by_row_and_column,
            "distilled": distilled(both, tuned, rows),
        }
        for name, scheme in schemes.items():
            found[name] = measured(both, base, scheme, ask)
    result = {"schemes": found, "times_smaller_at": sizes(), "steps": given.steps, "versions": versions()}
    result["seconds"] = round(time.time() - started, 1)
    print(json.dumps(result, indent=2))
    if given.json:
        given.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
