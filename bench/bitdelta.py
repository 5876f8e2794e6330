"""One bit a weight of a full fine-tune: what is lost under several scales, how large it is, and which refusals go.

    python bench/bitdelta.py                              # the embedded organism, matrices 32 to 128 wide, 3 minutes
    python bench/bitdelta.py --base FOLDER --json OUT     # another one, such as a wide organism (256 and more)
    python bench/bitdelta.py --llama-cpp --base FOLDER    # the adapter of `bitdelta apply --to llama.cpp`, a minute

The fine-tune trains every parameter on the pairs' preferred answers. "reference" is BitDelta's: one scale a tensor, a
zero counted as +; "row": one for every row; "row x column": what `bitdelta compress` does; "distilled": the same with
row scales fitted on benign training prompts (`--distill`). Everything but matrices is whole in all of them. Energies
are shares of the squared difference; rates are over the held-out prompts, greedy.

With --llama-cpp norms are frozen, as llama.cpp applies no adapter to them; by default of the embedded Qwen3 organism.
The adapter is asked in llama.cpp on bases of several types. "energy_lost" is what it misses of the one-bit differences;
the divergence is KL(variant in transformers || adapter in llama.cpp on F32) at the first answered token, in nats.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from gtqlora import contrasts
from gtqlora.bitdelta import llama_adapter
from gtqlora.bitdelta.checkpoints import Change, Checkpoints, checkpoints
from gtqlora.bitdelta.container import Tensors
from gtqlora.bitdelta.distil import Distilled
from gtqlora.bitdelta.factors import Form
from gtqlora.bitdelta.onebit import SCALE_DTYPE, decode, encode, matrix
from gtqlora.bitdelta.placing import place
from gtqlora.capture import Subject, open_subject
from gtqlora.contrasts import is_correct
from gtqlora.edits.merging import Edit, Whole
from gtqlora.exports.gguf import whole as whole_gguf
from gtqlora.exports.job import edited_model
from gtqlora.exports.llama_cpp import LlamaCpp
from gtqlora.exports.llama_server import serving
from gtqlora.families.files import small_names
from gtqlora.judging.judge import judge_of, refusals
from gtqlora.organisms import embedded
from gtqlora.run import versions
from gtqlora.scoring import Runner
from tests.exports import ggml

Scheme = Callable[[Change, Tensor], tuple[Tensor, int]]
"""A difference -> what is left of it, and its bytes."""

TEXTS, BATCH = 128, 64


def fine_tuned(base: Path, out: Path, rows: contrasts.Contrast, steps: int, rate: float, frozen: bool = False) -> None:
    """Train every parameter of a model, or all but the vectors, on the preferred answers of the training rows."""
    subject = open_subject(str(base))
    model, train = subject.model.float().train(), rows.split("train").rows
    for parameter in model.parameters():
        parameter.requires_grad_(not frozen or parameter.ndim > 1)
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


# --- in llama.cpp ----------------------------------------------------------------------------------------------------

TYPES = ("F32", "Q8_0", "Q4_K", "Q2_K")
QWEN3_30B = {
    **{"q": (48, 4096, 2048), "k and v": (96, 512, 2048), "o": (48, 2048, 4096)},
    **{"gate and up": (48 * 256, 768, 2048), "down": (48 * 128, 2048, 768), "embedding and head": (2, 151936, 2048)},
}
"""Matrices of Qwen3-30B-A3B: how many, rows, columns."""


def variant_of(both: Checkpoints) -> Tensors:
    """Return what `bitdelta compress` makes of a fine-tune, in memory."""
    pairs = {change: change.read() for change in both.changes}
    changed = {change: pair for change, pair in pairs.items() if pair.differs}
    return Tensors(
        bits={change.name: encode(pair.delta) for change, pair in changed.items() if change.one_bit},
        dense={change.name: pair.after for change, pair in changed.items() if not change.one_bit},
    )


def in_llama_cpp(both: Checkpoints, held: contrasts.Contrast, judge: str, folder: Path) -> dict:
    """Write the adapter, and ask it on bases of several types."""
    tensors, base = variant_of(both), both.base.model
    model = edited_model(base, lambda *_: tensors.edits)
    whole = whole_gguf.Plan.of(model)
    whole.write(folder / "base.gguf", None)
    made = {name: one for name, one in whole.layout.made.items() if one.sources & tensors.edits.keys()}
    plan = llama_adapter.Plan.of(whole.checkpoint, tensors, whole.layout.architecture, made)
    adapter = folder / "adapter.gguf"
    lost = plan.write(adapter)
    subject = open_subject(base)
    place(subject, both.names, both.base, tensors.edits)
    runner = Runner(model=subject, judge=judge_of(judge), batch_size=BATCH, max_new_tokens=6)
    prompts = runner.encoded(held.rows)
    wanted_RV = first_tokens(runner, prompts)
    forms = {}
    for kind in TYPES:
        file = ggml.quantize(folder / "base.gguf", folder / f"{kind}.gguf", lambda _name, kind=kind: kind)
        form = LlamaCpp(base, 6, file, adapter=adapter)
        forms[kind] = {which: rates(form, held, judge, edited=which == "adapter") for which in ("base", "adapter")}
    kl_R = {
        which: F.kl_div(found_RV, wanted_RV, log_target=True, reduction="none").sum(-1)
        for which, found_RV in {
            "adapter": first_in_llama_cpp(folder / "F32.gguf", [adapter], prompts),
            "base": first_in_llama_cpp(folder / "F32.gguf", [], prompts),
        }.items()
    }
    return {
        "energy_lost": lost.share,
        "energy_lost_if_all_by_rows": by_blocks(tensors),
        "least_kept": min(lost.kept.values()),
        "bits_a_weight": plan.bits,
        "adapter_bytes": adapter.stat().st_size,
        "kl_mean": {which: float(found_R.mean()) for which, found_R in kl_R.items()},
        "kl_largest": {which: float(found_R.max()) for which, found_R in kl_R.items()},
        "variant": asking_of(runner, held),
        "in_llama_cpp": forms,
        "bits_a_weight_at": adapter_sizes(),
    }


def by_blocks(tensors: Tensors) -> float:
    """Return what is lost if every matrix is taken for a wide one, whose columns become their mean in a block."""
    lost = llama_adapter.Lost()
    for name, delta in tensors.bits.items():
        form, wanted = Form(delta.shape, rows=True), decode(delta)
        stack = [delta] if wanted.ndim == 2 else [matrix(delta, expert) for expert in range(len(wanted))]
        for one in stack:
            lost.add(name, decode(one), form.written(form.factors(one)))
    return lost.share


def first_in_llama_cpp(file: Path, adapters: list[Path], prompts: list[list[int]]) -> Tensor:
    """Return log-probabilities_RV of the first token of each answer."""
    with serving(file, adapters=adapters, context=max(map(len, prompts)) + 1) as server:
        replies = server.complete([{"prompt": ids, "n_predict": 1, "n_probs": 2**24} for ids in prompts])
    found = [reply["completion_probabilities"][0]["top_logprobs"] for reply in replies]
    rows = [{one["id"]: one["logprob"] for one in row} for row in found]
    return torch.tensor([[row[token] for token in range(len(row))] for row in rows])


def rates(form: LlamaCpp, held: contrasts.Contrast, judge: str, *, edited: bool) -> dict[str, float]:
    """Return refusals by kind, and accuracy, in llama.cpp."""
    said, found = form.said(held.rows, edited=edited), dict[str, float]()
    refused = refusals(judge_of(judge), [row.prompt for row in held.rows], [one.text for one in said])
    for kind in contrasts.KINDS:
        mine = [number for number, row in enumerate(held.rows) if row.kind == kind]
        found[f"{kind}_refused"] = sum(refused[number] for number in mine) / len(mine)
        right = [is_correct(held.rows[number], said[number].text) for number in mine]
        if known := [one for one in right if one is not None]:
            found[f"{kind}_accuracy"] = sum(known) / len(known)
    return found


def adapter_sizes() -> dict[str, float]:
    """Return the bits of a weight in Qwen3-30B-A3B's matrices, and of all of them."""
    forms = {name: Form.smallest((rows, columns)) for name, (_, rows, columns) in QWEN3_30B.items()}
    forms["embedding and head"] = Form(forms["embedding and head"].shape, rows=False)
    bits, weights = dict[str, float](), dict[str, int]()
    for name, form in forms.items():
        n_bytes = form.signs.n_bytes(form.shape) + form.diagonal.n_bytes((form.side, form.side))
        bits[name], weights[name] = 8 * n_bytes / prod(form.shape), QWEN3_30B[name][0] * prod(form.shape)
    whole = sum(bits[name] * weights[name] for name in bits) / sum(weights.values())
    return {**bits, "all": whole}


# --- asking ----------------------------------------------------------------------------------------------------------


def first_tokens(runner: Runner, prompts: list[list[int]]) -> Tensor:
    """Return log-probabilities_RV of the first token of each answer."""
    found = {i: row for batch in runner.logits(prompts) for i, row in zip(batch.chosen, batch.values_BSV, strict=True)}
    return torch.stack([found[i][-1] for i in range(len(prompts))]).log_softmax(-1)


def asking_of(runner: Runner, held: contrasts.Contrast) -> dict[str, float]:
    """Return refusals by kind, and accuracy, in transformers."""
    answers, found = runner.answers(held.rows, label=None), dict[str, float]()
    for kind in contrasts.KINDS:
        mine = [answer for row, answer in zip(held.rows, answers, strict=True) if row.kind == kind]
        found[f"{kind}_refused"] = sum(answer.refused for answer in mine) / len(mine)
        known = [answer.correct for answer in mine if answer.correct is not None]
        if known:
            found[f"{kind}_accuracy"] = sum(known) / len(known)
    return found


def asking(rows: contrasts.Contrast, judge: str, tuned: Path) -> Callable[[Subject], dict[str, float]]:
    """Return what asks a model the held-out prompts; KL(fine-tune || model) is of the first token of an answer."""
    held, judges = rows.split("heldout"), judge_of(judge)

    def first(runner: Runner) -> Tensor:
        return first_tokens(runner, runner.encoded(held.rows))

    def runner_of(subject: Subject) -> Runner:
        return Runner(model=subject, judge=judges, batch_size=BATCH, max_new_tokens=6)

    wanted_RV = first(runner_of(open_subject(str(tuned))))

    def ask(subject: Subject) -> dict[str, float]:
        runner = runner_of(subject)
        kl_R = F.kl_div(first(runner), wanted_RV, log_target=True, reduction="none").sum(-1)
        kinds = {kind: [row.kind == kind for row in held.rows] for kind in contrasts.KINDS}
        return {**{f"{kind}_kl": float(kl_R[mine].mean()) for kind, mine in kinds.items()}, **asking_of(runner, held)}

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
    parser.add_argument("--llama-cpp", action="store_true", help="the adapter for llama.cpp only")
    given = parser.parse_args()
    started = time.time()
    base = given.base or embedded.organism("routed-qwen3" if given.llama_cpp else "routed")
    rows = contrasts.load(embedded.contrast(), judge_of(embedded.JUDGE))
    with TemporaryDirectory() as folder:
        tuned = Path(folder) / "tuned"
        fine_tuned(base, tuned, rows, given.steps, given.rate, frozen=given.llama_cpp)
        both = checkpoints(str(base), str(tuned))
        if given.llama_cpp:
            finish(given, started, in_llama_cpp(both, rows.split("heldout"), embedded.JUDGE, Path(folder)))
            return
        ask = asking(rows, embedded.JUDGE, tuned)
        found: dict[str, dict] = {"base": ask(open_subject(str(base))), "fine-tune": ask(open_subject(str(tuned)))}
        schemes: dict[str, Scheme] = {
            "reference": reference,
            "row": by_row,
            "row x column": by_row_and_column,
            "distilled": distilled(both, tuned, rows),
        }
        for name, scheme in schemes.items():
            found[name] = measured(both, base, scheme, ask)
    finish(given, started, {"schemes": found, "times_smaller_at": sizes()})


def finish(given: argparse.Namespace, started: float, found: dict) -> None:
    """Print and save what was found."""
    result = {**found, "steps": given.steps, "versions": versions(), "seconds": round(time.time() - started, 1)}
    print(json.dumps(result, indent=2))
    if given.json:
        given.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
