"""A user's own method, exactly as the documentation prints it, by its entry point."""

import os
import re
import subprocess
import sys
import tomllib
import types
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import yaml

from lora_dp.fed import methods
from lora_dp.fed.config import RunConfig
from lora_dp.fed.launch import run
from tests.fed.small import make_federation

DOCS = Path(__file__).parents[3] / "docs" / "reference" / "methods.md"


@pytest.fixture
def install(monkeypatch):
    """Installs a package of one module with one entry point."""

    def install(name: str, cls: str, source: str) -> None:
        module = types.ModuleType("warm_up")
        monkeypatch.setitem(sys.modules, "warm_up", module)
        exec(source, module.__dict__)
        point = EntryPoint(name, f"warm_up:{cls}", methods.ENTRY_POINTS)
        monkeypatch.setattr(
            methods, "entry_points", lambda group, name=point.name: [p for p in [point] if p.name == name]
        )

    return install


@pytest.mark.slow
def test_the_documented_example_runs(install, tmp_path):
    text = DOCS.read_text()
    source = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    toml = re.search(r"```toml\n(.*?)```", text, re.DOTALL)[1]
    assert len(source.splitlines()) < 40
    project = tomllib.loads(toml)["project"]
    assert project["name"] and project["version"]
    [(name, place)] = project["entry-points"]["lora_dp.methods"].items()
    module, cls = place.split(":")
    assert f"{module}.py" in source.splitlines()[0]
    install(name, cls, source)
    outcome = run(
        RunConfig.from_flat(
            {
                "method": name,
                "method_options": {"until": 1},
                "clients": 2,
                "rounds": 2,
                "local_steps": 2,
                "accountant": "rdp",
                "device": "cpu",
                "output": tmp_path / "run",
            }
        )
    )
    assert [result.phases for result in outcome.rounds] == ["", "B", "AB"]
    assert 0 < outcome.summary["worst_epsilon"] <= 8
    written = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (written["method"], written["method_options"], written["lr"]) == ("warm-up", {"until": 1}, 0.5)
    for privacy in ({"unit": "client"}, {"unit": "client", "noise_by": "client"}, {"epsilon": None}):
        make_federation("flat-lora:warm-up", weighting="equal", **privacy).run_round()


def test_an_installed_package_is_found_from_anywhere(tmp_path):
    """What pip leaves of such a package: its module, and the entry point beside it."""
    text, site = DOCS.read_text(), tmp_path / "site"
    information = site / "warm_up-1.0.dist-info"
    information.mkdir(parents=True)
    (site / "warm_up.py").write_text(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1])
    entry = re.search(r'^(warm-up = )"(.*)"', text, re.MULTILINE)
    (information / "entry_points.txt").write_text(f"[{methods.ENTRY_POINTS}]\n{entry[1]}{entry[2]}\n")
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: warm-up\nVersion: 1.0\n")
    asked = "from lora_dp.fed.methods import get_method; print(get_method('warm-up', {'until': 3}))"
    found = subprocess.run(
        [sys.executable, "-c", asked],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.strip() == "WarmUp(until=3)"


@pytest.mark.parametrize(
    ("cls", "message"), [("NoSuchClass", "cannot be loaded"), ("NUMBER", "must be a subclass of lora_dp.fed.methods")]
)
def test_a_broken_package_is_named_and_breaks_no_other_method(install, cls, message):
    install("broken", cls, "NUMBER = 3")
    assert "broken" in methods.available()
    with pytest.raises(ValueError, match=message):
        methods.get_method("broken")
    assert methods.get_method("la-lora").name == "la-lora"


MISTAKES = {
    "name: ClassVar[str] = 'warm-up'": "it has no phases",
    "def phases(self, r, turn=0): return 'AB'": r"put name: ClassVar\[str\] = 'warm-up' into the class",
    "name = 'warm-up'; phases = lambda self, r: 'AB'": r"its phases must take \(self, round_index, turn=0\)",
    "name = 'warm-up'; learning_rates = {8: 0.5}; phases = lambda self, r, turn=0: 'AB'": "its learning_rates need",
    "name = 'warm-up'; learning_rates = {8: 0.5, inf: -1.0}; phases = lambda self, r, turn=0: 'AB'": "a positive rate",
    "until: int; name: ClassVar[str] = 'warm-up'; phases = lambda *_, turn=0: 'AB'": "its option until needs a default",
}


@pytest.mark.parametrize("body", MISTAKES)
def test_what_a_class_lacks_is_said(install, body):
    install(
        "warm-up",
        "WarmUp",
        "\n".join(
            [
                "from dataclasses import dataclass",
                "from math import inf",
                "from typing import ClassVar",
                "from lora_dp.fed.methods import Method",
                "@dataclass(frozen=True)",
                "class WarmUp(Method):",
                f"    {body}",
            ]
        ),
    )
    with pytest.raises(ValueError, match=f"The method 'warm-up' .* cannot be used: .*{MISTAKES[body]}"):
        methods.get_method("warm-up")


@pytest.mark.parametrize("value", ["banana", 3.5, True, None])
def test_an_option_is_of_the_kind_of_its_default(install, value):
    install("warm-up", "WarmUp", re.search(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)[1])
    with pytest.raises(ValueError, match=f"The option until of warm-up must be a whole number, not {value!r}"):
        methods.get_method("warm-up", {"until": value})


def test_a_package_cannot_take_the_name_of_a_method_that_is_here(install):
    install("la-lora", "NoSuchClass", "")
    assert isinstance(methods.get_method("la-lora"), methods.LALoRA)
    assert methods.available().count("la-lora") == 1
