"""GGUF: what is refused, in one line that names the file, the tensor or the key, before anything is written."""

from __future__ import annotations

import os
import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gtqlora.config import ExportConfig
from gtqlora.errors import GtqloraError, ModelError, RunError
from gtqlora.exports import gguf, gguf_adapter
from gtqlora.exports.gguf.header import header
from gtqlora.exports.gguf.patch import Patch
from gtqlora.exports.gguf.reading import BOOL, STRING, UINT32, Value, read_gguf
from gtqlora.exports.gguf.types import BY_NAME, GgmlType
from gtqlora.exports.gguf.values import rounded
from gtqlora.exports.gguf.whole import Plan
from gtqlora.exports.job import Job
from tests import helpers, models
from tests.exports import ggml
from tests.exports.jobs import job_on
from tests.helpers import exported

Verified = Callable[..., Path]


@pytest.fixture(scope="module")
def run(toy: helpers.Toy, verified: Verified) -> Path:
    return verified(toy.model("deepseek_v3", max_shard_size="30KB"))


@pytest.fixture(scope="module")
def job(toy: helpers.Toy, run: Path) -> Job:
    return job_on(toy.model("deepseek_v3"), run, edited=True)


@pytest.fixture(scope="module")
def base(job: Job, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base") / "base.gguf"
    Plan.of(job).write(path, None)
    return path


# --- files that are no GGUF ------------------------------------------------------------------------------------------


def small(metadata: dict[str, Value] | None = None, *, name: str = "a", shape: tuple[int, ...] = (2, 32)) -> bytearray:
    """A GGUF with one tensor of F32."""
    kind = BY_NAME["F32"]
    return bytearray(header(metadata or {}, {name: (kind, shape)}) + bytes(kind.n_bytes(shape)))


def put(data: bytearray, at: int, form: str, value: int) -> bytearray:
    struct.pack_into(f"<{form}", data, at, value)
    return data


# the only tensor's entry: name (8 + 1), dimensions (4 + 16), type (4), offset (8), from byte 24 on
BROKEN: dict[str, tuple[bytes | bytearray, str]] = {
    "empty": (b"", "cut short"),
    "another magic": (b"GGML" + small()[4:], "does not begin as a GGUF"),
    "another version": (put(small(), 4, "I", 1), "version 1"),
    "big-endian": (put(small(), 4, "I", 3 << 24), "big-endian"),
    "a header cut short": (small()[:40], "cut short"),
    "a tensor cut short": (small()[:-1], "does not lie where its file could hold it"),
    "too many tensors": (put(small(), 8, "Q", 2**40), "1099511627776 tensors"),
    "too many entries": (put(small(), 16, "Q", 2**40), "1099511627776 metadata entries"),
    "a long text": (put(small(), 24, "Q", 2**60), "a text of"),
    "a name that is no text": (put(small(), 32, "B", 0xFF), "not UTF-8"),
    "no dimensions": (put(small(), 33, "I", 0), "0 dimensions"),
    "many dimensions": (put(small(), 33, "I", 99), "99 dimensions"),
    "a dimension of 0": (put(small(), 37, "Q", 0), "has the shape"),
    "a huge dimension": (put(small(), 37, "Q", 2**63), "has the shape"),
    "an unknown type": (put(small(), 53, "I", 4), "type 4"),
    "rows that are no blocks": (put(small(shape=(2, 32)), 53, "I", 12), "rows of 32"),
    "an odd offset": (put(small(), 57, "Q", 1), "does not lie where"),
    "an offset behind the end": (put(small(), 57, "Q", 2**50), "does not lie where"),
    "an odd alignment": (small({"general.alignment": Value(UINT32, 3)}), "alignment of 3"),
    "metadata of an unknown type": (put(small({"k": Value(UINT32, 1)}), 33, "I", 77), "unknown type 77"),
    "a list of lists": (put(small({"k": Value(UINT32, [1])}), 37, "I", 9), "unknown type 9"),
    "a long list": (put(small({"k": Value(BOOL, [True])}), 41, "Q", 2**50), "items in a list"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_files_are_refused_in_one_line(tmp_path: Path, what: str) -> None:
    data, said = BROKEN[what]
    (tmp_path / "a.gguf").write_bytes(data)
    with pytest.raises(ModelError, match=said) as error:
        read_gguf(tmp_path / "a.gguf")
    assert "a.gguf" in str(error.value) and "\n" not in str(error.value)


def test_whole_files_are_read_back(tmp_path: Path) -> None:
    metadata = {"text": Value(STRING, "ä"), "list": Value(STRING, ["a", ""]), "flag": Value(BOOL, True)}
    (tmp_path / "a.gguf").write_bytes(small(metadata))
    found = read_gguf(tmp_path / "a.gguf")
    assert found.metadata == metadata and found.tensors["a"].shape == (2, 32) and found.tensors["a"].n_bytes == 256


def test_tensors_do_not_overlap_or_come_twice(tmp_path: Path) -> None:
    raw: ggml.Raw = (BY_NAME["F32"], (2, 32), bytes(256))
    path = ggml.save(tmp_path / "a.gguf", {}, {"a": raw, "b": raw})
    data = bytearray(path.read_bytes())
    path.write_bytes(put(bytearray(data), 24 + 41 + 33, "Q", 0))
    with pytest.raises(ModelError, match="overlaps"):
        read_gguf(path)
    path.write_bytes(data.replace(b"b", b"a", 1))
    with pytest.raises(ModelError, match="twice"):
        read_gguf(path)


def test_pipes_links_and_folders_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.gguf")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a.gguf").write_bytes(small())
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "a.gguf").symlink_to(tmp_path / "elsewhere" / "a.gguf")
    said = {
        "pipe.gguf": "pipe.gguf", "here/a.gguf": "a.gguf", "none.gguf": "none.gguf: no such file; give a GGUF",
        "elsewhere": "elsewhere: is a folder; give the .gguf in it",
    }  # fmt: skip
    for path, reason in said.items():
        with pytest.raises(ModelError, match=reason):
            read_gguf(tmp_path / path)


def test_a_split_file_with_a_part_missing_or_of_another_is_refused(base: Path, tmp_path: Path) -> None:
    first = ggml.split(base, tmp_path, 3)
    second = first.with_name("part-00002-of-00003.gguf")
    with pytest.raises(ModelError, match="give that one"):
        read_gguf(second)
    kept = second.read_bytes()
    second.write_bytes(first.read_bytes())
    with pytest.raises(ModelError, match="part 2 of 3"):
        read_gguf(first)
    second.write_bytes(kept)
    assert len(read_gguf(first).tensors) == len(read_gguf(base).tensors)
    first.with_name("part-00003-of-00003.gguf").unlink()
    with pytest.raises(ModelError, match="part-00003-of-00003"):
        read_gguf(first)


# --- files that are not of this model --------------------------------------------------------------------------------


def changed(base: Path, path: Path, change: Callable[[dict[str, Value], dict[str, ggml.Raw]], object]) -> Path:
    given = read_gguf(base)
    metadata, tensors = dict(given.metadata), ggml.tensors_of(given)
    change(metadata, tensors)
    return ggml.save(path, metadata, tensors)


def flipped(raw: ggml.Raw) -> ggml.Raw:
    kind, shape, data = raw
    return kind, shape, bytes([data[0] ^ 1]) + data[1:]


OTHERS: dict[str, tuple[Callable[[dict[str, Value], dict[str, Any]], object], str]] = {
    "architecture": (lambda m, _: m.update({"general.architecture": Value(STRING, "llama")}), "architecture 'llama'"),
    "experts": (lambda m, _: m.update({"deepseek2.expert_count": Value(UINT32, 9)}), "expert_count is 9"),
    "layers": (lambda m, _: m.update({"deepseek2.block_count": Value(UINT32, 61)}), "has 61 layers"),
    "softmax": (lambda m, _: m.pop("deepseek2.expert_gating_func"), "scoring_func"),
    "a missing tensor": (lambda _, t: t.pop("blk.1.attn_k_b.weight"), "no tensor blk.1.attn_k_b.weight"),
    "one too many": (lambda _, t: t.update({"blk.1.x.weight": t["output_norm.weight"]}), "blk.1.x.weight"),
    "another shape": (lambda _, t: t.update({"output.weight": t["output_norm.weight"]}), "output.weight is"),
    "another revision": (
        lambda _, t: t.update({"blk.2.attn_output.weight": flipped(t["blk.2.attn_output.weight"])}),
        "blk.2.attn_output.weight .F32. is not the base's",
    ),
    "another norm": (
        lambda _, t: t.update({"output_norm.weight": flipped(t["output_norm.weight"])}),
        "output_norm.weight .F32. is not the base's",
    ),
}


@pytest.mark.parametrize("what", OTHERS)
def test_a_file_of_another_model_is_refused(job: Job, base: Path, tmp_path: Path, what: str) -> None:
    change, said = OTHERS[what]
    with pytest.raises(ModelError, match=said):
        Patch.of(job, changed(base, tmp_path / "a.gguf", change))


@pytest.mark.parametrize("imatrix", [False, True])
def test_a_file_that_was_edited_already_is_refused(job: Job, base: Path, tmp_path: Path, imatrix: bool) -> None:
    Plan.of(job).write(tmp_path / "merged.gguf", rounded)
    for kind in ("F32", "Q8_0"):
        edited = ggml.quantize(
            tmp_path / "merged.gguf", tmp_path / f"{kind}.gguf", lambda _, k=kind: k, imatrix=imatrix
        )
        with pytest.raises(ModelError, match="edited already"):
            Patch.of(job, edited)


def test_types_that_cannot_be_written_are_refused(job: Job, base: Path, tmp_path: Path) -> None:
    name = "blk.2.attn_q_a.weight"

    def narrow(_: dict[str, Value], tensors: dict[str, ggml.Raw]) -> None:
        kind: GgmlType = BY_NAME["F64"]
        tensors[name] = kind, tensors[name][1], bytes(kind.n_bytes(tensors[name][1]))

    with pytest.raises(RunError, match=f"{name} is F64, which is no type for weights"):
        Patch.of(job, changed(base, tmp_path / "a.gguf", narrow))


# --- models and tokenizers that cannot be written --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "change", "said"),
    [
        ("qwen3_moe", {"mlp_only_layers": [0]}, "no place for a tensor"),
        ("qwen3_moe", {"mlp_only_layers": [], "norm_topk_prob": False}, "norm_topk_prob = False"),
        ("olmoe", {"norm_topk_prob": False}, "num_key_value_heads"),
        ("mixtral", {"sliding_window": 8}, "sliding_window"),
        ("deepseek_v3", {"rope_interleave": False}, "rope_interleave = False"),
        ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func = 'softmax'"),
        ("deepseek_v3", {"a_new_trick": 3}, "a_new_trick"),
        ("deepseek_v3", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}, "'linear'"),
    ],
)
def test_models_that_llama_cpp_computes_otherwise_are_refused(
    run: Path, tmp_path: Path, family: str, change: dict[str, Any], said: str
) -> None:
    model = models.save_tiny(tmp_path / "model", family, **change)
    with pytest.raises(ModelError, match=said):
        Plan.of(job_on(model, run))


def test_a_tokenizer_comes_from_another_file_of_the_model(run: Path, job: Job, base: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(job.model, model)
    models.edit_json(model / "tokenizer.json", lambda old: {**old, "pre_tokenizer": {"type": "Whitespace"}})
    other = job_on(model, run)
    with pytest.raises(RunError, match="--tokenizer"):
        Plan.of(other)
    donated = Plan.of(other, str(base)).metadata
    own = read_gguf(base).metadata
    assert {k: v for k, v in donated.items() if "tokenizer" in k} == {k: v for k, v in own.items() if "tokenizer" in k}
    assert any("tokenizer" in key for key in own)


def test_a_tokenizer_of_another_vocabulary_is_refused(job: Job, base: Path, tmp_path: Path) -> None:
    key = "tokenizer.ggml.tokens"

    def words(metadata: dict[str, Value], count: int) -> Value:
        found = metadata[key].value
        assert isinstance(found, list)
        return Value(STRING, [*found[:100], "▁another", *found[101:]][:count])

    for count, said in ((664, "its token 100 is not the model's"), (663, "has 663 tokens")):
        donor = changed(base, tmp_path / "a.gguf", lambda m, _, n=count: m.update({key: words(m, n)}))
        with pytest.raises(ModelError, match=said):
            Plan.of(job, str(donor))


@pytest.mark.parametrize("settings", [{"onto": "none.gguf"}, {"tokenizer": "none.gguf"}, {"base": "none.gguf"}])
def test_a_wrong_name_is_told_before_the_model_is_hashed(
    job: Job, tmp_path: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    to, module = ("gguf-adapter", gguf_adapter) if "base" in settings else ("gguf", gguf)
    monkeypatch.setattr(module, "identify", lambda _: pytest.fail("was hashed"))
    monkeypatch.setattr(gguf_adapter, "check_whole", lambda _: None)
    with pytest.raises(ModelError, match=r"none\.gguf: no such file"):
        module.write(replace(job, config=ExportConfig(to=to, **settings)), tmp_path)  # type: ignore[arg-type]


def test_nothing_is_left_of_an_export_that_was_refused(run: Path, base: Path, tmp_path: Path) -> None:
    before = base.read_bytes()
    bad = changed(base, tmp_path / "bad.gguf", OTHERS["another norm"][0])
    for settings in ({"onto": str(bad)}, {"onto": str(tmp_path / "none.gguf")}, {"onto": str(base), "tokenizer": "x"}):
        with pytest.raises(GtqloraError):
            exported(run, tmp_path / "out", to="gguf", **settings)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.gguf"]
    assert base.read_bytes() == before
