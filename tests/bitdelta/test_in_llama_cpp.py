"""Variants as LoRA adapters in llama.cpp itself: what they add, what is lost, how they are judged, what is refused."""

from __future__ import annotations

import shutil
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import save
from torch import Tensor

from gtqlora import contrasts
from gtqlora.bitdelta.compress import compress
from gtqlora.bitdelta.container import Tensors, read_variant
from gtqlora.bitdelta.factors import Form
from gtqlora.bitdelta.llama_adapter import Plan
from gtqlora.bitdelta.llama_cpp import adapt
from gtqlora.bitdelta.onebit import OneBit, decode, encode
from gtqlora.bitdelta.placing import place
from gtqlora.capture import Subject, open_subject
from gtqlora.config import VerifyConfig
from gtqlora.edits.merging import Whole
from gtqlora.errors import FloorError, GtqloraError, ModelError, RunError
from gtqlora.exports import llama_server, provenance
from gtqlora.exports.gguf import whole
from gtqlora.exports.gguf.reading import Gguf, raw_bytes, read_gguf
from gtqlora.exports.gguf.types import BY_NAME, dequantized
from gtqlora.exports.gguf.values import Checkpoint
from gtqlora.exports.job import EditedModel, edited_model
from gtqlora.exports.llama_cpp import distributions, logprobs
from gtqlora.exports.llama_server import serving
from gtqlora.families import FAMILIES as KNOWN
from gtqlora.families import identify
from gtqlora.families.copying import copy_changed
from gtqlora.families.coverage import check_tensors_covered, in_layer
from gtqlora.families.llama_cpp.layout import Layout
from gtqlora.results.export import read_export
from gtqlora.run import sha256_file
from tests import helpers, models
from tests.bitdelta.test_compress import tensors_of
from tests.exports import ggml

TOKENS = models.some_tokens(1, shape=(1, 8))
WIDE: dict[str, Any] = {"hidden_size": 128, "moe_intermediate_size": 128, "head_dim": 64, "mlp_only_layers": []}
"""Attention's last projection has half as many rows as columns."""


def fine_tune(base: Path, out: Path, *, seed: int = 1, frozen: tuple[str, ...] = ("norm",)) -> Path:
    """A fine-tune of all but these tensors, whose differences have rows and columns of different sizes."""
    draw = torch.Generator().manual_seed(seed)
    values = {name: tensor for name, tensor in tensors_of(base).items() if not any(part in name for part in frozen)}
    copy_changed(str(base), out, {name: Whole(tensor.float() + noise(tensor, draw)) for name, tensor in values.items()})
    return out


def noise(like: Tensor, draw: torch.Generator, size: float = 3e-4) -> Tensor:
    scales = [0.5 + torch.rand(count, generator=draw) for count in like.shape[-2:]]
    both = scales[0] if len(scales) == 1 else scales[0][:, None] * scales[1]
    return size * both * torch.randn(like.shape, generator=draw)


def unedited(model: Path) -> EditedModel:
    return edited_model(str(model), lambda _anatomy, _names: {})


@pytest.fixture(scope="module")
def base(toy: helpers.Toy) -> Path:
    return toy.model("qwen3_moe", **WIDE)


@pytest.fixture(scope="module")
def gguf(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "base.gguf"
    whole.Plan.of(unedited(base)).write(path, None)
    return path


@pytest.fixture(scope="module")
def variant(toy: helpers.Toy, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("variant")
    compress(str(base), folder / "delta", toy.verify_config(fine_tune(base, folder / "tuned")))
    return folder / "delta"


@pytest.fixture(scope="module")
def adapter(toy: helpers.Toy, base: Path, variant: Path, gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("adapter") / "out"
    adapt(str(base), variant, out, toy.verify_config(base), gguf=gguf)
    return out


# --- the types -------------------------------------------------------------------------------------------------------


def values(kind: str, data: bytes, columns: int) -> Tensor:
    return dequantized(data, BY_NAME[kind], columns)


@pytest.mark.parametrize(("columns", "diagonal"), [(128, "Q4_0"), (256, "Q2_K")])
@pytest.mark.parametrize("size", [1e-2, 1e-7])
def test_scales_of_rows_and_columns_hold_where_a_matrix_is_not_wide(columns: int, diagonal: str, size: float) -> None:
    """Also those that fp16 would round to few steps, or to zero."""
    delta = encode(noise(torch.empty(256, columns), torch.Generator().manual_seed(0), size))
    form = Form.smallest(delta.shape)
    found = form.factors(delta)
    b_NK, a_KK = values("Q1_0", found.signs, columns), values(diagonal, found.diagonal, columns)
    wanted = decode(delta)
    assert (b_NK @ a_KK - wanted).norm() / wanted.norm() < (1e-3 if size > 1e-6 else 1e-2)
    assert torch.equal(form.written(found), b_NK * a_KK.diagonal()) and torch.equal((b_NK @ a_KK).sign(), wanted.sign())


def test_of_a_wide_matrix_columns_become_their_mean_in_a_block() -> None:
    delta = encode(noise(torch.empty(32, 256), torch.Generator().manual_seed(0)))
    form = Form.smallest(delta.shape)
    found = form.factors(delta)
    product = values("Q4_0", found.diagonal, 32) @ values("Q1_0", found.signs, 256)
    means = delta.column_K.float().view(2, 128).mean(-1).repeat_interleave(128)
    wanted = decode(replace(delta, column_K=means))
    assert torch.allclose(product, wanted, rtol=2e-3) and torch.allclose(form.written(found), product)


def test_rows_and_columns_that_do_not_change_stay() -> None:
    change = noise(torch.empty(128, 128), torch.Generator().manual_seed(0))
    change[3], change[:, 5] = 0, 0
    form, delta = Form.smallest((128, 128)), encode(change)
    found = form.written(form.factors(delta))
    assert not found[3].any() and not found[:, 5].any() and torch.allclose(found, decode(delta), rtol=2e-3)


@pytest.mark.parametrize(("shape", "kinds"), [((64, 96), ("Q8_0", "Q4_0")), ((20, 24), ("F16", "F16"))])
def test_other_widths_take_other_types(shape: tuple[int, int], kinds: tuple[str, str]) -> None:
    delta = encode(noise(torch.empty(shape), torch.Generator().manual_seed(0)))
    form = Form.smallest(shape)
    assert (form.signs.name, form.diagonal.name) == kinds
    missed = form.written(form.factors(delta)) - decode(delta)
    # blocks of 32 columns lose less than those of 128, and single ones nothing
    assert float(missed.norm() / decode(delta).norm()) ** 2 < (1e-6 if kinds[0] == "F16" else 0.1)


# --- what llama.cpp applies ------------------------------------------------------------------------------------------

_MLA: dict[str, Any] = {"qk_nope_head_dim": 64, "v_head_dim": 32, "kv_lora_rank": 128, "q_lora_rank": 128}
_SHARED: dict[str, Any] = {"shared_expert_intermediate_size": 128}
_LINEAR: dict[str, Any] = {**_SHARED, "linear_key_head_dim": 32, "linear_value_head_dim": 32}
FAMILIES: dict[str, dict[str, Any]] = {
    "deepseek_v3": _MLA,
    "glm4_moe": {},
    "glm4_moe_lite": _MLA,
    "mixtral": {},
    "olmoe": {"norm_topk_prob": False, "num_key_value_heads": 4},
    "qwen2_moe": {**_SHARED, "mlp_only_layers": [], "norm_topk_prob": False},
    "qwen3_moe": {"mlp_only_layers": [], "hidden_size": 256, "moe_intermediate_size": 256, "head_dim": 64},
    "qwen3_next": {**_LINEAR, "mlp_only_layers": []},
    "qwen3_5_moe": _LINEAR,
}


def wide(toy: helpers.Toy, family: str) -> Path:
    sizes = {"hidden_size": 128, "intermediate_size": 256, "moe_intermediate_size": 128, "head_dim": 32}
    if "kv_lora_rank" in FAMILIES[family]:
        del sizes["head_dim"]
    return toy.model(family, **{**sizes, **FAMILIES[family]})


def random_groups(model: EditedModel) -> dict[str, Tensors]:
    """Differences of every matrix in one bit, and of gates whole, by their places in a layer."""
    draw, groups = torch.Generator().manual_seed(0), dict[str, Tensors]()
    for name, tensor in tensors_of(Path(model.model)).items():
        if name not in model.names.places or tensor.ndim == 1 or "conv1d" in name:
            continue
        place = model.names.places[name].name
        group = in_layer(model.anatomy.family, place.removesuffix(".weight"))
        found = groups.setdefault(group, Tensors(bits={}, dense={}))
        change = noise(tensor, draw, 1e-3)
        if place.endswith(("mlp.gate.weight", "shared_expert_gate.weight", "block_sparse_moe.gate.weight")):
            groups[group] = replace(found, dense={**found.dense, name: tensor.float() + change})
        else:
            groups[group] = replace(found, bits={**found.bits, name: kept_whole(encode(change))})
    return groups


def kept_whole(delta: OneBit) -> OneBit:
    """One that loses nothing in blocks: the columns of a wide matrix are alike."""
    rows, columns = delta.shape[-2:]
    return delta if rows >= columns else replace(delta, column_K=torch.ones_like(delta.column_K))


def written(model: EditedModel, tensors: Tensors, path: Path) -> dict[str, float]:
    edited = replace(model, edits=tensors.edits)
    layout = Layout.of(model.model, model.names)
    made = {name: one for name, one in layout.made.items() if one.sources & edited.edits.keys()}
    return Plan.of(Checkpoint.of(edited), tensors, layout.architecture, made).write(path).kept


def is_covered(model: EditedModel, tensors: Tensors) -> bool:
    shapes = Checkpoint.of(model).headers
    try:
        check_tensors_covered(
            model.anatomy.family,
            {model.names.places[name].name: len(shapes[name].shape) for name in tensors.edits},
            tied=False,
        )
    except RunError:
        return False
    return True


@torch.no_grad()
def placed(base: Subject, model: EditedModel, tensors: Tensors) -> NDArray[np.float64]:
    subject = replace(base, model=deepcopy(base.model))
    place(subject, model.names, identify(model.model), tensors.edits)
    return subject.model(TOKENS).logits[0].double().log_softmax(-1).numpy()


@pytest.mark.parametrize("family", FAMILIES)
def test_each_group_alone_has_its_effect_or_is_refused(toy: helpers.Toy, tmp_path: Path, family: str) -> None:
    model = unedited(wide(toy, family))
    groups, subject = random_groups(model), open_subject(model.model)
    taken = {group: tensors for group, tensors in groups.items() if is_covered(model, tensors)}
    mla = {"self_attn.q_a_proj", "self_attn.q_b_proj", "self_attn.kv_a_proj_with_mqa", "self_attn.kv_b_proj"}
    assert groups.keys() - taken.keys() == ({*mla, "lm_head"} if family in ("deepseek_v3", "glm4_moe_lite") else set())
    kept = [written(model, tensors, tmp_path / f"{n}.gguf") for n, tensors in enumerate(taken.values())]
    assert min(share for shares in kept for share in shares.values()) > 0.99999
    whole.Plan.of(model).write(tmp_path / "base.gguf", None)
    adapters = [tmp_path / f"{n}.gguf" for n in range(len(taken))]
    with serving(tmp_path / "base.gguf", adapters=adapters, context=9) as server:
        before = distributions(server, TOKENS.tolist(), [0.0] * len(taken))[0]
        for number, (group, tensors) in enumerate(taken.items()):
            found = distributions(server, TOKENS.tolist(), [float(number == n) for n in range(len(taken))])[0]
            wanted = placed(subject, model, tensors)
            effect = np.linalg.norm(wanted - before)
            # what is left is that llama.cpp rounds activations to 8 bits
            assert np.linalg.norm(found - wanted) < 0.1 * effect, group


# --- the verb --------------------------------------------------------------------------------------------------------


def merged(model: EditedModel, file: Path) -> dict[str, Tensor]:
    """The tensors to which an adapter's file adds something, with that added in fp32."""
    found, dense = read_gguf(file), dict[str, Tensor]()
    old = tensors_of(Path(model.model))
    for name, one in Layout.of(model.model, model.names).made.items():
        if f"{name}.lora_a" not in found.tensors:
            continue
        a, b = (product(found, f"{name}.lora_{side}") for side in "ab")
        change = a @ b.mT if name == "token_embd.weight" else b @ a
        for matrix, part in zip(change.reshape(-1, *one.shape[-2:]), one.parts, strict=True):
            dense[part.disk] = old[part.disk] + matrix
    return dense


def product(found: Gguf, name: str) -> Tensor:
    info = found.tensors[name]
    return dequantized(raw_bytes(info), info.kind, info.shape[-1]).view(info.shape)


def test_what_the_file_holds_is_what_llama_cpp_adds(base: Path, adapter: Path, gguf: Path) -> None:
    model = unedited(base)
    dense = merged(model, adapter / "adapter.gguf")
    found, before = logprobs(gguf, TOKENS.tolist(), adapter / "adapter.gguf")[0], logprobs(gguf, TOKENS.tolist())[0]
    wanted = placed(open_subject(model.model), model, Tensors(bits={}, dense=dense))
    assert np.linalg.norm(found - wanted) < 0.05 * np.linalg.norm(wanted - before)


def test_what_the_record_says(base: Path, variant: Path, adapter: Path) -> None:
    record, delta = read_export(adapter), read_variant(variant)
    assert sorted(path.name for path in adapter.iterdir()) == [
        *("README.md", "adapter.gguf", "export.json", "verdicts.jsonl")
    ]
    assert provenance.check(adapter).certified and record.adapter == delta.digest
    assert (record.format, record.target, record.base) == ("gguf-adapter", "llama.cpp", base.name)
    assert record.form is not None and record.form.name == "one-bit adapter on F32 in llama.cpp"
    assert record.form.floor.verdict == "pass" and record.form.table["harmful"].refusal_after.n == 120
    # what the variant may have lost counts on
    assert record.spent == pytest.approx(delta.record.spent + record.form.floor.losses.high) and record.spent < 0.05
    assert record.tensors_changed == len(delta.edits) and record.gate_values_changed > 0
    wide = {name for name, share in record.kept.items() if share < 0.99999}
    assert wide == {f"blk.{layer}.attn_output.weight" for layer in range(3)} and min(record.kept.values()) > 0.85
    card = (adapter / "README.md").read_text()
    for part in (
        "by the variant as it was judged | by the adapter",
        "--lora adapter.gguf",
        "**pass**",
        "is lost in llama.cpp's types",
    ):
        assert part in card


def test_on_a_quantized_gguf_of_ones_own(
    toy: helpers.Toy, base: Path, variant: Path, gguf: Path, tmp_path: Path
) -> None:
    mine = ggml.quantize(gguf, tmp_path / "mine.gguf", lambda _name: "Q8_0")
    found = adapt(str(base), variant, tmp_path / "out", toy.verify_config(base), gguf=mine)
    assert found.judged.tuned.name == "one-bit adapter on Q8_0 in llama.cpp" and "-m mine.gguf" in found.notes[0]
    assert found.n_bytes == (tmp_path / "out" / "adapter.gguf").stat().st_size and 0 < found.energy_lost < 0.02


def test_each_request_of_one_server_has_its_own_variant(base: Path, variant: Path, gguf: Path, tmp_path: Path) -> None:
    """Requests that run together, of the base and of two variants."""
    model, draw = unedited(base), torch.Generator().manual_seed(3)
    other = {name: encode(noise(tensor, draw)) for name, tensor in tensors_of(base).items() if "_proj" in name}
    each = [read_variant(variant), Tensors(bits=other, dense={})]
    for number, tensors in enumerate(each):
        written(model, tensors, tmp_path / f"{number}.gguf")
    files = [tmp_path / "0.gguf", tmp_path / "1.gguf"]
    alone = [logprobs(gguf, TOKENS.tolist())[0], *(logprobs(gguf, TOKENS.tolist(), file)[0] for file in files)]
    choices = [[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]] * 2
    with serving(gguf, adapters=files, context=9) as server:
        asked: list[llama_server.Request] = [
            {
                "prompt": TOKENS[0].tolist(),
                "n_predict": 1,
                "n_probs": 2**24,
                "lora": [{"id": number, "scale": scale} for number, scale in enumerate(scales)],
            }
            for scales in choices
        ]
        replies = server.complete(asked)
    for number, reply in enumerate(replies):
        ranked = {one["id"]: one["logprob"] for one in reply["completion_probabilities"][0]["top_logprobs"]}
        row_V = np.array([ranked[token] for token in range(len(ranked))])
        distances = [np.linalg.norm(row_V - found[-1]) for found in alone]
        assert np.argmin(distances) == number % 3 and distances[number % 3] < 0.1 * max(distances)


# --- what is refused -------------------------------------------------------------------------------------------------


def with_more(variant: Path, out: Path, name: str, content: bytes) -> Path:
    """A variant with one more file, which its record has the hash of."""
    shutil.copytree(variant, out)
    (out / name).parent.mkdir(exist_ok=True)
    (out / name).write_bytes(content)
    models.edit_json(
        out / "bitdelta.json", lambda old: {**old, "files": {**old["files"], name: sha256_file(out / name)}}
    )
    return out


def refused(
    error: type[GtqloraError], match: str, base: Path, delta: Path, out: Path, config: VerifyConfig, **more: Any
) -> None:
    before = sorted(out.parent.iterdir())
    with pytest.raises(error, match=match) as found:
        adapt(str(base), delta, out, config, **more)
    assert "\n" not in str(found.value) and sorted(out.parent.iterdir()) == before


def test_what_llama_cpp_would_lose_is_refused(toy: helpers.Toy, base: Path, variant: Path, tmp_path: Path) -> None:
    old = tensors_of(base)
    norms = {f"{name}:whole": old[name] + 0.1 for name in old if name.endswith("norm.weight")}
    delta = with_more(variant, tmp_path / "delta", "deltas-00009.safetensors", save(norms))
    says = r"no adapter to input_layernorm, model.norm, .* of qwen3_moe .*bitdelta apply` without --to"
    refused(RunError, says, base, delta, tmp_path / "out", toy.verify_config(base))


@pytest.mark.parametrize(
    ("family", "tensors", "tied", "says"),
    [
        (
            "deepseek_v3",
            {"model.layers.1.self_attn.q_a_proj.weight": 2, "lm_head.weight": 2},
            False,
            "lm_head and self_attn.q_a_proj of",
        ),
        (
            "deepseek_v3",
            {"model.layers.1.mlp.gate.e_score_correction_bias": 1},
            False,
            "mlp.gate.e_score_correction_bias",
        ),
        ("qwen3_next", {"model.layers.0.linear_attn.conv1d.weight": 3}, False, "linear_attn.conv1d"),
        ("qwen3_moe", {"model.embed_tokens.weight": 2}, True, "model.embed_tokens"),
    ],
)
def test_other_parts_that_llama_cpp_would_lose(family: str, tensors: dict[str, int], tied: bool, says: str) -> None:
    with pytest.raises(RunError, match=f"applies no adapter to {says}"):
        check_tensors_covered(KNOWN[family], tensors, tied=tied)


def test_a_tokenizer_of_its_own_is_refused(toy: helpers.Toy, base: Path, variant: Path, tmp_path: Path) -> None:
    delta = with_more(variant, tmp_path / "delta", "own/tokenizer.json", b"{}")
    refused(RunError, "tokenizer, template or stops of its own", base, delta, tmp_path / "out", toy.verify_config(base))


def test_too_few_prompts_pass_nothing(toy: helpers.Toy, base: Path, variant: Path, gguf: Path, tmp_path: Path) -> None:
    (tmp_path / "pairs").mkdir()
    counts = {("heldout", kind): 8 for kind in contrasts.KINDS}
    few = helpers.write_rows(tmp_path / "pairs" / "few.jsonl", helpers.toy_rows(counts))
    says = "one-bit adapter on F32 in llama.cpp: the safety floor's verdict against the variant as it was judged"
    refused(FloorError, says, base, variant, tmp_path / "out", toy.verify_config(base, contrast=str(few)), gguf=gguf)


def test_other_models_are_refused(toy: helpers.Toy, base: Path, variant: Path, tmp_path: Path) -> None:
    config, other = toy.verify_config(base), toy.model("qwen3_moe", **WIDE, seed=1)
    refused(ModelError, "is not the model that tuned was made from", other, variant, tmp_path / "out", config)
    whole.Plan.of(unedited(other)).write(tmp_path / "other.gguf", None)
    says = r"other\.gguf: tensor .* is not the base's"
    refused(ModelError, says, base, variant, tmp_path / "out", config, gguf=tmp_path / "other.gguf")
    refused(ModelError, "none.gguf: no such file", base, variant, tmp_path / "out", config, gguf=Path("none.gguf"))


def test_nothing_is_overwritten_and_llama_cpp_is_needed(
    toy: helpers.Toy, base: Path, variant: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = toy.verify_config(base)
    (tmp_path / "out").mkdir()
    refused(RunError, "out: exists", base, variant, tmp_path / "out", config)
    monkeypatch.setattr(llama_server, "find_spec", lambda _name: None)
    refused(RunError, r"pip install 'gtqlora\[gguf\]'", base, variant, tmp_path / "new", config)


def test_a_gguf_that_holds_several_tensors_as_one_is_refused(base: Path, variant: Path) -> None:
    model, tensors = unedited(base), read_variant(variant)
    layout = Layout.of(model.model, model.names)
    fused = {one.name: one for one in layout.fused.values() if one.name in ("blk.0.attn_qkv.weight",)}
    assert fused
    with pytest.raises(RunError, match=r"blk\.0\.attn_qkv\.weight: is made of several tensors"):
        Plan.of(Checkpoint.of(replace(model, edits=tensors.edits)), tensors, layout.architecture, fused)


def test_a_scale_beyond_fp16_is_refused(base: Path, tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    found = encode(noise(tensors_of(base)[name], torch.Generator().manual_seed(0)))
    tensors = Tensors(bits={name: replace(found, row_N=torch.full_like(found.row_N, 1e6))}, dense={})
    with pytest.raises(RunError, match=r"blk\.0\.attn_q\.weight: a scale of it is too large for llama.cpp's types"):
        written(unedited(base), tensors, tmp_path / "adapter.gguf")
