"""Which judges may run code. A judge `package.module:function` is the user's own code, or a stranger's.

It is imported only if it was named on the command line (`--set judge=`), or by a caller of the Python API; never
because a run directory, an adapter or a recipe names it. What the user named for a run is remembered outside of it,
with the hash of the source: the same run, judge and source need not be named again. A judge that is a server on another
machine is held to the same, as prompts, answers and the user's key go there.
"""

from __future__ import annotations

import ast
import importlib.machinery
import json
import sys
from pathlib import Path

from gtqlora.config import is_code, must_be_named
from gtqlora.config.judges import why_named
from gtqlora.errors import ConfigError
from gtqlora.run import sha256_file, sha256_json, write_json
from gtqlora.storage import user_state

_FILE = "judges.json"


def source_of(judge: str) -> Path | None:
    """Find the file of a judge's module without importing anything; None if there is none to be found."""
    spec, places = None, None
    for part in judge.partition(":")[0].split("."):
        try:
            spec = importlib.machinery.PathFinder.find_spec(part, places)
        except (ImportError, ValueError):
            return None
        if spec is None:
            return None
        places = list(spec.submodule_search_locations or ())
    origin = spec.origin if spec is not None else None
    return Path(origin) if origin is not None and Path(origin).is_file() else None


def can_be_imported(judge: str) -> bool:
    """Tell whether a judge's module is there for anything that Python imports by; nothing is imported."""
    module, places = judge.partition(":")[0], None
    parts = module.split(".")
    for depth in range(1, len(parts) + 1):
        name = ".".join(parts[:depth])
        # more than `source_of` knows: built-in modules, and packages that are installed to be edited in place
        found = (finder.find_spec(name, places) for finder in sys.meta_path if hasattr(finder, "find_spec"))
        spec = next((spec for spec in found if spec is not None), None)
        if spec is None:
            return module in sys.modules
        places = spec.submodule_search_locations
    return True


def identity(judge: str) -> str:
    """Return what a judge is: its phrases, or its name and the hash of its source.

    Changed code is another judge. Nothing is imported; what a judge says of its weights comes behind it, in `judge_of`.
    """
    if not is_code(judge):
        return judge
    source = source_of(judge)
    return f"{judge} sha256:{'unknown' if source is None else _hash_of(source, judge)}"


def _hash_of(source: Path, judge: str) -> str:
    """Return the hash of a judge's source: its whole package, or its module with those beside it that it imports.

    Without them a judge could change while its own file stays the same.
    """
    depth = judge.partition(":")[0].count(".") + (source.name == "__init__.py")
    files = source.parents[depth - 1].rglob("*.py") if depth else _imported_beside(source, {source})
    return sha256_json([(file.name, sha256_file(file)) for file in sorted(files)])


def _imported_beside(source: Path, seen: set[Path]) -> set[Path]:
    """Collect the modules, and whole packages, of the same folder that a module imports, and that those import."""
    if source.parent == Path(ast.__file__).parent:  # Python's own
        return seen
    try:
        nodes = list(ast.walk(ast.parse(source.read_bytes())))
    except (SyntaxError, ValueError, RecursionError):
        return seen
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module]
    for name in {name.partition(".")[0] for name in names}:
        module, package = source.with_name(f"{name}.py"), source.with_name(name)
        found = [module] if module.is_file() else package.rglob("*.py") if (package / "__init__.py").is_file() else []
        for file in set(found) - seen:
            seen.add(file)
            if file == module:
                _imported_beside(file, seen)
    return seen


def check_named(judge: str, named_in: str, *, key: str = "judge") -> None:
    """Check that a judge that a file names is neither code nor a server elsewhere.

    Args:
        key: the setting that names it.

    Raises:
        ConfigError: it is; the message says how to name it oneself.
    """
    if must_be_named(judge):
        raise ConfigError(
            f"{named_in} names the judge {judge!r}, {why_named(judge)}; if you trust it, say --set {key}={judge}"
        )


def _key(run: Path, judge: str) -> str:
    return sha256_json([str(run.resolve()), identity(judge)])


def _remembered() -> list[str]:
    place = user_state.folder()
    try:
        found = json.loads((place / _FILE).read_text()) if place else []
    except (OSError, ValueError, RecursionError):
        return []
    return [key for key in found if isinstance(key, str)] if isinstance(found, list) else []


def remember(run: Path, judge: str) -> None:
    """Note that the user named this judge for this run; where nothing can be noted it has to be named again."""
    place = user_state.folder()
    if place is None or not _can_be_remembered(judge):
        return
    known = _remembered()
    if (key := _key(run, judge)) in known:
        return
    try:
        place.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_json(place / _FILE, [*known, key])
    except OSError:
        return


def is_remembered(run: Path, judge: str) -> bool:
    """Tell whether the user named this judge, with this very source, for this run before."""
    return _can_be_remembered(judge) and _key(run, judge) in _remembered()


def _can_be_remembered(judge: str) -> bool:
    return must_be_named(judge) and (not is_code(judge) or source_of(judge) is not None)
