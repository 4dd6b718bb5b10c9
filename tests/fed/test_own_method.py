"""A user's own method, exactly as the documentation prints it, by its entry point."""

import re
import types
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import yaml

from lora_dp.fed import methods
from lora_dp.fed.config import RunConfig
from lora_dp.fed.runner import run
from tests.fed.small import make_federation

DOCS = Path(__file__).parents[2] / "docs" / "methods.md"


@pytest.fixture
def install(monkeypatch):
    """Installs a package of one module with one entry point."""
    def install(name: str, cls: str, source: str) -> None:
        module = types.ModuleType("my_package.warm_up")
        monkeypatch.setitem(__import__("sys").modules, "my_package", types.ModuleType("my_package"))
        monkeypatch.setitem(__import__("sys").modules, "my_package.warm_up", module)
        exec(source, module.__dict__)
        point = EntryPoint(name, f"my_package.warm_up:{cls}", methods.ENTRY_POINTS)
        monkeypatch.setattr(
            methods, "entry_points", lambda group, name=point.name: [p for p in [point] if p.name == name])

    return install


def test_the_documented_example_runs(install, tmp_path):
    text = DOCS.read_text()
    source = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    toml = re.search(r"```toml\n(.*?)```", text, re.DOTALL)[1]
    assert len(source.splitlines()) < 40
    name, cls = re.search(r'^(\S+) = "my_package.warm_up:(\w+)"', toml, re.MULTILINE).groups()
    install(name, cls, source)
    outcome = run(RunConfig.from_flat({
        "method": name, "method_options": {"until": 1}, "clients": 2, "rounds": 2, "local_steps": 2,
        "accountant": "rdp", "device": "cpu", "output": tmp_path / "run"}))
    assert [result.phases for result in outcome.rounds] == ["", "B", "AB"]
    assert 0 < outcome.summary["worst_epsilon"] <= 8
    written = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (written["method"], written["method_options"], written["lr"]) == ("warm-up", {"until": 1}, 0.5)
    for privacy in ({"unit": "client"}, {"unit": "client", "noise_by": "client"}, {"epsilon": None}):
        make_federation("flat-lora:warm-up", weighting="equal", **privacy).run_round()


@pytest.mark.parametrize(
    ("cls", "message"), [("NoSuchClass", "cannot be loaded"), ("NUMBER", "must be a subclass of lora_dp.fed.methods")]
)
def test_a_broken_package_is_named_and_breaks_no_other_method(install, cls, message):
    install("broken", cls, "NUMBER = 3")
    assert "broken" in methods.available()
    with pytest.raises(ValueError, match=message):
        methods.get_method("broken")
    assert methods.get_method("la-lora").name == "la-lora"


def test_a_package_cannot_take_the_name_of_a_method_that_is_here(install):
    install("la-lora", "NoSuchClass", "")
    assert isinstance(methods.get_method("la-lora"), methods.LALoRA)
    assert methods.available().count("la-lora") == 1
