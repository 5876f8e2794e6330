"""Which folders are served: what was certified for this very base, and nothing else; and the verb from end to end."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import signal
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gtqlora.bitdelta.container import OWN, RECORD, Shards, write_record
from gtqlora.bitdelta.onebit import decode, encode
from gtqlora.bitdelta.resident import Resident, resident
from gtqlora.bitdelta.variants import unchanged
from gtqlora.capture import open_subject
from gtqlora.cli import main
from gtqlora.contrasts.template import encode_prompt
from gtqlora.errors import ConfigError, GtqloraError, ModelError
from gtqlora.families import identify
from gtqlora.run import sha256_file
from tests import models
from tests.bitdelta.test_container import record
from tests.helpers import Toy, exported

Verified = Callable[..., Path]
FAMILY = "deepseek_v3"
LINEAR, NORM = "model.layers.1.self_attn.o_proj.weight", "model.norm.weight"
EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"


@pytest.fixture(scope="module")
def base(toy: Toy) -> Path:
    return toy.model(FAMILY)


@pytest.fixture(scope="module")
def edit(base: Path, verified: Verified, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certified adapter folder."""
    out = tmp_path_factory.mktemp("served") / "edit"
    exported(verified(base), out, to="peft", target="peft")
    return out


def differences() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    weights = dict(models.tiny_model(FAMILY).named_parameters())
    sizes = {LINEAR: weights[LINEAR].shape, EXPERT: (models.INNER, models.HIDDEN), NORM: weights[NORM].shape}
    return {name: 0.1 * torch.randn(size, generator=draw) for name, size in sizes.items()}


def write_bits(folder: Path, fingerprint: str) -> Path:
    """A one-bit variant, as `bitdelta compress` leaves one."""
    folder.mkdir(parents=True)
    shards, found = Shards(folder), differences()
    for name in (LINEAR, EXPERT):
        shards.add_bits(name, encode(found[name]))
    shards.add_dense(NORM, 1 + found[NORM])
    shards.flush()
    write_record(folder, record(shards.files, base_fingerprint=fingerprint))
    return folder


def logits(model: Resident, variant: int) -> Tensor:
    model.batch.begin([variant] * 4)
    with torch.no_grad():
        return model.subject.model(models.some_tokens()).logits


def test_an_adapter_and_a_one_bit_variant_on_one_base(
    base: Path, edit: Path, verified: Verified, tmp_path: Path
) -> None:
    """They say what the merged export says, and what the base with the decoded differences says."""
    model = resident(str(base), [edit, write_bits(tmp_path / "tuned", identify(str(base)).digest)])
    assert model.names == (base.name, "edit", "tuned")
    exported(verified(base), tmp_path / "merged")
    merged, plain = open_subject(str(tmp_path / "merged")), open_subject(str(base))
    with torch.no_grad():
        assert torch.allclose(logits(model, 0), plain.model(models.some_tokens()).logits, atol=1e-5)
        wanted = merged.model(models.some_tokens()).logits
        assert torch.allclose(logits(model, 1), wanted, atol=1e-5 * float(wanted.abs().max()))
        weights, own = dict(plain.model.named_parameters()), differences()
        weights[LINEAR] += decode(encode(own[LINEAR]))
        fused = weights["model.layers.1.mlp.experts.gate_up_proj"]
        fused[3, models.INNER :] += decode(encode(own[EXPERT]))
        weights[NORM].copy_(1 + own[NORM])
        wanted = plain.model(models.some_tokens()).logits
    assert torch.allclose(logits(model, 2), wanted, atol=1e-5 * float(wanted.abs().max()))
    assert not torch.allclose(logits(model, 2), logits(model, 1), atol=1e-2)


def _changed(folder: Path) -> None:
    models.edit_tensors(folder / "adapter_model.safetensors", lambda t: {name: 2 * each for name, each in t.items()})


def _unrecorded(folder: Path) -> None:
    (folder / "export.json").unlink()


def _more(folder: Path) -> None:
    (folder / "adapter_model.bin").write_bytes(b"x")


def _for_others(folder: Path) -> None:
    models.edit_json(folder / "export.json", lambda record: {**record, "target": "vllm"})


def _of_another_base(folder: Path) -> None:
    models.edit_json(folder / "export.json", lambda record: {**record, "base_fingerprint": "0" * 64})


def _other_experts(folder: Path) -> None:
    models.edit_json(folder / "export.json", lambda record: {**record, "expert_format": "nf4"})


def _takes_the_prompt(folder: Path) -> None:
    models.edit_json(folder / "export.json", lambda record: {**record, "template": {"messages": "x"}})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_takes_the_prompt, "export.json: template.messages: the prompt and the special tokens are not settings"),
        (_changed, "not what was certified"),
        (_unrecorded, "no variant that gtqlora certified"),
        (_more, "not what was certified"),
        (_for_others, "written as peft for vllm; serve what `gtqlora export --to peft --for peft` wrote"),
        (_of_another_base, "made from another model"),
        (_other_experts, "judged with experts in nf4"),
        (shutil.rmtree, "no such folder"),
    ],
)
def test_adapters_that_are_not_served(
    base: Path, edit: Path, tmp_path: Path, change: Callable[[Path], object], message: str
) -> None:
    folder = tmp_path / "edit"
    shutil.copytree(edit, folder)
    change(folder)
    with pytest.raises(GtqloraError, match=re.escape(message)):
        resident(str(base), [folder])


def test_a_folder_that_changes_while_it_is_read(base: Path, edit: Path, tmp_path: Path) -> None:
    folder = tmp_path / "edit"
    shutil.copytree(edit, folder)
    with pytest.raises(ModelError, match="was changed while it was read"), unchanged([folder]):
        os.utime(folder / "adapter_model.safetensors")


def test_merged_weights_and_uncertified_adapters_are_not_served(base: Path, verified: Verified, tmp_path: Path) -> None:
    exported(verified(base), tmp_path / "merged")
    with pytest.raises(ModelError, match="written as safetensors"):
        resident(str(base), [tmp_path / "merged"])
    with pytest.raises(ModelError, match="no variant that gtqlora certified"):
        resident(str(base), [verified(base) / "adapter"])


def test_one_bit_variants_of_other_bases_are_not_served(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="made from another model"):
        resident(str(base), [write_bits(tmp_path / "tuned", "0" * 64)])


def test_a_variant_speaks_with_its_own_tokenizer_and_template(base: Path, tmp_path: Path) -> None:
    folder, own = write_bits(tmp_path / "tuned", identify(str(base)).digest), tmp_path / "tuned" / OWN
    own.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(base / name, own)
    template = (own / "chat_template.jinja").read_text()
    (own / "chat_template.jinja").write_text("what of " + template)
    (own / "generation_config.json").write_text('{"eos_token_id": [1, 7]}')
    files = {f"{OWN}/{file.name}": sha256_file(file) for file in own.iterdir()}
    models.edit_json(folder / RECORD, lambda old: {**old, "files": {**old["files"], **files}})
    voices = resident(str(base), [folder]).voices
    assert [voice.stop_ids for voice in voices] == [{1}, {1, 7}]
    plain, changed = (encode_prompt(voice.tokenizer, [{"role": "user", "content": "bade"}]) for voice in voices)
    assert changed[2:] == plain and len(changed) == len(plain) + 2
    (own / "chat_template.jinja").write_text(template)
    with pytest.raises(ModelError, match="was changed since it was written"):
        resident(str(base), [folder])


def test_names_are_told_apart(base: Path, edit: Path, tmp_path: Path) -> None:
    shutil.copytree(edit, tmp_path / "edit")
    with pytest.raises(ModelError, match="another variant is called 'edit', too"):
        resident(str(base), [edit, tmp_path / "edit"])
    shutil.copytree(edit, tmp_path / base.name)
    with pytest.raises(ModelError, match="the base's name and a variant's, too"):
        resident(str(base), [tmp_path / base.name])


def _ask(port: int, path: str, body: object = None) -> Any:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    data = None if body is None else json.dumps(body)
    connection.request("GET" if body is None else "POST", path, data, {"Content-Type": "application/json"})
    return json.loads(connection.getresponse().read())


def _asked_then_interrupted(port: int) -> Any:
    """Ask once the server answers, and press Ctrl-C whatever came of it."""
    body = {"model": "edit", "messages": [{"role": "user", "content": "what of bade"}], "max_tokens": 4}
    for _ in range(600):  # its socket listens long before the model is loaded
        with suppress(OSError):
            _ask(port, "/health")
            break
        time.sleep(0.1)
    else:
        raise AssertionError("it never answered")  # so that nobody would take the signal
    try:
        return _ask(port, "/v1/chat/completions", body)
    finally:
        os.kill(os.getpid(), signal.SIGINT)


def test_the_verb_serves_until_it_is_told_to_stop(base: Path, edit: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(_asked_then_interrupted, port)
        assert main(["bitdelta", "serve", str(base), str(edit), "--port", str(port), "--context", "9999"]) == 0
    assert asked.result()["usage"]["completion_tokens"] <= 4
    serving, limits, stopped = capsys.readouterr().out.splitlines()
    assert serving == f"serving {base.name}, edit on http://127.0.0.1:{port}/v1; Ctrl-C stops"
    assert re.match(r"at most (\d+) tokens .*, \1 of an answer \(the model's own limit, below --context 9999\)", limits)
    assert limits.endswith("; 16 requests at a time, 64 waiting") and stopped == "stopped"


def test_only_loopback(base: Path) -> None:
    from gtqlora.cli.serve import serve

    with pytest.raises(ConfigError, match="only loopback is served"):
        serve(str(base), host="0.0.0.0")
