"""The `contrast build` verb: public sets of prompts, asked of the model, become a checked contrast set with a card."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import chain, zip_longest
from pathlib import Path

from gtqlora import contrasts
from gtqlora.building.answers import said_to
from gtqlora.building.asking import Asking, Question, name_of
from gtqlora.building.assembling import OPENINGS, Said, broken, made, openings_of, with_splits
from gtqlora.building.card import card
from gtqlora.capture import Subject, open_subject
from gtqlora.config import BuildConfig, VerifyConfig, to_dict
from gtqlora.contrasts import Contrast, Row
from gtqlora.contrasts.layouts import Description
from gtqlora.contrasts.loading import check_kinds, check_new, without_problems
from gtqlora.contrasts.public import Candidate, Pool, Source, pool
from gtqlora.contrasts.rows import digest
from gtqlora.contrasts.sources import Problem
from gtqlora.contrasts.statistics import reach, without_misrendered
from gtqlora.contrasts.template import knows
from gtqlora.errors import ContrastError
from gtqlora.families.identity import ModelIdentity, identify
from gtqlora.judging.judge import NamedJudge, judge_of
from gtqlora.judging.labels import ANSWER, REFUSAL
from gtqlora.progress import note
from gtqlora.results.built import BEYOND_LIMIT, Built, BuiltSource, counted
from gtqlora.results.served import ServedModel
from gtqlora.scoring import Runner
from gtqlora.served.identity import check_model, drawn
from gtqlora.served.saying import Served
from gtqlora.stats import ADVISED_PROMPTS, fewest
from gtqlora.storage.atomic import atomic_write, refuse_existing
from gtqlora.storage.journal import Journal

_OF_NO_REPLY = (
    *("model", "contrast", "judge", "device", "batch_size"),
    *("limit", "helpful", "samples", "temperature", "twin_words", "seed"),
)
"""Settings that are known otherwise, that say which prompts are asked and not what is said to them, or that matter for
an answer but for rounding: with less memory a build still goes on."""


def build(
    config: BuildConfig,
    sources: Sequence[str],
    descriptions: Sequence[Description] = (),
    *,
    restart: bool = False,
) -> Built:
    """Make a contrast set of public sets, with the model's own answers and refusals.

    Killed, it goes on where it was when it is called again, to the same result.

    Args:
        restart: begin anew, without the answers of a process that was killed or failed.

    Raises:
        ContrastError: a source is not known or holds no prompts, the model refuses too few of the harmful prompts or
            answers too few of the others, or no row of a kind is left.
        RunError: the output is there already, or another process is making it.
        ConfigError, ModelError: as `judge_of` and `open_subject`.
    """
    out = check_new(Path(config.contrast))
    journal_folder, card_file = out.with_name(f"{out.name}.building"), out.with_suffix(".md")
    if not journal_folder.exists():  # else it is ours, of a process that was killed at the very end
        refuse_existing(card_file)
    found = pool(sources, descriptions)
    judge = judge_of(config.judge)
    chosen = limited(found.candidates, config)
    _check_kinds(chosen)  # before a model is hashed and loaded, which takes minutes
    model = identify(config.model)
    with closing(Journal(journal_folder, _basis(config, model, judge), restart=restart)) as journal:
        _note_kept(journal, chosen)
        subject = open_subject(replace(config, model=model.model))
        model.check_unchanged()
        runner = Runner.of(subject, judge, config)
        asking = Asking(runner=runner, journal=journal, seed=config.seed, temperature=config.temperature)
        asking, served = _served(config, asking, chosen)
        said = said_to(asking, chosen, config)
        rows, dropped = made(said, _openings(subject, said), judge)
        _count_unasked(found, chosen, dropped)
        contrast = _checked(str(out), rows, chosen, subject, dropped)
        built = _summary(config, model, served, out, card_file, found, said, contrast, dropped)
        # The card first: once the pairs are there, nothing is missing.
        with atomic_write(card_file) as staged:
            staged.write_text(card(built), encoding="utf-8")
        contrasts.save(contrast, out)
        journal.remove()
    return built


def _served(config: BuildConfig, asking: Asking, candidates: Sequence[Candidate]) -> tuple[Asking, ServedModel | None]:
    """Let the model of a server be asked, if one is named and its answers to harmless prompts show that it is ours.

    Raises:
        ModelError: it cannot be asked, or is another model.
    """
    if config.generate_with is None:
        return asking, None
    runner = asking.runner
    served = Served.of(runner.model, config.generate_with, config.served or "", at_once=config.batch_size)
    harmless = drawn([one for one in candidates if one.kind in ("benign", "lookalike")], str(config.seed))
    encoded = [asking.encoded(Question(asked=one.prompt, judged=one.prompt)) for one in harmless]
    found = check_model(runner, served, [prompt for prompt in encoded if isinstance(prompt, list)])
    return replace(asking, served=served), found


def _basis(config: BuildConfig, model: ModelIdentity, judge: NamedJudge) -> dict[str, str]:
    """Return what any reply hangs on, by name: with another one of these, nothing that was said before is of use."""
    settings = {key: str(value) for key, value in to_dict(config).items() if key not in _OF_NO_REPLY}
    # With hashes, as what stands under a name may be another model now.
    named = {"model": f"{model.model} ({model.digest[:8]})", "judge": f"{judge.identity}"}
    return {**named, **settings}


def _note_kept(journal: Journal, chosen: Sequence[Candidate]) -> None:
    kept = sum(name_of(one.kind, one.prompt) in journal for one in chosen)
    if len(journal):
        note(f"going on: the answers to {kept:,} of {len(chosen):,} prompts are kept")


def _check_kinds(candidates: Sequence[Candidate]) -> None:
    """Check, before a model is opened, that there is something to contrast.

    Raises:
        ContrastError: no harmful prompts, or nothing else.
    """
    kinds = {one.kind for one in candidates}
    sources = ", ".join(dict.fromkeys(one.source for one in candidates))
    if "harmful" not in kinds:
        raise ContrastError(f"{sources}: no harmful prompts; add a set of them, such as AdvBench: the floor needs them")
    if not kinds & {"benign", "lookalike"}:
        only = " and ".join(sorted(kinds))
        raise ContrastError(f"{sources}: only {only} prompts; add a set of lookalikes, such as XSTest or OR-Bench")


def limited(candidates: Sequence[Candidate], config: BuildConfig) -> list[Candidate]:
    """Return at most `limit` candidates of each kind, of all sources in turns, whole pairs where that can be."""
    by_source: dict[tuple[str, str], list[Candidate]] = defaultdict(list)
    # By pair, so that of two kinds in two files the same pairs are chosen.
    for one in sorted(candidates, key=lambda one: digest(f"{config.seed} {one.pair}")):
        by_source[one.kind, one.source].append(one)
    chosen: list[Candidate] = []
    for kind in contrasts.ALL_KINDS:
        turns = chain.from_iterable(zip_longest(*(found for (own, _), found in by_source.items() if own == kind)))
        chosen += [one for one in turns if one is not None][: config.limit]
    return chosen


def _openings(subject: Subject, said: Sequence[Said]) -> list[str]:
    """Return what harmful rows' `rejected` may be: our phrases, or the model's own where it cannot read those."""
    readable = [opening for opening in OPENINGS if _reads(subject, opening)]
    own = (one.answer or one.text for one in said if one.label == ANSWER or one.answer is not None)
    return readable or openings_of(filter(None, own))


def _reads(subject: Subject, text: str) -> bool:
    """Tell whether the tokenizer has tokens for all of a text."""
    try:
        return knows(subject.tokenizer, text)
    except ContrastError:
        return False


# --- the set


def _count_unasked(found: Pool, chosen: Sequence[Candidate], dropped: dict[str, Counter[str]]) -> None:
    """Add the candidates beyond the limit to what is left out."""
    asked = Counter(one.source for one in chosen)
    for source, count in Counter(one.source for one in found.candidates).items():
        if beyond := count - asked[source]:
            dropped[source][BEYOND_LIMIT] += beyond


def _checked(
    source: str, rows: Sequence[Row], asked: Sequence[Candidate], subject: Subject, dropped: dict[str, Counter[str]]
) -> Contrast:
    """Return the rows in their splits as every stage would take them; why others are left out is added.

    Raises:
        ContrastError: a kind is missing in what is left.
        ModelError: the template fails.
    """
    problems: list[Problem] = []
    margin, level = VerifyConfig.margin, VerifyConfig.level
    split = with_splits(rows, fewest(margin, level), ADVISED_PROMPTS)
    kept = without_problems(split, source, problems)
    _check_left(source, kept, dropped)
    contrast = Contrast(source=source, rows=tuple(kept))
    contrast = without_misrendered(contrast, subject.tokenizer, subject.max_length, problems)
    by_prompt = {contrasts.prompt_key(one.prompt): one.source for one in asked}
    origin = {row.number: by_prompt[contrasts.prompt_key(row.prompt)] for row in rows}
    for problem in problems:
        for number in problem.excess:
            dropped[origin[number]][broken(problem.problem)] += 1
    return contrast


def _check_left(source: str, rows: Sequence[Row], dropped: Mapping[str, Counter[str]]) -> None:
    try:
        check_kinds(rows, source)
    except ContrastError as error:
        kinds = " and ".join(dict.fromkeys(row.kind for row in rows))
        reasons = sum(dropped.values(), Counter[str]()).most_common(3)
        why = "; ".join(counted(n, reason) for reason, n in reasons)
        made = f"only {kinds} prompts became rows" if kinds else "no prompt became a row"
        raise ContrastError(f"{source}: {made}; left out: {why}") from error


def _summary(
    config: BuildConfig,
    model: ModelIdentity,
    served: ServedModel | None,
    out: Path,
    card_file: Path,
    found: Pool,
    said: Sequence[Said],
    contrast: Contrast,
    dropped: Mapping[str, Counter[str]],
) -> Built:
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for row in contrast.rows:
        counts[row.split][row.kind] += 1
    harmful = [one for one in said if one.candidate.kind == "harmful"]
    kept = {contrasts.prompt_key(row.prompt): row for row in contrast.rows}
    own = {contrasts.prompt_key(one.candidate.prompt): one for one in said}
    lookalike = {key: row for key, row in kept.items() if row.kind == "lookalike"}
    return Built(
        file=out,
        card=card_file,
        model=model.model,
        judge=config.judge,
        served=served,
        sources=tuple(_of_source(one, said, kept, dropped.get(one.name, Counter())) for one in found.sources),
        counts={split: dict(counts[split]) for split in contrasts.SPLITS if counts[split]},
        refused=sum(one.label == REFUSAL for one in harmful),
        harmful=len(harmful),
        own_answers=sum(own[key].candidate.answer != row.chosen for key, row in lookalike.items()),
        with_twin=sum(contrast.twin_of(row) is not None for row in lookalike.values()),
        limit=config.limit,
        floor=reach(contrast.rows).note,
    )


def _of_source(source: Source, said: Sequence[Said], kept: Mapping[str, Row], dropped: Counter[str]) -> BuiltSource:
    ours = [one.candidate for one in said if one.candidate.source == source.name]
    left_out = Counter(source.left_out) + dropped
    return BuiltSource(
        # A folder's name says where somebody keeps such sets, which is not for a card.
        name=Path(source.name).name if Path(source.name).expanduser().exists() else source.name,
        layout=" and ".join(dict.fromkeys(layout.name for layout in source.layouts)),
        licence=source.layouts[0].licence,
        url=source.layouts[0].url,
        rows=source.rows,
        asked=dict(Counter(one.kind for one in ours)),
        kept=dict(Counter(one.kind for one in ours if contrasts.prompt_key(one.prompt) in kept)),
        left_out=dict(left_out.most_common()),
    )
