"""Does an edit behave in llama.cpp, as an adapter and merged, on bases of several types?

    python bench/llama_cpp.py                                   # the routed organism, three seeds; minutes on one core
    python bench/llama_cpp.py --run RUN --json out.json         # any verified run, e.g. of a wide organism

Without RUN it trains `--for llama.cpp` with the organisms' settings and verifies. Every held-out prompt is asked in
llama.cpp of the base, of the adapter on it, and of the merged file (`--to gguf --onto`). Matrices have one type
throughout, or the one that llama.cpp falls back to where its blocks do not fit; mixes such as Q4_K_M are made by
llama.cpp's own program, `--quantizer llama-quantize`, which is called with source, target and type. llama.cpp does
not tell its routing: the merged file's weights are dequantized into transformers, and the share of the experts chosen
there that the unquantized edit chooses, too, is the agreement; so it is for the base.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from gtqlora.exports.gguf.reading import Gguf
    from gtqlora.exports.gguf.types import GgmlType
    from gtqlora.exports.job import Job, Said
    from gtqlora.exports.llama_cpp import LlamaCpp
    from gtqlora.results.verdict import Outcome

TYPES = ("F32", "Q8_0", "Q4_K", "Q2_K")
FALLBACK = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
"""llama.cpp's choice where rows are no multiple of a K type's 256, see `tensor_type_fallback` in llama-quant.cpp."""
ROUTED_PROMPTS = 64
"""Prompts of each kind whose routing is compared."""


# --- files -----------------------------------------------------------------------------------------------------------


def fitting(name: str, shape: tuple[int, ...], wanted: str) -> GgmlType:
    """The type that a tensor gets: F32 for vectors, routers and norms."""
    from gtqlora.exports.gguf.types import BY_NAME

    if len(shape) == 1 or "_norm" in name or "ffn_gate_inp" in name:
        return BY_NAME["F32"]
    for kind in (wanted, FALLBACK.get(wanted, wanted)):
        if shape[-1] % BY_NAME[kind].block == 0:
            return BY_NAME[kind]
    return BY_NAME["F16"]


def quantize(source: Path, target: Path, wanted: str, quantizer: str | None) -> Path:
    """An F32 file in another type, made by a program where one is given."""
    if quantizer is not None and wanted != "F32":
        subprocess.run([*shlex.split(quantizer), source, target, wanted], check=True, capture_output=True)
        return target
    from gtqlora.exports.gguf.header import header, padded
    from gtqlora.exports.gguf.reading import raw_bytes, read_gguf
    from gtqlora.exports.gguf.types import dequantized, quantized

    given = read_gguf(source)
    kinds = {name: fitting(name, info.shape, wanted) for name, info in given.tensors.items()}
    with target.open("xb") as out:
        out.write(header(given.metadata, {name: (kinds[name], info.shape) for name, info in given.tensors.items()}))
        for name, info in given.tensors.items():
            out.write(quantized(dequantized(raw_bytes(info), info.kind, info.shape[-1]), kinds[name]))
            out.write(bytes(padded(out.tell()) - out.tell()))
    return target


# --- behaviour -------------------------------------------------------------------------------------------------------


@dataclass
class Heard:
    """A form with what it said to every held-out prompt, so that each is asked once."""

    job: Job
    form: LlamaCpp
    before: list[Said]
    after: list[Said]

    @staticmethod
    def of(job: Job, form: LlamaCpp, before: list[Said]) -> Heard:
        return Heard(job, form, before, form.said(job.certificate.outcomes, edited=True))

    @property
    def name(self) -> str:
        return self.form.name

    def said(self, rows: Sequence[Outcome], *, edited: bool) -> list[Said]:
        every = zip(self.job.certificate.outcomes, self.after if edited else self.before, strict=True)
        found = {row.number: said for row, said in every}
        return [found[row.number] for row in rows]

    def floor(self) -> str:
        """The verdict in this form, or why there is none to ship on."""
        from gtqlora.errors import FloorError
        from gtqlora.exports.forms import judge_form

        try:
            return judge_form(self, self.job.certificate, "another type").floor.verdict
        except FloorError as error:
            return str(error)


def rates(job: Job, said: list[Said]) -> dict[str, float]:
    """Refusals by kind, and accuracy."""
    from gtqlora.contrasts import is_correct
    from gtqlora.judging.judge import judge_of, refusals

    rows, judge = job.certificate.outcomes, judge_of(job.certificate.config.judge)
    refused = refusals(judge, [row.prompt for row in rows], [one.text for one in said])
    right = [is_correct(row, one.text) for row, one in zip(rows, said, strict=True)]

    def share(values: Iterable[bool | None], kind: str) -> float:
        own = [bool(value) for value, row in zip(values, rows, strict=True) if row.kind == kind and value is not None]
        return sum(own) / len(own) if own else float("nan")

    found = {kind: share(refused, kind) for kind in ("harmful", "lookalike", "benign")}
    return {**found, "acc.look": share(right, "lookalike"), "acc.ben": share(right, "benign")}


# --- routing ---------------------------------------------------------------------------------------------------------


def weights_of(job: Job, source: Gguf) -> Iterator[tuple[str, torch.Tensor]]:
    """A GGUF's tensors under the names of the checkpoint's, dequantized."""
    import torch

    from gtqlora.exports.gguf.reading import raw_bytes
    from gtqlora.exports.gguf.types import dequantized
    from gtqlora.families.llama_cpp.layout import Layout, as_is

    halves: dict[str, dict[str, torch.Tensor]] = {}
    for name, one in Layout.of(job.model, job.names).made.items():
        info = source.tensors[name]
        values = dequantized(raw_bytes(info), info.kind, info.shape[-1]).reshape(info.shape)
        first, *others = one.parts
        if others:
            yield from zip((part.disk for part in one.parts), values, strict=True)
        elif first.take is as_is:
            yield first.disk, values.reshape(one.shape)
        else:
            halves.setdefault(first.disk, {})[name.split(".")[2]] = values
    for disk, parts in halves.items():  # MLA's keys and values, head by head
        keys_HKR = parts["attn_k_b"].transpose(1, 2)
        yield disk, torch.cat([keys_HKR, parts["attn_v_b"]], dim=1).flatten(0, 1)


def choices(job: Job, weights: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    """The experts that a model with these weights chooses for held-out prompts, layer by layer and prompt by prompt."""
    import torch

    from gtqlora.capture import open_subject
    from gtqlora.contrasts import encode_prompt
    from gtqlora.results.verdict import of_kind

    subject = open_subject(job.model)
    for disk, values in weights.items():
        place = job.names.places[disk]
        target = subject.model.get_parameter(place.name) if "bias" not in place.name else None
        if target is None:
            subject.model.get_buffer(place.name).data.copy_(values)
        elif place.expert is None:
            target.data.copy_(values)
        else:
            height = values.shape[0]
            target.data[place.expert, place.part * height : (place.part + 1) * height] = values
    found: list[torch.Tensor] = []
    for path in job.anatomy.routers:
        subject.model.get_submodule(path).register_forward_hook(lambda _m, _i, output: found.append(output[2]))
    rows = [
        row for k in ("harmful", "lookalike", "benign") for row in of_kind(job.certificate.outcomes, k)[:ROUTED_PROMPTS]
    ]
    with torch.no_grad():
        for row in rows:
            subject.model(torch.tensor([encode_prompt(subject.tokenizer, row.prompt)]))
    return found


def agreement(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> float:
    """Share of the chosen experts that the other run chooses for the same token, too."""
    shared = sum(int((a[..., :, None] == b[..., None, :]).any(-1).sum()) for a, b in zip(found, wanted, strict=True))
    return shared / sum(a.numel() for a in found)


# --- runs ------------------------------------------------------------------------------------------------------------


def measure(path: Path, types: list[str], folder: Path, quantizer: str | None) -> list[dict[str, Any]]:
    """Behaviour of one verified run in llama.cpp: a row for each type and form."""
    from gtqlora.certificate import certify
    from gtqlora.config import ExportConfig
    from gtqlora.errors import RunError
    from gtqlora.exports import gguf_adapter
    from gtqlora.exports.gguf.patch import Patch
    from gtqlora.exports.gguf.reading import read_gguf
    from gtqlora.exports.gguf.whole import Plan
    from gtqlora.exports.job import Job
    from gtqlora.exports.llama_cpp import LlamaCpp
    from gtqlora.run import Run

    with Run(path) as run:
        job = Job.of(certify(run), ExportConfig(to="gguf-adapter"))
    whole, rows, found = folder / "whole.gguf", job.certificate.outcomes, list[dict[str, Any]]()
    Plan.of(job).write(whole, None)
    exact: dict[str, list[torch.Tensor]] = {}
    for kind in types:
        base = quantize(whole, folder / f"base-{kind}.gguf", kind, quantizer)
        patch = Patch.of(job, base)
        (folder / kind).mkdir()
        kept = patch.write(folder / kind)
        forms = {"merged": LlamaCpp.of(job, base, edited=folder / kind / base.name, label=kind)}
        try:
            (folder / f"adapter-{kind}").mkdir()
            written = gguf_adapter.write(
                replace(job, config=replace(job.config, base=str(base))), folder / f"adapter-{kind}"
            )
            assert isinstance(written.form, LlamaCpp) and written.form.adapter is not None
            forms["adapter"] = written.form
        except RunError as error:
            print(f"no adapter: {error}", file=sys.stderr)
        files = {"base": base, "merged": folder / kind / base.name}
        routed = {form: choices(job, dict(weights_of(job, read_gguf(file)))) for form, file in files.items()}
        exact = exact or routed
        before = forms["merged"].said(rows, edited=False)
        row = {"type": kind, "form": "base", **rates(job, before), "bytes": base.stat().st_size}
        found.append({**row, "routing": agreement(routed["base"], exact["base"])})
        for name, form in forms.items():
            heard = Heard.of(job, form, before)
            row = {"type": kind, "form": name, **rates(job, heard.after), "floor": heard.floor()}
            if form.adapter is not None:
                row["bytes"] = form.adapter.stat().st_size
            else:
                row |= {"routing": agreement(routed["merged"], exact["merged"]), "kept": min(kept.values())}
            found.append(row)
    return found


def train_and_verify(path: Path, model: Path, seed: int, settings: list[str]) -> None:
    """One training for llama.cpp, with the organisms' recipe."""
    from gtqlora.config import TrainConfig, VerifyConfig, build
    from gtqlora.organisms import embedded
    from gtqlora.run import Run
    from gtqlora.stages.train import train
    from gtqlora.stages.verify import verify

    given: dict[str, Any] = {"file": embedded.recipe(), "model": str(model), "contrast": str(embedded.contrast())}
    with Run(path) as run:
        train(build(TrainConfig, **given, overrides=("target=llama.cpp", f"seed={seed}", *settings)), run)
        verify(build(VerifyConfig, **given), run)


COLUMNS = ("harmful", "lookalike", "benign", "acc.look", "acc.ben", "routing", "kept")


def show(rows: list[dict[str, Any]]) -> None:
    print(f"{'run':10} {'type':6} {'form':8} " + " ".join(f"{c:>9}" for c in COLUMNS) + "     bytes floor")
    for row in rows:
        figures = " ".join(f"{row[c]:9.4f}" if c in row else f"{'':9}" for c in COLUMNS)
        which = f"{row['run']:10} {row['type']:6} {row['form']:8}"
        print(f"{which} {figures} {row.get('bytes', ''):>9} {row.get('floor', '')}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--organism", type=Path, help="folder of an organism to train; by default the routed one")
    parser.add_argument("--run", type=Path, nargs="+", help="verified runs, which are only measured")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of training")
    parser.add_argument("--types", nargs="+", default=list(TYPES))
    parser.add_argument("--quantizer", help="program that is called as llama-quantize is; by default types are uniform")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    for name in ("TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS"):
        os.environ[name] = "1"
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    import torch

    from gtqlora.organisms import embedded

    torch.set_num_threads(args.threads)
    started, found = time.monotonic(), list[dict[str, Any]]()
    with TemporaryDirectory() as root:
        runs: list[Path] = args.run or [Path(root) / f"seed-{seed}" for seed in range(args.seeds)]
        for seed, path in enumerate(runs):
            if not args.run:
                train_and_verify(path, args.organism or embedded.organism("routed"), seed, args.set)
            with TemporaryDirectory() as folder:
                found += [{"run": path.name, **row} for row in measure(path, args.types, Path(folder), args.quantizer)]
    show(found)
    print(f"{time.monotonic() - started:.0f} s, {args.threads} threads")
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
