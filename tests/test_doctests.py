"""The examples in docstrings are run, and every public name has one."""

import ast
import doctest
import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import pytest

import lora_dp
import lora_dp.auditing
import lora_dp.fed

ROOT = Path(lora_dp.__file__).parents[1]
WITH_EXAMPLES = [
    str(path.relative_to(ROOT))
    for path in sorted((ROOT / "lora_dp").rglob("*.py"))
    if ">>> " in path.read_text(encoding="utf-8")
]
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE

# Modules of which every function and class is for users, and names for users in others.
WHOLE = ["lora_dp", "lora_dp.auditing", "lora_dp.fed", "lora_dp.losses", "lora_dp.privacy.accounting"]
SINGLE = {"lora_dp.engine.cuda_graphs": ["GraphedStep"], "lora_dp.fed.methods": ["Method", "available", "get_method"]}
WITH_METHODS = [
    "PrivacyEngine",
    "PrivateDataLoader",
    "PrivateOptimizer",
    "Ledger",
    "DPLoRALinear",
    "DPLinear",
    "DPLayerNorm",
    "DPEmbedding",
]
# Methods that torch, the loader, the engine or the auditor calls, and nobody's training loop.
MODULES = {"forward", "extra_repr"}
INTERNAL = {
    **dict.fromkeys(["DPLoRALinear", "DPLinear", "DPLayerNorm", "DPEmbedding"], MODULES),
    "PrivateDataLoader": {"check_fetched"},
    "PrivateOptimizer": {
        "clip",
        "defaults",
        "param_groups",
        "recorder",
        "release",
        "state",
        "step_on_empty_batch",
        "take",
    },
}


def examples(tree: ast.Module) -> Iterator[tuple[str, str, int]]:
    """Name, text and line of every docstring with an example. A method's goes on from that of its class."""

    def text(node: Any) -> str:
        found = ast.get_docstring(node) or ""
        return found if ">>> " in found else ""

    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef):
            continue
        if text(node):
            yield getattr(node, "name", "the module"), text(node), node.body[0].lineno
        before = f"{text(node)}\n\n" if isinstance(node, ast.ClassDef) else ""
        for part in node.body:
            if isinstance(part, ast.FunctionDef) and text(part):
                yield part.name, before + text(part), part.lineno


@pytest.mark.slow
@pytest.mark.parametrize("path", WITH_EXAMPLES)
def test_examples_show_what_one_gets(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where some leave files
    source = (ROOT / path).read_text(encoding="utf-8")
    module = importlib.import_module(path.removesuffix(".py").removesuffix("/__init__").replace("/", "."))
    runner, parser, told = doctest.DocTestRunner(optionflags=FLAGS), doctest.DocTestParser(), []
    for name, text, line in examples(ast.parse(source)):
        runner.run(parser.get_doctest(text, dict(vars(module)), name, path, line), out=told.append)
    assert runner.summarize(verbose=False).failed == 0, "".join(told)
    assert runner.tries


def public_names() -> Iterator[tuple[str, Any]]:
    for name in WHOLE:
        module = importlib.import_module(name)
        offered = getattr(module, "__all__", None) or [
            key for key, value in vars(module).items() if getattr(value, "__module__", None) == name and key[0] != "_"
        ]
        yield from ((f"{name}.{key}", getattr(module, key)) for key in offered)
    for name, keys in SINGLE.items():
        yield from ((f"{name}.{key}", getattr(importlib.import_module(name), key)) for key in keys)
    classes = [getattr(lora_dp, name) for name in WITH_METHODS]
    for kind in (*classes, lora_dp.auditing.AuditResult, lora_dp.fed.RunConfig):
        name = kind.__name__
        for key, value in vars(kind).items():
            if (
                isinstance(value, FunctionType | classmethod | property)
                and key[0] != "_"
                and key not in INTERNAL.get(name, ())
            ):
                yield f"{name}.{key}", value


def test_no_public_name_without_an_example() -> None:
    named = {
        name: value
        for name, value in public_names()
        if (inspect.isroutine(value) or inspect.isclass(value) or isinstance(value, property | classmethod))
        and not isinstance(value, ModuleType)
    }
    assert len(named) > 70
    assert [name for name, value in named.items() if ">>> " not in (value.__doc__ or "")] == []
