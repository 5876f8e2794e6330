"""From public sets to distinct prompts: read by their layouts, paired, and without those that come twice."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from gtqlora.contrasts.columns import told_values
from gtqlora.contrasts.layouts import KINDS, Description, Layout, When, layouts_of, rule_of, value_of
from gtqlora.contrasts.near import near_duplicates, shared_subjects
from gtqlora.contrasts.rows import digest, prompt_key
from gtqlora.contrasts.sources import a_prompt, a_text, parsed, records
from gtqlora.errors import ContrastError
from gtqlora.judging.judge import Messages
from gtqlora.progress import report

_PEEK = 200
"""Rows that tell which columns a source has: CSV and JSON leave out empty ones."""
_EVERY = 1000
_CONTRASTED = {
    "real_group_nons_discr": "discr",
    "nons_group_real_discr": "discr",
    "privacy_public": "privacy",
    "privacy_fictional": "privacy",
}
"""Types of XSTest of which two share a contrast, and what that is called; the others are called as their contrast."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A prompt of a public set.

    Attributes:
        place: its source as the user named it, and its row there; what messages may say of it.
        pair: rows that belong together.
        topic: what it is about.
        opening: an affirmative opening that the set gives, of a harmful prompt.
        answer: an answer that the set gives, of a harmless prompt.
        focus: the word that triggers refusals, where the set says it.
    """

    kind: str
    prompt: Messages
    source: str
    number: int
    pair: str
    topic: str | None
    opening: str | None = None
    answer: str | None = None
    focus: str | None = None

    @property
    def told(self) -> int:
        """Return how much its set says of it."""
        return sum(value is not None for value in (self.topic, self.opening, self.answer, self.focus))

    @property
    def bare(self) -> Messages:
        """Return the prompt without its system message."""
        return tuple(message for message in self.prompt if message["role"] != "system")

    @property
    def text(self) -> str:
        """Return the words of the last message."""
        return self.prompt[-1]["content"]


@dataclass(frozen=True, kw_only=True)
class Source:
    """A set that was read: how, and how many rows it has.

    Attributes:
        left_out: rows by the reason for which they are none.
    """

    name: str
    layouts: tuple[Layout, ...]
    rows: int
    left_out: Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class Pool:
    """The distinct prompts of all sources."""

    sources: tuple[Source, ...]
    candidates: tuple[Candidate, ...]


def pool(sources: Sequence[str], descriptions: Sequence[Description] = ()) -> Pool:
    """Read sources, known by their columns or described, and return their distinct prompts.

    Raises:
        ContrastError: a source cannot be read, is not known, or holds no prompt of any kind.
    """
    unused = [each.of for each in descriptions if each.of and not any(each.of in name for name in sources)]
    if unused:
        raise ContrastError(f"--as ... of={unused[0]}: no source is called that; there are {', '.join(sources)}")
    seen = _Seen(descriptions)
    read = [_read(name, descriptions, seen) for name in dict.fromkeys(sources)]
    seen.check()
    found = [one for _, candidates in read for one in candidates]
    kept, twice = _distinct(found)
    told = tuple(replace(source, left_out={**source.left_out, **twice.get(source.name, {})}) for source, _ in read)
    return Pool(sources=told, candidates=tuple(_with_topics(kept)))


# --- one source


class _Seen:
    """Counts what the columns hold by which descriptions choose rows, and how many rows each rule chooses."""

    def __init__(self, descriptions: Sequence[Description]) -> None:
        rules = {rule: each for each in descriptions for rule in each.layout.kinds if rule.column}
        self._descriptions, self._chosen = rules, Counter[When]()
        self._values: dict[When, Counter[str]] = defaultdict(Counter)

    def add(self, record: Mapping[str, object], layouts: Sequence[Layout], chosen: When | None) -> None:
        """Count a row that is read by these layouts."""
        for rule in (rule for layout in layouts for rule in layout.kinds if rule in self._descriptions):
            self._values[rule][value_of(rule.column, record)] += 1
            self._chosen[rule] += rule == chosen

    def check(self) -> None:
        """Check that every rule by which sources were read chooses some rows.

        Raises:
            ContrastError: one does not; the message shows what its column holds.
        """
        for rule, each in self._descriptions.items():
            if rule in self._values and not self._chosen[rule]:
                values = told_values(dict(self._values[rule].most_common()))
                raise ContrastError(f"--as {each.text}: no row is one of these; {rule.column!r} has {values}")


def _read(name: str, descriptions: Sequence[Description], seen: _Seen) -> tuple[Source, list[Candidate]]:
    rows = records(name)
    first = [(number, _record(raw)) for number, raw, _ in islice(rows, _PEEK)]
    columns = {column for _, record in first for column in record}
    if not first:
        raise ContrastError(f"{name}: no rows")
    layouts = layouts_of(name, columns, descriptions)
    found, left_out, count = list[Candidate](), Counter[str](), 0
    positions = _Positions()
    for count, (number, record) in enumerate(_all(first, rows), start=1):
        layout, rule = _chosen(layouts, record)
        seen.add(record, layouts, rule)
        one = _candidate(name, number, record, layout, rule, positions)
        if isinstance(one, Candidate):
            found.append(one)
        else:
            left_out[one] += 1
        if count % _EVERY == 0:
            report(f"reading {name}", count, count)
    if not found:
        seen.check()
        why = "; ".join(f"{n:,} {reason}" for reason, n in left_out.most_common())
        raise ContrastError(f"{name}: no row is a prompt ({why})")
    return Source(name=name, layouts=tuple(layouts), rows=count, left_out=dict(left_out)), found


def _all(
    first: Sequence[tuple[int, Mapping[str, object]]], rest: Iterator[tuple[int, object, str | None]]
) -> Iterator[tuple[int, Mapping[str, object]]]:
    yield from first
    yield from ((number, _record(raw)) for number, raw, _ in rest)


def _record(raw: object) -> Mapping[str, object]:
    """Return a row's values by column; a row that is none is empty, and left out like one without a prompt."""
    try:
        return parsed(raw)
    except ContrastError:
        return {}


class _Positions:
    """Counts rows by the value of a column, for sets whose pairs go by position."""

    def __init__(self) -> None:
        self._seen = Counter[str]()

    def next(self, value: str) -> str:
        """Return the pair of the next row with this value, the same as that of the value it contrasts."""
        place, group = self._seen[value], value.removeprefix("contrast_")
        self._seen[value] += 1
        return f"{_CONTRASTED.get(group, group)}-{place}"


def _chosen(layouts: Sequence[Layout], record: Mapping[str, object]) -> tuple[Layout, When | None]:
    """Return the first layout by which a row is of a kind, and the rule of it; None if there is none."""
    return next(((one, rule) for one in layouts if (rule := rule_of(one, record))), (layouts[0], None))


def _candidate(
    name: str,
    number: int,
    record: Mapping[str, object],
    layout: Layout,
    rule: When | None,
    positions: _Positions,
) -> Candidate | str:
    """Return a row's prompt, or why it is none."""
    # Counted also where the row is left out, as positions are of the whole set.
    place = positions.next(str(record.get(layout.in_order))) if layout.in_order else ""
    if rule is None:
        return "of no kind that is used"
    kind = rule.kind
    try:
        prompt = a_prompt("prompt", _whole(layout, record))
        if kind == "instructed":
            told = a_text("system", layout.instruction or record.get(layout.system)).strip()
            prompt = ({"role": "system", "content": told}, *prompt)
    except ContrastError:
        return "no readable prompt"
    pair = place or (str(record[layout.pair]) if record.get(layout.pair) is not None else "")
    harmful = kind == "harmful"
    return Candidate(
        kind=kind,
        prompt=prompt,
        source=name,
        number=number,
        pair=f"{layout.name}-{pair}" if pair else digest(prompt_key(prompt)),
        topic=_topic(layout, record),
        opening=_text(record, layout.opening) if harmful else None,
        answer=None if harmful else _text(record, layout.answer),
        focus=_text(record, layout.focus),
    )


def _whole(layout: Layout, record: Mapping[str, object]) -> object:
    """Return the prompt with what belongs in front of it and behind it."""
    prompt = record.get(layout.prompt)
    if not isinstance(prompt, str) or not prompt.strip():
        return prompt
    parts = (_text(record, layout.before), prompt.strip(), _text(record, layout.behind))
    return "\n\n".join(part for part in parts if part)


def _text(record: Mapping[str, object], column: str) -> str | None:
    value = record.get(column) if column else None
    try:
        return None if value is None else a_text(column, value).strip()
    except ContrastError:
        return None


def _topic(layout: Layout, record: Mapping[str, object]) -> str | None:
    values = (record.get(column) for column in layout.topics)
    value = next((value for value in values if isinstance(value, str | int) and str(value).strip()), None)
    return None if value is None else f"{layout.name}: {' '.join(str(value).split())}"


# --- all sources


def _distinct(found: Sequence[Candidate]) -> tuple[list[Candidate], dict[str, Counter[str]]]:
    """Return the candidates without repeated ones, and how many of each source those are, by reason."""
    twice: dict[str, Counter[str]] = defaultdict(Counter)
    first: dict[str, Candidate] = {}
    # Harmful first: a prompt that one set calls harmful is not taught as a harmless one of another set. Collections
    # repeat the rows of other sets without what those say of them.
    for one in sorted(found, key=lambda one: (KINDS.index(one.kind), one.told), reverse=True):
        other = first.setdefault(prompt_key(one.prompt), one)
        if other is not one:
            same = "repeated" if other.kind == one.kind else f"called {other.kind} by another row"
            twice[one.source][same] += 1
    kept: list[Candidate] = []
    for kind in KINDS:
        # Only within a kind: a lookalike and its contrast differ in a word or two.
        ours = [one for one in first.values() if one.kind == kind]
        near = near_duplicates([one.text for one in ours])
        for place, one in enumerate(ours):
            if place in near:
                twice[one.source]["nearly the same as another"] += 1
            else:
                kept.append(one)
    return _not_harmful(kept, twice), twice


def _not_harmful(kept: Sequence[Candidate], twice: dict[str, Counter[str]]) -> list[Candidate]:
    """Return the candidates without instructed ones that a set calls harmful: an answer to them is not asked for."""
    harmful = [one.text for one in kept if one.kind == "harmful"]
    instructed = [one for one in kept if one.kind == "instructed"]
    if not instructed:
        return list(kept)
    near = near_duplicates([*harmful, *(one.text for one in instructed)])
    out = {id(one) for place, one in enumerate(instructed, start=len(harmful)) if near.get(place, place) < len(harmful)}
    for one in (one for one in instructed if id(one) in out):
        twice[one.source]["called harmful by another row"] += 1
    return [one for one in kept if id(one) not in out]


def _with_topics(kept: Sequence[Candidate]) -> Iterator[Candidate]:
    """Yield the candidates, each with a topic: what its set says, or what it shares with others of its set."""
    for source in dict.fromkeys(one.source for one in kept):
        without = [one for one in kept if one.source == source and one.topic is None]
        topics = iter(shared_subjects([one.text for one in without]))
        for one in (one for one in kept if one.source == source):
            yield one if one.topic is not None else replace(one, topic=f"subject {next(topics)}")
