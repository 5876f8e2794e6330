"""Frozen experts through transformers: what is loaded is what was stored, and what cannot be loaded says why."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, distributed
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, PreTrainedModel

from gtqlora.capture import open_subject
from gtqlora.config import ModelConfig
from gtqlora.errors import ModelError
from gtqlora.experts import FORMATS, FrozenExperts, FrozenExpertsConfig, load_model, quantized_expert_counts
from gtqlora.families import FAMILIES, bind, parameter_counts
from gtqlora.progress import shown_by
from gtqlora.stages.inspect import inspect
from tests import helpers, models, warm

every_family = pytest.mark.parametrize("family", models.FAMILIES)
every_format = pytest.mark.parametrize(
    ("family", "format"), [*product(models.CORE, FORMATS), *((family, "nf4") for family in models.OTHERS)]
)
INNER, N_MOE, N_EXPERTS, HIDDEN = 32, 2, 8, 32
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def saved(path: Path, family: str, dtype: torch.dtype = torch.float32, **more: Any) -> Path:
    """A tiny checkpoint whose experts every format can hold."""
    return models.save_tiny(path, family, dtype=dtype, moe_intermediate_size=INNER, **more)


def experts_of(model: PreTrainedModel) -> dict[int, FrozenExperts]:
    layers = models.moe_layers(model.config.model_type)
    found = {i: model.get_submodule(f"model.layers.{i}.mlp.experts") for i in layers}
    assert all(isinstance(module, FrozenExperts) for module in found.values())
    return found  # type: ignore[return-value]


def bits(model: torch.nn.Module) -> dict[str, bytes]:
    """Every parameter and buffer, as bytes."""
    state = {name: tensor.detach().contiguous().reshape(-1) for name, tensor in model.state_dict().items()}
    return {name: tensor.view(torch.uint8).numpy().tobytes() for name, tensor in state.items()}


def on_disk(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


# --- quantizing a checkpoint -----------------------------------------------------------------------------------------


@every_format
def test_experts_are_the_quantized_matrices_of_the_checkpoint(tmp_path: Path, family: str, format: str) -> None:
    folder = saved(tmp_path / "m", family)
    tensors = on_disk(folder)
    _, loaded = load_model(str(folder), expert_format=format)
    for layer, module in experts_of(loaded).items():
        for expert in range(N_EXPERTS):
            for matrix, (fused, row) in zip(
                models.expert_matrices(family, tensors, layer, expert),
                (("gate_up", 0), ("gate_up", 1), ("down", 0)),
                strict=True,
            ):
                expected = FORMATS[format].quantize(matrix)
                held = module.parts(fused, slice(expert, expert + 1))  # type: ignore[arg-type]
                assert helpers.same(expected, {name: part[0, row] for name, part in held.items()})
    dense = {name: tensor for name, tensor in loaded.state_dict().items() if ".mlp.experts." not in name}
    assert all(torch.equal(tensor, tensors[models.disk_name(family, name)]) for name, tensor in dense.items())


@every_format
def test_logits_are_those_of_transformers_own_experts_with_the_dequantized_weights(
    tmp_path: Path, family: str, format: str
) -> None:
    folder = saved(tmp_path / "m", family)
    _, frozen = load_model(str(folder), expert_format=format)
    _, plain = load_model(str(folder))
    before = helpers.logits(plain)
    for layer, module in experts_of(frozen).items():
        own: Any = plain.get_submodule(f"model.layers.{layer}.mlp.experts")
        own.gate_up_proj.data = module.weights("gate_up", slice(None), torch.float32)
        own.down_proj.data = module.weights("down", slice(None), torch.float32)
    expected = helpers.logits(plain)
    torch.testing.assert_close(helpers.logits(frozen), expected, atol=1e-5 * float(expected.abs().max()), rtol=1e-5)
    assert (before - expected).abs().max() > 1e-2  # the weights did change


@pytest.mark.parametrize("family", [family for family in models.FAMILIES if family != "qwen3_5_moe"])
def test_fused_names_on_disk_are_read_too(tmp_path: Path, family: str) -> None:
    folder = saved(tmp_path / "m", family)
    _, expected = load_model(str(folder), expert_format="nf4")

    def fuse(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        for layer in models.moe_layers(family):
            experts = [models.expert_matrices(family, tensors, layer, e, tensors.pop) for e in range(N_EXPERTS)]
            gate, up, down = (torch.stack(matrices) for matrices in zip(*experts, strict=True))
            stem = models.disk_name(family, f"model.layers.{layer}.mlp.experts")
            tensors |= {f"{stem}.gate_up_proj": torch.cat((gate, up), dim=1), f"{stem}.down_proj": down}
        return tensors

    models.edit_tensors(folder / "model.safetensors", fuse)
    assert bits(load_model(str(folder), expert_format="nf4")[1]) == bits(expected)


def with_info(folder: Path, config: FrozenExpertsConfig) -> tuple[Any, dict[str, Any]]:
    """The model and transformers' own report."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, output_loading_info=True, device_map="cpu"
    )
    return loaded


@pytest.mark.parametrize("name", ["deepseek_v3", "qwen3_moe"])
def test_plain_transformers_loads_it(tmp_path: Path, name: str) -> None:
    folder = saved(tmp_path / "m", name)
    config = FrozenExpertsConfig(format="int4-g32", kernel="reference")
    loaded, info = with_info(folder, config)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert bits(loaded) == bits(load_model(str(folder), expert_format="int4-g32")[1])
    assert {module.kernel for module in experts_of(loaded).values()} == {"reference"}
    assert loaded.is_quantized and loaded.hf_quantizer.is_trainable


def test_plain_transformers_still_reports_what_is_missing_or_foreign(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m", "qwen3_moe")

    def spoil(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        del tensors["model.norm.weight"]
        foreign = {"model.sink": torch.ones(2), "model.layers.0.mlp.experts.0.gate_proj.weight": torch.ones(2, 2)}
        return {**tensors, **foreign}

    models.edit_tensors(folder / "model.safetensors", spoil)
    _, info = with_info(folder, FrozenExpertsConfig())
    assert info["missing_keys"] == {"model.norm.weight"}
    assert info["unexpected_keys"] == {"model.sink", "model.layers.0.mlp.experts.0.gate_proj.weight"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_model_dtype_leaves_the_experts_alone(tmp_path: Path, dtype: str) -> None:
    folder = saved(tmp_path / "m", "deepseek_v3")
    _, loaded = load_model(str(folder), dtype=dtype, expert_format="nf4")
    reference = bits(load_model(str(folder), expert_format="nf4")[1])
    experts = {name: value for name, value in bits(loaded).items() if ".mlp.experts." in name}
    assert str(loaded.dtype) == f"torch.{dtype}" and experts and experts.items() <= reference.items()
    assert helpers.logits(loaded).isfinite().all()


def test_ranks_hold_their_own_experts(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m", "qwen3_moe")
    whole = experts_of(load_model(str(folder), expert_format="int4-g128")[1])
    parts = [
        experts_of(load_model(str(folder), expert_format="int4-g128", expert_range=(rank, 3))[1]) for rank in range(3)
    ]
    assert [(part[1].first, part[1].count) for part in parts] == [(0, 2), (2, 3), (5, 3)]
    for layer, module in whole.items():
        for name, buffer in module.named_buffers():
            assert torch.equal(torch.cat([part[layer].get_buffer(name) for part in parts]), buffer)


def test_progress_counts_the_matrices(tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    with shown_by(lambda what, done, total: seen.append((what, done, total))):
        load_model(str(saved(tmp_path / "m", "qwen3_moe")), expert_format="nf4")
    total = N_MOE * N_EXPERTS * 3
    assert seen == [("loading experts", done, total) for done in range(total + 1)]


# --- anatomy, census, gradients --------------------------------------------------------------------------------------


@every_family
def test_subject_binds_counts_and_trains_through_frozen_experts(tmp_path: Path, family: str) -> None:
    folder = saved(tmp_path / "m", family, torch.bfloat16)
    subject = open_subject(ModelConfig(model=str(folder), expert_format="nf4"))
    groups = {group.name: group for group in parameter_counts(subject.model, subject.anatomy, lora_rank=4)}
    plain = open_subject(str(folder))
    expected = {group.name: group for group in parameter_counts(plain.model, plain.anatomy, lora_rank=4)}
    routed, found = expected.pop("routed experts"), groups.pop("routed experts")
    assert groups == expected
    assert (found.parameters, found.modules, found.trained) == (
        routed.parameters,
        len(models.moe_layers(family)),
        "frozen",
    )
    assert found.bytes == found.parameters * FORMATS["nf4"].bits(INNER, HIDDEN) / 8
    assert not any(".mlp.experts." in name for name, _ in subject.model.named_parameters())
    subject.model(models.some_tokens()).logits.sum().backward()
    for path in (subject.anatomy.routers[0], subject.anatomy.attention[0]):
        assert subject.model.get_submodule(path).weight.grad.abs().sum() > 0


def test_census_of_frozen_experts(tmp_path: Path) -> None:
    family, model = load_model(str(saved(tmp_path / "m", "deepseek_v3")), expert_format="int4-g32", expert_range=(1, 2))
    found = quantized_expert_counts(model, family)
    assert (found.layers, found.experts, found.held, found.bits) == (N_MOE, N_EXPERTS, N_EXPERTS // 2, 4.5)
    assert found.expert_parameters == N_MOE * N_EXPERTS // 2 * 3 * HIDDEN * INNER
    assert found.expert_bytes + found.other_bytes == sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    assert "4 of 8 routed experts in int4-g32" in str(found) and "4.500 bits" in str(found)


def _unfreeze(experts: FrozenExperts) -> None:
    experts.extra = torch.nn.Parameter(torch.zeros(1))


def _widen(experts: FrozenExperts) -> None:
    experts.gate_up_scale = experts.get_buffer("gate_up_scale").float()


def _forget(experts: FrozenExperts) -> None:
    experts.n_experts -= 1


@pytest.mark.parametrize(
    ("spoil", "word"), [(_unfreeze, "parameters"), (_widen, "torch.float32"), (_forget, "expected")]
)
def test_census_refuses_what_is_not_frozen_in_four_bits(
    tmp_path: Path, spoil: Callable[[FrozenExperts], None], word: str
) -> None:
    family, model = load_model(str(saved(tmp_path / "m", "deepseek_v3")), expert_format="int4-g32")
    spoil(experts_of(model)[2])
    with pytest.raises(ModelError, match=f"layer 2.*{word}"):
        quantized_expert_counts(model, family)


def test_census_refuses_unquantized_experts(tmp_path: Path) -> None:
    family, model = load_model(str(saved(tmp_path / "m", "qwen3_moe")))
    with pytest.raises(ModelError, match=r"layer 1: .*not frozen"):
        quantized_expert_counts(model, family)


def test_bind_refuses_frozen_experts_of_another_size(tmp_path: Path) -> None:
    _, model = load_model(str(saved(tmp_path / "m", "deepseek_v3")), expert_format="nf4")
    _forget(experts_of(model)[2])
    with pytest.raises(ModelError, match="layer 2: experts"):
        bind(model, FAMILIES["deepseek_v3"])


# --- dense weights in 4 bits -----------------------------------------------------------------------------------------


@every_family
def test_dense_linears_in_four_bits(tmp_path: Path, family: str) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    folder = saved(tmp_path / "m", family, torch.bfloat16)
    known, model = load_model(str(folder), expert_format="int4-g32", dense="nf4")
    anatomy = bind(model, known)
    quantized = {path for path, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit)}
    dense = [i for i in range(models.LAYERS) if i not in models.moe_layers(family)]
    assert quantized == {
        *anatomy.lora_targets,
        *(f"model.layers.{i}.mlp.{place}" for i in dense for place in PROJECTIONS),
    }
    state: Any = model.get_submodule(anatomy.attention[0]).get_parameter("weight")
    assert (state.quant_state.quant_type, state.quant_state.nested) == ("nf4", True)
    plain = {g.name: g for g in parameter_counts(load_model(str(folder))[1], anatomy, lora_rank=4)}
    groups = {g.name: g for g in parameter_counts(model, anatomy, lora_rank=4)}
    assert {n: g.parameters for n, g in groups.items()} == {n: g.parameters for n, g in plain.items()}
    assert {n: g.trained_bytes for n, g in groups.items()} == {n: g.trained_bytes for n, g in plain.items()}

    model.save_pretrained(tmp_path / "again")
    _, again = load_model(str(tmp_path / "again"), expert_format="int4-g32", dense="nf4")
    assert bits(again) == bits(model)
    assert torch.equal(helpers.logits(again), helpers.logits(model))
    with pytest.raises(ModelError, match=r"dense = 'keep', but .* saved with dense = 'nf4'"):
        load_model(str(tmp_path / "again"), expert_format="int4-g32")


@pytest.mark.parametrize("hidden", [32, 64])  # rows of half a block and of a whole one
@pytest.mark.parametrize("repacking", [False, True])
def test_dense_in_four_bits_is_the_same_on_every_processor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, repacking: bool, hidden: int
) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: repacking, raising=False)
    folder = saved(tmp_path / "m", "qwen3_moe", hidden_size=hidden)
    tensors = on_disk(folder)
    _, model = load_model(str(folder), expert_format="int4-g32", dense="nf4")
    before, states = bits(model), torch.randn(3, 5, hidden, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        seen = model(inputs_embeds=states).logits
    assert bits(model) == before
    for path, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            matrix = tensors[f"{path}.weight"]
            rows, columns = matrix.shape
            weight = FORMATS["nf4"].dequantize(FORMATS["nf4"].quantize(matrix), rows, columns, torch.float32)
            x = torch.randn(5, matrix.shape[1], generator=torch.Generator().manual_seed(1))
            ours: Any = module
            assert torch.allclose(ours(x), x @ weight.T, rtol=0.02, atol=0.05)  # computed in bf16
    again = model(inputs_embeds=states.requires_grad_()).logits
    again.square().mean().backward()
    assert torch.allclose(again, seen, rtol=1e-4, atol=1e-4)
    assert states.grad is not None and states.grad.abs().max() > 0
    model.save_pretrained(tmp_path / "again")
    assert bits(load_model(str(tmp_path / "again"), expert_format="native", dense="nf4")[1]) == before


def test_dense_in_four_bits_needs_bitsandbytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved(tmp_path / "m", "qwen3_moe")
    monkeypatch.setattr("gtqlora.experts.quantizer.find_spec", lambda name: None)
    with pytest.raises(ModelError, match="pip install bitsandbytes"):
        load_model(str(folder), expert_format="nf4", dense="nf4")


# --- saved and loaded again ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "format", "shard"),
    [*product(models.CORE, FORMATS, ["5GB", "8KB"]), *((family, "nf4", "5GB") for family in models.OTHERS)],
)
def test_saved_model_comes_back_bit_for_bit(tmp_path: Path, family: str, format: str, shard: str) -> None:
    known, model = load_model(str(saved(tmp_path / "m", family)), expert_format=format)
    model.save_pretrained(tmp_path / "again", max_shard_size=shard)
    assert (len(list((tmp_path / "again").glob("*.safetensors"))) > 10) == (shard == "8KB")
    for experts in ("native", format):
        _, again = load_model(str(tmp_path / "again"), expert_format=experts)
        assert bits(again) == bits(model)
    own = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert bits(own) == bits(model)
    assert own.config.quantization_config.format == format
    names = on_disk(tmp_path / "again")
    stem = "block_sparse_moe.experts.7.w3" if family == "mixtral" else "mlp.experts.7.up_proj"
    assert f"model.layers.2.{stem}.packed" in names
    assert quantized_expert_counts(own, known) == quantized_expert_counts(model, known)
    assert inspect(str(tmp_path / "again")).quantized == "gtqlora"


def test_saving_does_not_copy_the_experts(tmp_path: Path) -> None:
    model: Any = load_model(str(saved(tmp_path / "m", "qwen3_moe")), expert_format="int4-g32")[1]
    state, _ = model.hf_quantizer.get_state_dict_and_metadata(model)
    held = experts_of(model)[1].get_buffer("down_packed")
    found = state["model.layers.1.mlp.experts.3.down_proj.packed"]
    assert found.data_ptr() == held[3, 0].data_ptr()
    assert found.untyped_storage().nbytes() == held[3, 0].nbytes


def test_state_dict_of_the_model(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m", "qwen3_moe")
    _, model = load_model(str(folder), expert_format="nf4")
    other = saved(tmp_path / "other", "qwen3_moe", seed=1)
    _, target = load_model(str(other), expert_format="nf4")
    assert bits(target) != bits(model)
    target.load_state_dict(model.state_dict())
    assert bits(target) == bits(model)


def test_part_of_the_experts_is_not_saved(tmp_path: Path) -> None:
    _, model = load_model(str(saved(tmp_path / "m", "qwen3_moe")), expert_format="nf4", expert_range=(1, 2))
    with pytest.raises(ModelError, match="part 1 of 2"):
        model.save_pretrained(tmp_path / "again")


def test_config_survives_json() -> None:
    config = FrozenExpertsConfig(format="int4-g128", dense="nf4", expert_range=(1, 4), kernel="reference")
    again: Any = FrozenExpertsConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert vars(again) == vars(config) and again.expert_range == (1, 4)


# --- memory ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 80 MB in bf16, almost all of them experts; one layer has 38 MB."""
    sizes: Any = {"hidden_size": 768, "moe_intermediate_size": 512, "num_experts": 16, "head_dim": 32}
    folder = tmp_path_factory.mktemp("big") / "m"
    return models.save_tiny(folder, "qwen3_moe", dtype=torch.bfloat16, tokenizer=False, max_shard_size="20MB", **sizes)


_PEAKS = """
import ctypes, os, sys
M_MMAP_THRESHOLD = -3
assert ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 65536)  # so that freed memory is returned and not counted
import transformers.integrations.moe, transformers.models.qwen3_moe.modeling_qwen3_moe
from bench.loading import child
from gtqlora.experts import load_model
for expert_format in sys.argv[3:]:
    if os.fork() == 0:
        child(*sys.argv[1:3], expert_format)
        sys.stdout.flush()
        os._exit(0)
    assert os.wait()[1] == 0
"""
"""Loads in each format in a child of its own; the parent has only imported what they need, which takes seconds."""
FORMATS_LOADED = ("nf4", "int4-g32", "bf16")


@pytest.fixture(scope="module")
def excess(big: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """By format: bytes of anonymous memory that a load takes at its peak beyond what the model takes afterwards."""
    small = saved(tmp_path_factory.mktemp("small") / "m", "qwen3_moe", torch.bfloat16)
    done = warm.process(_PEAKS, small, big, *FORMATS_LOADED)
    assert done.returncode == 0, done.stderr
    lines = [map(int, line.split()) for line in done.stdout.splitlines()]
    return {name: peak - final for name, (peak, final) in zip(FORMATS_LOADED, lines, strict=True)}


@pytest.mark.parametrize("expert_format", FORMATS_LOADED)
def test_peak_memory_of_loading(excess: dict[str, int], expert_format: str) -> None:
    """Frozen experts need the final size and little more; transformers' own merge of a layer, the control, does not."""
    matrix, overhead = 2 * 768 * 512, 6 * 2**20
    assert (excess[expert_format] <= 2 * matrix + overhead) == (expert_format != "bf16")


@pytest.mark.gpu
@pytest.mark.parametrize("expert_format", FORMATS)
def test_quantizing_happens_on_the_gpu_within_memory(big: Path, expert_format: str) -> None:
    _, expected = load_model(str(big), expert_format=expert_format)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    _, model = load_model(str(big), expert_format=expert_format, device="cuda")
    final, peak = torch.cuda.memory_allocated() - before, torch.cuda.max_memory_allocated() - before
    assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {"cuda"}
    matrix, overhead = 2 * 768 * 512, 6 * 2**20
    assert peak <= final + 2 * matrix + overhead
    model.cpu()  # pyright: ignore[reportCallIssue]
    assert bits(model).keys() == bits(expected).keys()
    if expert_format != "nf4":  # whose mean of scales may add up in another order there
        assert bits(model) == bits(expected)


def test_ddp_leaves_the_experts_alone(tmp_path: Path) -> None:
    folder = models.save_tiny(tmp_path / "m", "deepseek_v3")
    _, model = load_model(str(folder), expert_format="nf4")
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        sent = {id(buffer) for buffer in DistributedDataParallel(model).modules_buffers}
    finally:
        distributed.destroy_process_group()
    held = [b for m in model.modules() if isinstance(m, FrozenExperts) for b in m.buffers()]
    assert held and not any(id(buffer) in sent for buffer in held)
    assert sent  # others are
