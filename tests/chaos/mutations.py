"""Ways to spoil a file, drawn from a generator of random numbers: the same numbers spoil it in the same way."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from typing import Any

ODD: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        2,
        3,
        7,
        64,
        10**9,
        10**15,
        -(10**9),
        2**63,
        2**31 - 1,
        0.0,
        0.5,
        -0.5,
        1e308,
        1e-320,
    ),
    *(float("nan"), float("inf"), float("-inf"), "", "x", "nf4", "../x", "/etc/passwd", "~", "os:system", "\x1b[2J"),
    *(
        "a" * 5000,
        "\ud800",
        "\0",
        "<script>alert(1)</script>",
        "bfloat16",
        "int8",
        "float64",
        "nan",
        "1e5",
        "{{ 1/0 }}",
    ),
    *([], {}, [[]], [1], ["x"], [None], {"x": 1}, {"": None}, [1] * 300, {"a": {"b": {"c": [1, {"d": 2}]}}}),
)
"""Values for any place. A number of thousands of digits comes in as text, see `_huge`."""
Draw = random.Random


def _paths(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(path for key, entry in inside for path in _paths(entry, (*at, key)))]


def _get(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


def spoilt_json(text: str, draw: Draw) -> str:
    """A JSON text with one to three values, keys or places changed; mostly still JSON."""
    value = json.loads(text)
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        value = _changed(value, draw)
    written = json.dumps(value)
    return draw.choice(_AS_TEXT)(written, draw) if draw.random() < 0.25 else written


def _changed(value: Any, draw: Draw) -> Any:
    path = draw.choice(_paths(value)) if draw.random() < 0.97 else ()
    if not path:
        return draw.choice((draw.choice(ODD), [value], {"x": value}, {}))
    holder, key = _get(value, path[:-1]), path[-1]
    old = holder[key]
    match draw.randrange(8):
        case 0:
            del holder[key]
        case 1 if isinstance(holder, dict):
            holder[str(key) + draw.choice(("", "_", "x", "\n"))] = holder.pop(key)
            holder[draw.choice(("unknown", "__class__", "auto_map", "quantization_config", "__proto__"))] = draw.choice(
                ODD
            )
        case 2 if isinstance(old, int | float):
            holder[key] = draw.choice(
                (old + 1, old - 1, -old, old * 2, old * 1000, str(old), float(old), [old], old / 3)
            )
        case 3 if isinstance(old, str):
            holder[key] = draw.choice((old + "x", old[:-1], old.upper(), old + "\0", old * 50, [old], {"x": old}))
        case 4:
            holder[key] = [old]
        case 5:
            holder[key] = _get(value, draw.choice(_paths(value)))
            return json.loads(json.dumps(value)) if not _is_cyclic(value) else None
        case _:
            holder[key] = draw.choice(ODD)
    return value


def _is_cyclic(value: Any) -> bool:
    try:
        json.dumps(value)
    except ValueError:
        return True
    return False


def _twice(text: str, draw: Draw) -> str:
    """A key that is there twice."""
    value = json.loads(text)
    if not isinstance(value, dict) or not value:
        return text
    key = draw.choice(list(value))
    return text[:-1] + f", {json.dumps(key)}: {json.dumps(draw.choice(ODD))}}}"


def _huge(text: str, draw: Draw) -> str:
    """An integer of thousands of digits in the place of a number."""
    places = [i for i, c in enumerate(text) if c.isdigit() and not text[i - 1].isdigit()]
    if not places:
        return "9" * 5000
    at = draw.choice(places)
    return text[:at] + "9" * draw.choice((400, 5000)) + text[at:]


def _deep(text: str, draw: Draw) -> str:
    depth = draw.choice((50, 2000, 100_000))
    return text[:-1] + ', "deep": ' + "[" * depth + "]" * depth + "}" if text.endswith("}") else "[" * depth


def _cut(text: str, draw: Draw) -> str:
    return text[: draw.randrange(len(text) + 1)]


_AS_TEXT: tuple[Callable[[str, Draw], str], ...] = (_twice, _huge, _deep, _cut)


def spoilt_bytes(data: bytes, draw: Draw) -> bytes:
    """Bytes cut, flipped, zeroed, doubled or replaced."""
    at = draw.randrange(len(data) + 1)
    match draw.randrange(9):
        case 0:
            return data[:at]
        case 1:
            return b""
        case 2:
            return data[:at] + bytes([draw.randrange(256)]) + data[at + 1 :]
        case 3:
            return data[:at] + bytes(min(64, len(data) - at)) + data[at + 64 :]
        case 4:
            return (
                data[:at] + draw.choice((b"\xff\xfe", b"\0" * 9, b"\xef\xbb\xbf", b"\n\n", b"}", b"\x80")) + data[at:]
            )
        case 5:
            return data + data[at:]
        case 6:
            return b"\xef\xbb\xbf" + data
        case 7:
            return data.replace(b"\n", b"\r\n") if b"\n" in data else data[at:]
        case _:
            return draw.choice(
                (b"PK\3\4", b"\x80\4K\1.", b"{}", b"[]", b"null", b"1", b"\0", b"PAR1PAR1", b'"')
            ) * draw.choice((1, 3))


def spoilt_safetensors(data: bytes, draw: Draw) -> bytes:
    """A safetensors file with another header, or its bytes spoilt."""
    if draw.random() < 0.3:
        return spoilt_bytes(data, draw)
    size = struct.unpack("<Q", data[:8])[0]
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    name = draw.choice([key for key in header if key != "__metadata__"])
    entry = header[name]
    low, high = entry["data_offsets"]
    match draw.randrange(10):
        case 0:
            entry["dtype"] = draw.choice(("I32", "F16", "F64", "BF16", "F8_E4M3", "BOOL", "U8", "X", 7, None))
        case 1:
            entry["shape"] = draw.choice(
                ([], [0], [-1], [2**62, 4], [10**9], entry["shape"][::-1], ["x"], None, [1] * 70)
            )
        case 2:
            entry["data_offsets"] = draw.choice(
                ([low, high + 1], [high, low], [-1, high], [0, 2**63], [low], [low + 4, high])
            )
        case 3:
            header[draw.choice(("../x", "x\0", "", "a" * 3000, "__metadata__", f"{name}.x"))] = header.pop(name)
        case 4:
            del header[name]
        case 5:
            header["__metadata__"] = draw.choice(
                ({"format": "tf"}, {"x": 1}, [], None, {"format": "pt", "a": "b" * 9999})
            )
        case 6:
            header[f"{name}.twin"] = dict(entry)
        case 7:
            floats = draw.choice((float("nan"), float("inf"), 1e38))
            body = body[:low] + struct.pack("<f", floats) + body[low + 4 :]
        case 8:
            written = spoilt_json(json.dumps(header), draw).encode(errors="replace")
            return struct.pack("<Q", len(written)) + written + body
        case _:
            written = json.dumps(header).encode()
            wrong = draw.choice((0, 1, len(written) - 1, len(written) + 1, 2**40, 2**64 - 1, 120_000_000))
            return struct.pack("<Q", wrong) + written + body
    written = json.dumps(header).encode()
    return struct.pack("<Q", len(written)) + written + body


TEMPLATES = (
    *("", " ", "{{ messages }}", "{{ messages + 1 }}", "{{ 1/0 }}", "{% for", "{{ range(10**12) | list }}", "hello"),
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}{{ 'x' * 999 }}{% endfor %}",
    *("{% include 'x' %}", "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}", "{{ ''.__class__.__mro__ }}"),
    *("{{ messages[9].content }}", "{{ raise_exception('no') }}", "{{ messages[0]['content'] }}", "{{ undefined.x }}"),
    *(
        "{{ messages[0].content | upper }}",
        "{% for m in messages %}{{ m.role }}{% endfor %}",
        "{{ bos_token }}",
        "{{ 'a' * 10**9 }}",
    ),
    "{% for m in messages %}{{ m.content }}{% if loop.last %}{{ eos_token }}{% endif %}{% endfor %}",
    "{{ messages | tojson }}",
    "{% set x = namespace(a=1) %}{% for m in messages %}{% set x.a = x.a + 1 %}{% endfor %}{{ x.a }}",
    *(
        "{{ strftime_now('%Y') }}{{ messages[0].content }}",
        "{% break %}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ lipsum }}",
    ),
)


def spoilt_template(text: str, draw: Draw) -> str:
    if draw.random() < 0.5:
        return draw.choice(TEMPLATES)
    at = draw.randrange(len(text) + 1)
    piece = draw.choice(TEMPLATES)
    return draw.choice(
        (text[:at], text[:at] + piece + text[at:], text + piece, piece + text, text.replace("content", "role"))
    )
