"""The shape of the package: imports go one way, and what is dangerous or loud stays in its place."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import gtqlora
from gtqlora.families import FAMILIES
from tests import warm

SOURCE = Path(gtqlora.__file__).parent

# Bottom to top. A module imports from layers below its own only, or from inside its own package.
LAYERS: tuple[frozenset[str], ...] = tuple(
    frozenset(names.split())
    for names in (
        "errors",
        "progress routing stats",  # numbers and decisions, each known on its own
        "machine ranks storage",  # devices, trackers and processes of one command; files that appear whole
        "config",
        "posting run",  # JSON to servers of models; the run directory
        "families",  # parts of a model and its files
        "planning",  # what a training will take
        "judging",  # who tells a refusal from an answer
        "contrasts experts",  # prompts from outside; the routed experts of a model, frozen in 4 bits
        "results",  # what each stage leaves
        "capture",  # a model that runs
        "floor decoding",
        "scoring",
        "served",  # models that answer behind servers
        "building localize",  # public sets asked of a model; what mediates a behaviour
        "edits",
        "certificate",  # the only way to weights
        "exports",  # a certified edit in the forms that other programs load
        "reporting",  # reads artefacts only, see below
        "bitdelta",  # a fine-tune as one bit a weight
        "stages",
        "organisms",  # `build` makes models by the same means; `embedded` and `language` need little
        "demo",
        "cli",
    )
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}

MAY_PRINT = {"cli.app", "cli.console", "cli.layout", "cli.printing", "organisms.__main__"}
# `build` watches router inputs to train probes; weights that are split among ranks come before a module runs
MAY_HOOK = {"capture.subject", "capture.hooks", "organisms.build", "experts.sharding", "experts.vocabulary"}


def _name(file: Path) -> str:
    """The dotted name below the package; the package's own door is ""."""
    parts = file.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = sorted(map(_name, SOURCE.rglob("*.py")))


@cache
def _modules() -> dict[str, ast.Module]:
    """Parsed source by name."""
    return {_name(file): ast.parse(file.read_text(), str(file)) for file in SOURCE.rglob("*.py")}


def _imported(name: str) -> Iterator[tuple[str, int]]:
    """Absolute names of the modules (or names in them) that a module imports anywhere in its text, and the line."""
    for node in ast.walk(_modules()[name]):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}:{node.lineno}: a relative import"
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def _own(name: str) -> Iterator[tuple[str, int]]:
    """Modules of this package among them."""
    for target, line in _imported(name):
        head, _, rest = target.partition(".")
        if head == "gtqlora":
            while rest not in _modules():
                rest = rest.rpartition(".")[0]
            yield rest, line


def _packages(name: str) -> set[str]:
    return {target.partition(".")[0] for target, _ in _imported(name)}


def _unit(name: str) -> str:
    return name.partition(".")[0]


def _calls(name: str) -> Iterator[ast.Call]:
    return (node for node in ast.walk(_modules()[name]) if isinstance(node, ast.Call))


def _called(call: ast.Call) -> str:
    """The last word of what is called: `print` of `print()` and of `console.print()`."""
    return call.func.id if isinstance(call.func, ast.Name) else getattr(call.func, "attr", "")


# --- layers


def test_every_module_has_a_layer() -> None:
    assert {_unit(name) for name in MODULES} - {"", "__main__"} == LEVEL.keys()
    assert sum(map(len, LAYERS)) == len(LEVEL)


@pytest.mark.parametrize("name", [name for name in MODULES if name not in ("", "__main__")])
def test_imports_go_down(name: str) -> None:
    for target, line in _own(name):
        if _unit(target) == _unit(name):
            continue
        assert target, f"{name}:{line} imports the package's own door"
        assert LEVEL[_unit(target)] < LEVEL[_unit(name)], f"{name}:{line} imports {target}, which is not below it"


def test_no_module_leads_back_to_itself() -> None:
    graph = {name: {target for target, _ in _own(name)} - {name} for name in MODULES}

    def reachable(start: str) -> set[str]:
        seen, rest = set(), list(graph[start])
        while rest:
            if (here := rest.pop()) not in seen:
                seen.add(here)
                rest += graph[here]
        return seen

    assert [name for name in MODULES if name in reachable(name)] == []


@pytest.mark.parametrize("name", [name for name in MODULES if _unit(name) in ("routing", "stats")])
def test_pure_maths_knows_neither_models_nor_settings(name: str) -> None:
    assert not _packages(name) & {"transformers", "peft", "trl", "datasets", "accelerate"}
    assert {_unit(target) for target, _ in _own(name)} <= {"errors", "stats"}


def test_statistics_need_no_torch() -> None:
    assert not [name for name in MODULES if _unit(name) == "stats" and "torch" in _packages(name)]


def test_the_report_reads_artefacts_only() -> None:
    for name in MODULES:
        if _unit(name) == "reporting":
            artefacts = {"errors", "run", "storage", "stats", "reporting", "results"}
            assert {_unit(target) for target, _ in _own(name)} <= artefacts
            assert not _packages(name) & {"torch", "transformers", "peft", "trl"}


def test_results_need_no_model_library() -> None:
    """Neither by themselves nor through what they import: the report and the tables are read without a model."""
    for name in (name for name in MODULES if _unit(name) == "results"):
        assert not _packages(name) & {"torch", "transformers", "peft", "trl"}, name
    every = ", ".join(f"gtqlora.{name}" for name in MODULES if _unit(name) == "results")
    assert _after(f"import {every}") <= {"pyarrow", "scipy"}


def test_only_families_name_model_families() -> None:
    for name in MODULES:
        if _unit(name) in ("families", "organisms"):
            continue
        words = {str(node.value) for node in ast.walk(_modules()[name]) if isinstance(node, ast.Constant)}
        assert not [word for word in words if word.startswith(tuple(FAMILIES))], name


# Names of modules, parameters and config keys that differ from one architecture to the next.
ARCHITECTURE = {
    *("self_attn", "linear_attn", "mlp", "gate_up_proj", "down_proj", "o_proj", "shared_expert", "shared_experts"),
    *("embed_tokens", "lm_head", "model.layers", "model.norm", "input_layernorm", "post_attention_layernorm"),
    *("e_score_correction_bias", "num_local_experts", "n_routed_experts", "num_experts", "num_experts_per_tok"),
    *("moe_intermediate_size", "intermediate_size", "norm_topk_prob", "routed_scaling_factor", "first_k_dense_replace"),
    *("decoder_sparse_step", "mlp_only_layers", "mlp_layer_types", "num_nextn_predict_layers"),
}
OF_FROZEN_EXPERTS = {"intermediate_size"}  # attribute of `FrozenExperts`, which holds any family's
MAY_SIZE = {"organisms.scales"}  # config values from which organisms of two architectures are built


def _docstrings(module: ast.Module) -> set[int]:
    """Constants that are documentation: statements of their own."""
    return {id(node.value) for node in ast.walk(module) if isinstance(node, ast.Expr)}


def _facts_named(name: str) -> Iterator[str]:
    """Architectural names in a module's code: words of its texts, attributes, and keys given by name."""
    module = _modules()[name]
    documentation = _docstrings(module)
    for node in ast.walk(module):
        if isinstance(node, ast.Attribute) and node.attr in ARCHITECTURE - OF_FROZEN_EXPERTS:
            yield f"{name}:{node.lineno}: .{node.attr}"
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation:
            found = {word for word in ARCHITECTURE if re.search(rf"(?<![\w]){re.escape(word)}(?![\w])", node.value)}
            allowed = OF_FROZEN_EXPERTS if _unit(name) == "experts" else set()
            yield from (f"{name}:{node.lineno}: {word!r}" for word in found - allowed)


@pytest.mark.parametrize("name", [name for name in MODULES if _unit(name) != "families" and name not in MAY_SIZE])
def test_only_families_know_architectures(name: str) -> None:
    assert list(_facts_named(name)) == []


# --- loud and dangerous things


def test_only_the_command_lines_print() -> None:
    assert {name for name in MODULES if any(_called(call) == "print" for call in _calls(name))} <= MAY_PRINT


def test_only_capture_hooks_into_forward() -> None:
    hooks = {"register_forward_hook", "register_forward_pre_hook", "register_module_forward_hook"}
    assert {name for name in MODULES if any(_called(call) in hooks for call in _calls(name))} == MAY_HOOK


@pytest.mark.parametrize("name", MODULES)
def test_nothing_runs_code_that_came_as_data(name: str) -> None:
    assert not _packages(name) & {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
    assert not [target for target, _ in _imported(name) if target in ("torch.load", "torch.serialization.load")]
    for call in _calls(name):
        where = f"{name}:{call.lineno}"
        if isinstance(call.func, ast.Name):
            assert call.func.id not in ("eval", "exec", "__import__"), where
        if isinstance(call.func, ast.Attribute) and isinstance(call.func.value, ast.Name):
            assert (call.func.value.id, call.func.attr) not in (("torch", "load"), ("os", "system")), where
        for keyword in call.keywords:
            if keyword.arg == "trust_remote_code":
                assert isinstance(keyword.value, ast.Constant), where
                assert keyword.value.value is False, where


# --- the doors


def _after(code: str) -> set[str]:
    """The heavy packages that are loaded once this code has run in a fresh process."""
    heavy = "torch transformers peft trl datasets pyarrow scipy"
    report = f"import sys; print('LOADED', *(m for m in '{heavy}'.split() if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", f"{code}\n{report}"], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split()) - {"LOADED"}


def test_importing_the_command_line_is_light() -> None:
    assert _after("import gtqlora, gtqlora.cli.app, gtqlora.organisms.embedded") == set()


def test_help_is_light() -> None:
    help_of_all = "from gtqlora.cli import main\ntry:\n    main(['--help'])\nexcept SystemExit:\n    pass"
    assert _after(help_of_all) == set()


_DOOR = """
import gtqlora, gtqlora.stages.project
assert sorted(gtqlora.__all__) == list(gtqlora.__all__)
for _ in range(2):
    for name in gtqlora.__all__:
        found = getattr(gtqlora, name)
        assert callable(found) and found.__name__ == name, f"gtqlora.{name} is {found}"
"""


def test_the_public_door_gives_stages_and_not_their_modules() -> None:
    """However often and in whatever order: Python puts an imported module in its package, under the stage's name."""
    done = warm.process(_DOOR)  # in which nothing of gtqlora is imported yet
    assert done.returncode == 0, done.stderr


def test_what_the_door_does_not_have() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = gtqlora.nothing


def test_sizes_of_a_model_are_known_without_torch() -> None:
    kimi = Path(__file__).parent / "data" / "kimi_k25_config.json"
    assert (
        _after(f"from gtqlora.families.sizes import sizes_of\nassert sizes_of({str(kimi)!r}).experts == 384") == set()
    )
