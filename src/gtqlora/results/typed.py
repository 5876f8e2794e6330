# pyright: strict
"""Turn records into JSON and back. What a file holds is untrusted, so reading is strict.

A record is a dataclass whose fields are numbers, texts, flags, literals, None, records, or lists, tuples, dictionaries
and unions of these. A key more, a key less or a value of another type is a `Mismatch`, whose message says where.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from math import isfinite
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from gtqlora.storage.contents import KINDS, in_json

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")
_Reader = Callable[[object, str], object]
"""(value, where it stands, such as `experts[0].ablate`) -> the value as it should be; it raises `Mismatch`."""

_EXACT = frozenset[object]({str, bool, int, NoneType})
"""Plain types of which any value will do, unlike numbers, which have to be finite."""


class Mismatch(ValueError):
    """Something in a value is not of the type that it should be; the message names its key."""


def to_json(record: DataclassInstance) -> dict[str, object]:
    """Return a record, and the records in it, as plain dictionaries under the names of their fields."""
    # not `asdict`, which copies every text and number deeply, one by one: there may be a row for every prompt
    return {name: _plain(getattr(record, name)) for name in _hints(type(record))}


def _plain(value: object) -> object:
    """Return a field's value with the records in it as dictionaries."""
    if is_dataclass(value):
        return to_json(cast("DataclassInstance", value))
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in cast("dict[object, object]", value).items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in cast("Sequence[object]", value)]
    return value


def from_json(kind: type[T], value: object) -> T:
    """Return the record that a JSON value spells.

    Raises:
        Mismatch: an unknown or missing key, or a value of another type; the message names the first one.
    """
    return cast(T, _record(kind, value, ""))


@functools.cache
def _reader(hint: object) -> _Reader:
    """Return what reads values of a type hint; worked out once, since there may be a row for every prompt or expert."""
    origin, inner = get_origin(hint), get_args(hint)
    # `X | None` is a UnionType, `Optional[X]` a Union; both may stand in a record
    if origin in (UnionType, Union):
        return functools.partial(_one_of, inner, [_reader(each) for each in inner if each is not NoneType])
    if origin in _CONTAINERS:
        return functools.partial(_CONTAINERS[origin], [_reader(each) for each in inner if each is not Ellipsis])
    if is_dataclass(hint):
        return functools.partial(_record, cast("type[DataclassInstance]", hint))
    return functools.partial(_literal, inner) if origin is Literal else functools.partial(_plain_one, hint)


def _literal(known: tuple[object, ...], value: object, place: str) -> object:
    if value not in known:
        raise Mismatch(f"{place!r} is {value!a}, none of {', '.join(map(repr, known))}")
    return value


def _plain_one(hint: object, value: object, place: str) -> object:
    if not _is_plain(value, hint):
        raise Mismatch(f"{place!r} is {in_json(value)}, not {KINDS.get(hint, str(hint))}")
    return value


def _is_plain(value: object, hint: object) -> bool:
    """Check a number, text, flag or None; numbers are finite, and a flag is no number."""
    if hint is object:
        return True
    if hint is float:
        return is_number(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    # text, flag, None, and nothing else: a hint that is no plain type fits no value
    return isinstance(hint, type) and isinstance(value, hint)


def is_number(value: object) -> bool:
    """Return whether it is a finite number that a float can hold; a flag is none."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)
    except OverflowError:  # JSON sets whole numbers no limit
        return False


def _record(kind: type[DataclassInstance], value: object, place: str) -> DataclassInstance:
    if not isinstance(value, Mapping):
        found = in_json(value)
        raise Mismatch(f"{place!r} is {found}, not an object" if place else f"holds {found}, no object")
    entries, hints, found = cast("Mapping[str, object]", value), _hints(kind), dict[str, object]()
    at = f"{place} has" if place else "has"
    # unknown keys first: they tell an older version's file better than what is missing for them
    for key in entries:
        if key not in hints:
            raise Mismatch(f"{at} {key!a}, which this version does not know")
    for key in hints:
        if key not in entries and key not in _optional(kind):
            raise Mismatch(f"{at} no {key!a}")
    for key, entry in entries.items():
        hint = hints[key]
        # nearly all values are of just the plain type that is wanted
        plain = hint is type(entry) and hint in _EXACT
        found[key] = entry if plain else _reader(hint)(entry, f"{place}.{key}" if place else key)
    return kind(**found)


def _one_of(hints: tuple[object, ...], readers: Sequence[_Reader], value: object, place: str) -> object:
    """Return a value as the first of a union's types that it fits; else what is wrong with it as the likeliest one."""
    # before the others, so that what is wrong is told of the type that a value is meant to have
    if value is None and NoneType in hints:
        return None
    if type(value) in hints and type(value) in _EXACT:
        return value
    wrong: Mismatch | None = None
    for read in readers:
        try:
            return read(value, place)
        except Mismatch as error:
            wrong = wrong or error
    raise wrong or Mismatch(f"{place!r} is {in_json(value)}, not null")


def _list(readers: Sequence[_Reader], value: object, place: str) -> list[object]:
    if not isinstance(value, list | tuple):
        raise Mismatch(f"{place!r} is {in_json(value)}, not a list")
    entries, read = cast("Sequence[object]", value), readers[0]
    return [read(entry, f"{place}[{i}]") for i, entry in enumerate(entries)]


def _tuple(readers: Sequence[_Reader], value: object, place: str) -> tuple[object, ...]:
    return tuple(_list(readers, value, place))


def _dict(readers: Sequence[_Reader], value: object, place: str) -> dict[str, object]:
    if not isinstance(value, dict):
        raise Mismatch(f"{place!r} is {in_json(value)}, not an object")
    entries, read = cast("dict[str, object]", value), readers[1]
    return {key: read(entry, f"{place}.{key}") for key, entry in entries.items()}


_CONTAINERS: dict[object, Callable[[Sequence[_Reader], object, str], object]] = {
    list: _list,
    tuple: _tuple,
    dict: _dict,
}


@functools.cache
def _hints(kind: type[DataclassInstance]) -> dict[str, object]:
    """Return field -> type; worked out once, since there may be a row for every prompt or expert."""
    hints = get_type_hints(kind)
    return {f.name: hints[f.name] for f in fields(kind)}


@functools.cache
def _optional(kind: type[DataclassInstance]) -> frozenset[str]:
    """Return the fields that have a default: a file may leave them out."""
    return frozenset(f.name for f in fields(kind) if f.default is not MISSING or f.default_factory is not MISSING)
