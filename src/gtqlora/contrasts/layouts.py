"""Columns of public sets of prompts, as data: which column is the prompt, and what a row of the set is.

Taken from the sets' own files and cards (July 2025); what a set's columns do not tell, such as the kind where there is
only `text`, its name has to tell. Sets that are not here are described by the user, see `described`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from gtqlora.contrasts.sources import one_of
from gtqlora.errors import ConfigError, ContrastError

KINDS = ("benign", "lookalike", "harmful", "instructed")
AS = "--as KIND:prompt=COLUMN"
_FIELDS = ("prompt", "system", "where", "topic", "pair", "opening", "answer", "of")
_INSTRUCTED = "instructed"


@dataclass(frozen=True)
class When:
    """A rule: rows are of a kind if a column's value, or the set's name where no column is given, matches as a whole.

    Attributes:
        kind: "" leaves the row out.
        matches: a regular expression; case does not count, and a missing value is "".
    """

    kind: str
    column: str = ""
    matches: str = ".*"


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How the rows of one set are read.

    Attributes:
        columns: those by which it is known; of several that fit, the one with most columns.
        prompt: the column of the prompt.
        kinds: rules; the first that fits decides, and a row that none fits is left out.
        system: of instructed rows: the column of the system prompt that says what is declined.
        instruction: that prompt itself, where it is the same in all rows.
        before, behind: columns of texts that belong in front of the prompt, or behind it.
        topics: columns of what a row is about; the first that has a value.
        pair: the column that rows of one pair share, across the files of the set.
        in_order: pairs go by position: the i-th row of a value of this column with the i-th of the value it contrasts.
        opening: the column of an affirmative opening, for harmful rows.
        answer: the column of an answer, for harmless rows.
        focus: the column of the word that triggers refusals.
        called: what the name of the set holds, where others have the same columns; they are under other licences.
    """

    name: str
    columns: tuple[str, ...]
    prompt: str
    kinds: tuple[When, ...]
    system: str = ""
    instruction: str = ""
    before: str = ""
    behind: str = ""
    topics: tuple[str, ...] = ()
    pair: str = ""
    in_order: str = ""
    opening: str = ""
    answer: str = ""
    focus: str = ""
    called: str = ""
    licence: str = "unknown"
    url: str = ""


_HARMFUL = (When("harmful"),)
_HARMFUL_NAME = (
    r".*(harmful|toxic|advbench|harmbench|malicious|strong_?reject|tdc|jailbreakbench|do-?not-?answer|(?<!\w)unsafe).*"
)
_BENIGN_NAME = r".*(harmless|benign|alpaca|unharmful).*"
# Where columns do not tell the kind. A name that says both, or neither, has to be described by the user.
_BY_NAME = (
    When("", matches=rf"(?={_HARMFUL_NAME}){_BENIGN_NAME}"),
    When("benign", matches=_BENIGN_NAME),
    When("harmful", matches=_HARMFUL_NAME),
    When("lookalike", matches=r".*(or-?bench|over-?refus|lookalike).*"),
)

LAYOUTS = (
    Layout(
        name="XSTest",
        columns=("prompt", "type", "focus"),
        prompt="prompt",
        kinds=(When("harmful", "type", "contrast_.+"), When("lookalike", "type", ".+")),
        topics=("focus", "note", "type"),
        in_order="type",
        focus="focus",
        licence="CC-BY-4.0",
        url="https://github.com/paul-rottger/xstest",
    ),
    Layout(
        name="AdvBench",
        columns=("goal", "target"),
        prompt="goal",
        kinds=_HARMFUL,
        opening="target",
        licence="MIT",
        url="https://github.com/llm-attacks/llm-attacks",
    ),
    Layout(
        name="JailbreakBench",
        columns=("Goal", "Target", "Behavior", "Category"),
        prompt="Goal",
        kinds=(*_BY_NAME[:2], When("harmful")),
        topics=("Category",),
        pair="Index",
        opening="Target",
        licence="MIT",
        url="https://huggingface.co/datasets/JailbreakBench/JBB-Behaviors",
    ),
    Layout(
        name="HarmBench",
        columns=("Behavior", "FunctionalCategory", "SemanticCategory"),
        prompt="Behavior",
        # Copyright rows ask for texts and not for harm: what models do there is not refusal as it is meant here.
        kinds=(When("", "FunctionalCategory", "copyright"), When("harmful")),
        before="ContextString",
        topics=("SemanticCategory",),
        licence="MIT",
        url="https://github.com/centerforaisafety/HarmBench",
    ),
    Layout(
        name="StrongREJECT",
        columns=("forbidden_prompt", "category"),
        prompt="forbidden_prompt",
        kinds=_HARMFUL,
        topics=("category",),
        licence="MIT",
        url="https://github.com/alexandrasouly/strongreject",
    ),
    Layout(
        name="Do-Not-Answer",
        columns=("question", "risk_area", "types_of_harm", "specific_harms"),
        prompt="question",
        kinds=_HARMFUL,
        topics=("specific_harms", "types_of_harm"),
        licence="CC-BY-NC-SA-4.0 (data), not for commercial use",
        url="https://github.com/Libr-AI/do-not-answer",
    ),
    Layout(
        name="OR-Bench",
        called="or-?bench",
        columns=("prompt", "category"),
        prompt="prompt",
        kinds=_BY_NAME,
        topics=("category",),
        licence="CC-BY-4.0",
        url="https://huggingface.co/datasets/bench-llm/or-bench",
    ),
    Layout(
        name="refusal_direction",
        called="harm(ful|less)_(train|val|test)",
        columns=("instruction", "category"),
        prompt="instruction",
        kinds=_BY_NAME,
        topics=("category",),
        licence="Apache-2.0; its rows are those of other sets, under their own licences",
        url="https://github.com/andyrdt/refusal_direction",
    ),
    Layout(
        name="Alpaca",
        columns=("instruction", "output"),
        prompt="instruction",
        kinds=(When("benign"),),
        behind="input",
        answer="output",
        licence="CC-BY-NC-4.0, not for commercial use",
        url="https://github.com/tatsu-lab/stanford_alpaca",
    ),
    Layout(
        name="WildGuardMix",
        columns=("prompt", "prompt_harm_label", "adversarial"),
        prompt="prompt",
        kinds=(
            When("harmful", "prompt_harm_label", "harmful"),
            When("", "prompt_harm_label", "(?!unharmful$).*"),
            When("lookalike", "adversarial", "true"),
            When("benign"),
        ),
        topics=("subcategory",),
        answer="response",
        licence="ODC-BY, and AI2's Responsible Use Guidelines",
        url="https://huggingface.co/datasets/allenai/wildguardmix",
    ),
    # Last, as they fit much: lists of texts, such as MaliciousInstruct, TDC2023 or mlabonne's two.
    Layout(name="a list of texts", columns=("text",), prompt="text", kinds=_BY_NAME),
    Layout(name="a list of prompts", columns=("prompt",), prompt="prompt", kinds=_BY_NAME),
)


@dataclass(frozen=True, kw_only=True)
class Description:
    """How the user says that rows are read.

    Attributes:
        text: the user's own words.
        of: a part of the names of the sources that are meant.
    """

    layout: Layout
    text: str
    of: str = ""


def described(text: str) -> Description:
    """Return what `--as KIND:prompt=COLUMN,where=COLUMN=VALUE,topic=COLUMN,pair=COLUMN,of=NAME` says.

    Instructed rows have `system=COLUMN`, or the system prompt of all rows in its place, too.

    Raises:
        ConfigError: it says something else.
    """
    kind, given = _fields(text)
    column, equals, value = given.get("where", "").partition("=")
    if not given.get("prompt") or not all(given.values()) or ("where" in given and not (equals and value)):
        raise ConfigError(f"--as {text}: write KIND:prompt=COLUMN, and maybe ,where=COLUMN=VALUE,topic=COLUMN,of=NAME")
    rule = When(kind, column, re.escape(value)) if column else When(kind)
    named = {name: given[name] for name in ("system", "pair", "opening", "answer") if name in given}
    layout = Layout(
        name="as described",
        columns=(given["prompt"],),
        prompt=given["prompt"],
        kinds=(rule,),
        topics=(given["topic"],) if "topic" in given else (),
        **named,
    )
    return Description(layout=layout, text=text, of=given.get("of", ""))


def _fields(text: str) -> tuple[str, dict[str, str]]:
    """Return the kind and the fields of a description."""
    kind, _, rest = text.partition(":")
    try:
        one_of("KIND", kind, KINDS)
        parts = [part.partition("=") for part in re.split(rf",(?=(?:{'|'.join(_FIELDS)})=)", rest)]
        given = {one_of("field", field, _FIELDS): value for field, _, value in parts}
    except ContrastError as error:
        raise ConfigError(f"--as {text}: {error}") from error
    if (kind == _INSTRUCTED) != ("system" in given):
        raise ConfigError(
            f"--as {text}: instructed rows, and no others, need a system prompt that says what is declined; write "
            "instructed:prompt=COLUMN,system=COLUMN, or the prompt itself in place of the second"
        )
    return kind, given


def layouts_of(source: str, columns: Iterable[str], descriptions: Sequence[Description]) -> list[Layout]:
    """Return how a source is read: as the user described it, or as the known set that has these columns.

    Several descriptions may be about one source; each row goes by the first whose rule fits.

    Raises:
        ContrastError: neither is the case, a described column is missing, or the set's name does not tell the kind.
    """
    have = set(columns)
    # What the user says of a source by its name is stronger than what its columns look like.
    if named := [each.layout for each in descriptions if each.of and each.of in source]:
        return _checked(source, named, have)
    known = max(
        (one for one in LAYOUTS if have.issuperset(one.columns)), key=lambda one: len(one.columns), default=None
    )
    told = known is not None and _by_name(known, source)
    if known is not None and told:
        return [told]
    if meant := [each.layout for each in descriptions if not each.of]:
        return _checked(source, meant, have)
    if {"chosen", "rejected"} <= have:
        raise ContrastError(f"{source}: has chosen and rejected already; check it with `gtqlora contrast check`")
    if known is not None:
        raise ContrastError(
            f"{source}: looks like {known.name}, and neither columns nor its name say which kind its rows are; "
            f"say it: {AS.replace('COLUMN', known.prompt)},of={_name(source)}"
        )
    raise ContrastError(
        f"{source}: a set with the columns {', '.join(sorted(have)) or 'none'} is not known; say what they are: {AS} "
        f"(known: {', '.join(one.name for one in LAYOUTS)})"
    )


def _checked(source: str, layouts: list[Layout], have: set[str]) -> list[Layout]:
    layouts = [_instructed(layout, have) for layout in layouts]
    for layout in layouts:
        if missing := {field: column for field, column in _named(layout).items() if column not in have}:
            told = ", ".join(f"{column!r} ({field}=)" for field, column in missing.items())
            own = "; a system prompt in place of its column has several words" if "system" in missing else ""
            raise ContrastError(
                f"{source}: has no column {told}, which --as names; it has {', '.join(sorted(have))}{own}"
            )
    return layouts


def _named(layout: Layout) -> dict[str, str]:
    """Return the columns of a layout that the user described, by the fields that name them."""
    where = next((rule.column for rule in layout.kinds), "")
    topic = next(iter(layout.topics), "")
    fields = {field: getattr(layout, field) for field in ("prompt", "system", "pair", "opening", "answer")}
    return {field: column for field, column in {**fields, "where": where, "topic": topic}.items() if column}


def _instructed(layout: Layout, have: set[str]) -> Layout:
    """Return a layout whose system prompt is a column, or the text itself: what is no column and has several words."""
    if layout.system in have or len(layout.system.split()) < 2:
        return layout
    return replace(layout, system="", instruction=layout.system)


def _name(source: str) -> str:
    """Return the part of a source's name that says what it is: folders above it may be called anything."""
    return Path(source).name


def _by_name(layout: Layout, source: str) -> Layout | None:
    """Return a layout whose rules ask for columns only, as far as the set's name decides; None if it does not."""
    rules: list[When] = []
    for rule in layout.kinds:
        if not rule.column and rule.matches != When.matches:
            if not re.fullmatch(rule.matches, _name(source), re.IGNORECASE):
                continue
            rule = When(rule.kind)
        rules.append(rule)
        if not rule.column:
            break
    if not any(rule.kind for rule in rules):
        return None
    if layout.called and not re.search(layout.called, _name(source), re.IGNORECASE):
        layout = replace(layout, name=f"like {layout.name}", licence=Layout.licence, url="")
    return replace(layout, kinds=tuple(rules))


def value_of(column: str, record: Mapping[str, object]) -> str:
    """Return what a row has in a column, "" if nothing."""
    value = record.get(column)
    return "" if value is None else str(value).strip()


def rule_of(layout: Layout, record: Mapping[str, object]) -> When | None:
    """Return the rule that makes a row one of a kind, None if it is left out."""
    for rule in layout.kinds:
        if re.fullmatch(rule.matches, value_of(rule.column, record), re.IGNORECASE | re.DOTALL):
            return rule if rule.kind else None
    return None
