"""Renders chat templates in a process of its own, which the kernel ends when a template takes too long or too much.

Run as a script by `rendering`, never imported: a template may hang inside of C code, where no Python can stop it, in
any thread. Requests and replies are JSON with their length before it. It needs transformers' renderer and nothing else.
"""

from __future__ import annotations

import json
import resource
import signal
import struct
import sys
import time
from collections.abc import Iterator, Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import IO, TYPE_CHECKING, Any

from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError, TemplateSyntaxError
from jinja2.meta import find_undeclared_variables

if TYPE_CHECKING:
    from gtqlora.families.rendering import Request

_ASKING = frozenset({"defined", "undefined", "default", "d"})
_TRUTHS = frozenset({"true", "false", "boolean"})
# Four bytes, the most significant first, as `rendering` writes and reads them.
LENGTH = struct.Struct(">I")
_PACKAGES = ("transformers", "transformers.utils")
SHOWN = 500
"""Characters of an error, which a template may make as long as it likes."""


def _templates() -> ModuleType:
    """Import transformers' renderer, without all else that its packages import: that would take three times as long."""
    name = f"{_PACKAGES[-1]}.chat_template_utils"
    try:
        for package in _PACKAGES:
            spec = find_spec(package)
            assert spec is not None
            sys.modules[package] = bare = ModuleType(package)
            bare.__path__, bare.__spec__ = list(spec.submodule_search_locations or ()), spec
        return import_module(name)
    except (ImportError, AttributeError):  # a transformers in which it needs more than its own modules
        for module in [module for module in sys.modules if module.startswith(_PACKAGES[0])]:
            del sys.modules[module]
        return import_module(name)


_TEMPLATES = _templates()


def _limit(memory: int) -> None:
    """Allow `memory` more bytes than are mapped now, where the system can say how many that is."""
    # Counted from what is mapped already: imported libraries map gigabytes that they hardly use.
    try:
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (mapped + memory, mapped + memory))
    except (OSError, ValueError):
        return  # no such file on this system: the time limit is left


class _TooLong(Exception):
    """A text that is longer than it may be."""


def _reply(request: Request) -> dict[str, object]:
    """Return a rendering or, without messages, which variables are read."""
    try:
        if request["messages"] is None:
            return _read_by(request["template"])
        return {"text": _rendered(request, request["messages"])}
    except (TemplateSyntaxError, SecurityError) as error:
        return {"failed": str(error)[:SHOWN]}
    except TemplateError as error:
        return {"refused": str(error)[:SHOWN]}
    except _TooLong as error:
        return {"failed": str(error)}
    except Exception as error:  # whatever a template makes Python raise is the template's fault
        return {"failed": f"{type(error).__name__}: {error}"[:SHOWN]}


def _read_by(template: str) -> dict[str, object]:
    """Return the variables that a template reads, but for what its environment has of its own, and its switches."""
    environment = _TEMPLATES._compile_jinja_template(template).environment  # which says what it has of its own
    tree = environment.parse(template)
    own = {name.name for name in tree.find_all(nodes.Name) if name.ctx == "store"}
    # What it sets itself can be set from outside only if it asks whether it was.
    asked = {one.node for one in tree.find_all((nodes.Test, nodes.Filter)) if one.name in _ASKING}
    optional = {node.name for node in asked if isinstance(node, nodes.Name)}
    read = sorted(find_undeclared_variables(tree) - environment.globals.keys() - (own - optional))
    return {"reads": read, "switches": [name for name in read if _is_switch(tree, name)]}


def _is_switch(tree: nodes.Template, name: str) -> bool:
    """Return whether a template asks of a variable whether it is true, and nothing else of it."""
    used = {id(one) for one in tree.find_all(nodes.Name) if (one.name, one.ctx) == (name, "load")}
    asked = used & {id(one) for node in tree.find_all(nodes.Node) for one in _asked(node)}
    given = {id(test.node) for test in tree.find_all(nodes.Test) if test.name in _ASKING}
    # `x = x | default(true)`: what becomes of it is seen where it is read again.
    own = [one for one in tree.find_all(nodes.Assign) if isinstance(one.target, nodes.Name) and one.target.name == name]
    return bool(asked) and used <= asked | given | {id(node) for one in own for node in one.find_all(nodes.Name)}


def _asked(node: nodes.Node) -> Iterator[nodes.Node]:
    """Yield what a node asks only the truth of."""
    if isinstance(node, nodes.If | nodes.CondExpr):
        yield from _operands(node.test)
    elif isinstance(node, nodes.Not):
        yield from _operands(node.node)
    elif isinstance(node, nodes.Test) and (node.name in _TRUTHS or (node.args and _is_truth(node.args[0]))):
        yield node.node
    elif isinstance(node, nodes.Compare) and all(_is_truth(other.expr) for other in node.ops):
        yield node.expr


def _operands(node: nodes.Node) -> Iterator[nodes.Node]:
    if isinstance(node, nodes.And | nodes.Or):
        yield from _operands(node.left)
        yield from _operands(node.right)
    yield node


def _is_truth(node: nodes.Node) -> bool:
    return isinstance(node, nodes.Const) and isinstance(node.value, bool)


def _rendered(request: Request, messages: list[dict[str, str]]) -> str:
    variables: dict[str, Any] = {**request["variables"]}
    text: str = _TEMPLATES.render_jinja_template(
        conversations=[messages],
        chat_template=request["template"],
        add_generation_prompt=request["generation"],
        **variables,
    )[0][0]
    if len(text) > request["characters"]:
        raise _TooLong(f"it renders {len(text)} characters")
    return text


def _read(source: IO[bytes]) -> Request | None:
    head = source.read(LENGTH.size)
    return json.loads(source.read(*LENGTH.unpack(head))) if len(head) == LENGTH.size else None


def _write(target: IO[bytes], reply: Mapping[str, object]) -> None:
    data = json.dumps(reply).encode()
    target.write(LENGTH.pack(len(data)) + data)
    target.flush()


def main(seconds: float, memory: int) -> None:
    """Serve until the input ends. A rendering that takes more processor time than `seconds` ends the process."""
    _limit(memory)
    while (request := _read(sys.stdin.buffer)) is not None:
        started = time.process_time()
        # Processor time, so that a busy machine makes no template fail. SIGPROF has no handler here, so it ends the
        # process even inside of C code, where a Python handler would never get to run.
        signal.setitimer(signal.ITIMER_PROF, seconds)
        reply = _reply(request)
        signal.setitimer(signal.ITIMER_PROF, 0)
        _write(sys.stdout.buffer, {**reply, "seconds": time.process_time() - started})


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]))
