"""`bitdelta compress`: a fine-tune becomes one bit a weight on its base, and is written only if it keeps its refusals.

One model is in memory at a time: the fine-tune, which is asked first; then the base, which is asked, given the
variant's weights in place, and asked again. What is asked is, bit for bit, what `bitdelta apply` writes.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from torch import Tensor

from gtqlora import contrasts
from gtqlora.bitdelta.asking import Own, ask
from gtqlora.bitdelta.card import variant_card
from gtqlora.bitdelta.checkpoints import Change, Checkpoints, checkpoints, refuse_equals
from gtqlora.bitdelta.container import (
    FORMAT,
    OWN,
    Record,
    Shards,
    Size,
    Tensors,
    read_tensors,
    write_record,
)
from gtqlora.bitdelta.distil import Distilled
from gtqlora.bitdelta.lowrank import refuse_adapters
from gtqlora.bitdelta.onebit import OneBit, decode, encode
from gtqlora.bitdelta.verdict import Judged, Original, check_rows, check_settings, judged, said
from gtqlora.capture import Subject, open_subject
from gtqlora.config import VerifyConfig
from gtqlora.config.values import require
from gtqlora.contrasts import Contrast, Row, encode_row
from gtqlora.contrasts.statistics import check_rendering
from gtqlora.families.files import CONFIG, PROVENANCE, checked_file, small_names
from gtqlora.floor.ancestry import ancestry
from gtqlora.judging.pair import judges_of
from gtqlora.progress import track
from gtqlora.results.export import CARD, public_name
from gtqlora.results.verdict import HeldOut
from gtqlora.run import fingerprint, sha256_file, sha256_json, versions
from gtqlora.scoring import Runner
from gtqlora.storage.atomic import atomic_write, refuse_existing, refuse_inside

_NOT_OWN = (CONFIG, PROVENANCE)
"""Of a model's small files: the base's config holds for its variants, and provenance is in the record."""
_TRAINING = "train"
_TEXTS = 128
"""Rows that scales are fitted on, at most."""
_COVERED_BYTES = 2
"""Of a weight in 16 bits, to which sizes are compared."""


Encoder = Callable[[Change, Tensor], OneBit]
"""Makes one bit a weight of a difference."""


@dataclass(frozen=True)
class Compressed:
    """Where a variant is, and what was measured of it."""

    folder: Path
    record: Record


def compress(
    base: str, out: Path, config: VerifyConfig, *, name: str | None = None, distill: bool = False
) -> Compressed:
    """Write a fine-tune as one bit a weight on top of its base.

    Args:
        config: its model is the fine-tune; `split` of its pairs is what the floor is judged on.
        name: what the variant is called; by default as the fine-tune.
        distill: fit row scales to what the fine-tune's layers compute on the pairs' benign training prompts.

    Raises:
        ModelError: the two do not go together or are the same, or an adapter is the better form.
        FloorError: the variant does not keep the fine-tune's refusals, or not the base's.
        RunError: OUT exists, or lies in one of the two.
    """
    check_settings(config)
    fits = not distill or config.split not in (_TRAINING, "all")
    require(fits, f"split = {config.split!r}: scales are fitted on the training rows")
    refuse_existing(out)
    both = checkpoints(base, config.model)
    refuse_inside(out, both.base.folder, both.tuned.folder)
    config = replace(config, model=both.tuned.model)  # pinned: a hub id by the commit that was hashed
    # before anything is asked: what is not shipped in this form should not cost hours
    refuse_equals(both)
    refuse_adapters(both)
    judge = judges_of(config.judge, config.second_judge)
    pairs = contrasts.load(config.contrast, judge.judges[0])
    rows = pairs.split(config.split)
    check_rows(rows, config.split)
    texts = _calibration(pairs, config) if distill else ()
    with atomic_write(out, replace=False) as staged:
        staged.mkdir()
        tuned = open_subject(config)
        check_rendering(rows, tuned.tokenizer, tuned.max_length, tuned.vocabulary)
        before = said(Runner.of(tuned, judge.judges[0], config), rows.rows, "the fine-tune")
        made = _written(both, staged, _encoder(both, tuned, texts, config))
        own = Own.of(tuned)
        del tuned  # before the base comes into memory
        asked = ask(both, made.tensors, own, rows.rows, judge.judges[0], config)
        if asked.own:
            made = replace(made, files={**made.files, **_own_files(both, staged)})
        inputs = {
            "adapter": sha256_json(made.files),
            "tuned": both.tuned.digest,
            "base": both.base.digest,
            "contrast": fingerprint(config.contrast),
            "judge": judge.identity,
        }
        held = {
            "tuned": Original.of(both.tuned.model, "the fine-tune", before),
            "base": Original.of(both.base.model, "the base", asked.base),
        }
        found = judged(config, staged, held, asked.variant, rows=rows.rows, inputs=inputs, judge=judge)
        record = _record(both, made, found, config, inputs, name, distill)
        # the record last of what is read: it has the hashes of all else
        write_record(staged, record)
        (staged / CARD).write_text(variant_card(record, both.base.folder), encoding="utf-8")
        for identity in (both.base, both.tuned):
            identity.check_unchanged()
    return Compressed(out, record)


# --- writing ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Made:
    """A variant on disk that nobody has judged yet; see `Record` for what the attributes mean."""

    tensors: Tensors
    files: dict[str, str]
    lost: dict[str, float]
    energy_lost: float
    size: Size


def _calibration(pairs: Contrast, config: VerifyConfig) -> tuple[Row, ...]:
    """Return the rows that scales are fitted on: benign ones for training, which nothing is judged on.

    Raises:
        ConfigError: there are none.
    """
    rows = tuple(row for row in pairs.of_kind("benign") if row.split == _TRAINING)
    require(bool(rows), f"{config.contrast}: no benign rows in split {_TRAINING!r}, on which scales are fitted")
    # drawn, as files are often sorted by topic
    return tuple(random.Random(config.seed).sample(rows, min(_TEXTS, len(rows))))


def _encoder(both: Checkpoints, tuned: Subject, texts: Sequence[Row], config: VerifyConfig) -> Encoder:
    """Return what makes one bit a weight of a difference: from the weights alone, or from what layers compute, too."""
    if not texts:
        return lambda _change, delta: encode(delta)
    tokens = [[*prompt, *chosen] for prompt, chosen in (encode_row(tuned.tokenizer, row) for row in texts)]
    return Distilled(tuned, both.names, tokens, config.batch_size).encode


def _written(both: Checkpoints, staged: Path, encoder: Encoder) -> _Made:
    """Write every tensor that differs; one of each checkpoint is in memory at a time."""
    shards, lost = Shards(staged), dict[str, float]()
    whole = missed = 0.0
    covered = 0
    for change in track(both.changes, "one bit a weight", len(both.changes)):
        pair = change.read()
        if not pair.differs:
            continue
        if not change.one_bit:
            shards.add_dense(change.name, pair.after)
            continue
        delta = pair.delta
        one_bit = encoder(change, delta)
        shards.add_bits(change.name, one_bit)
        energy, missing = float(delta.norm()) ** 2, float(delta.sub(decode(one_bit)).norm()) ** 2
        lost[change.name] = missing / energy
        whole, missed, covered = whole + energy, missed + missing, covered + _COVERED_BYTES * delta.numel()
    shards.flush()
    return _Made(
        tensors=read_tensors(staged, shards.files),
        files=shards.files,
        lost=lost,
        energy_lost=missed / whole if whole else 0.0,
        size=Size(one_bit=shards.one_bit, covered=covered, dense=shards.dense),
    )


def _own_files(both: Checkpoints, staged: Path) -> dict[str, str]:
    """Copy the fine-tune's tokenizer, template and generation settings; return their hashes."""
    # all of them: a template of one model and a tokenizer of the other would be a third thing, which nobody judged
    names = [name for name in small_names(both.tuned.folder) if name not in _NOT_OWN]
    for name in names:
        target = staged / OWN / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(checked_file(both.tuned.folder, name), target)
    return {f"{OWN}/{name}": sha256_file(staged / OWN / name) for name in names}


# --- what is said of it ----------------------------------------------------------------------------------------------


def _record(
    both: Checkpoints,
    made: _Made,
    found: Judged,
    config: VerifyConfig,
    inputs: dict[str, str],
    name: str | None,
    distilled: bool,
) -> Record:
    base, tuned = both.base.model, both.tuned.model
    past = (*ancestry(base).names, public_name(base), *ancestry(tuned).names, public_name(tuned))
    return Record(
        format=FORMAT,
        name=name or public_name(tuned),
        base=public_name(base),
        base_fingerprint=both.base.digest,
        tuned=public_name(tuned),
        tuned_fingerprint=both.tuned.digest,
        ancestors=list(dict.fromkeys(past)),
        spent=found.spent,
        finished=datetime.now(UTC).isoformat(timespec="seconds"),
        judge=inputs["judge"],
        prompts=HeldOut(source=public_name(config.contrast), fingerprint=inputs["contrast"], split=config.split),
        tries=found.tries,
        against_tuned=found.tuned,
        against_base=found.base,
        distilled=distilled,
        energy_lost=made.energy_lost,
        lost=made.lost,
        size=made.size,
        versions=versions(),
        files=made.files,
        template=dict(config.template),
    )
