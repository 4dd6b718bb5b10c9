"""The tools: faults are planted into the running package and counted; a named test then runs inside this process."""

import contextlib
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
AUDIT, ISOLATION, REFUSED = "the audit", "the isolation check", "the engine refuses"

# What an audited training does: one step on everybody, or eight at a rate of 1/8.
FULL = {"noise_multiplier": 1.0, "steps": 1}
SAMPLED = {"noise_multiplier": 0.8, "batch_size": 8, "steps": 8}
PHASE_A = {**FULL, "phases": "A"}


class Planting:
    """Replaces functions of the package by faulty ones, and counts how often these run.

    Args:
        patch: undoes it all.
        harmless: wrap the same places, and leave what they do as it is.
    """

    def __init__(self, patch: pytest.MonkeyPatch, *, harmless: bool = False) -> None:
        self.calls = 0
        self._patch, self._harmless = patch, harmless

    def replace(self, owner: Any, name: str, make: Callable[[Any], Any]) -> None:
        """Put what ``make`` makes of the function ``owner.name`` in its place."""
        original = getattr(owner, name)
        planted = original if self._harmless else make(original)

        def counted(*arguments: Any, **options: Any) -> Any:
            self.calls += 1
            return planted(*arguments, **options)

        self._patch.setattr(owner, name, counted)


@dataclass(frozen=True)
class Fault:
    """One fault.

    Attributes:
        name: of the fault, as the table has it.
        breaks: why ε is void with it, in one sentence.
        plant: plants it.
        caught_by: node ids of tests, or AUDIT, ISOLATION or REFUSED; each of them must catch it.
        audited: options of the audited training, or with ``sums_share`` of the audited run.
        run: runs an engine, for ISOLATION and REFUSED.
        refusal: words of the refusal.
    """

    name: str
    breaks: str
    plant: Callable[[Planting], None]
    caught_by: tuple[str, ...]
    audited: dict[str, Any] | None = None
    run: Callable[[], None] | None = None
    refusal: str = ""

    @contextlib.contextmanager
    def planted(self) -> Iterator[Planting]:
        with pytest.MonkeyPatch.context() as patch:
            planting = Planting(patch)
            self.plant(planting)
            yield planting


class Verdicts:
    """A plugin of pytest that keeps how each test ended: None where it passed, else the exception's type."""

    def __init__(self) -> None:
        self.found: dict[str, type[BaseException] | None] = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
        report = yield
        if call.when == "call":
            self.found[item.nodeid] = None if call.excinfo is None else call.excinfo.type
        return report


def verdicts(*nodes: str) -> dict[str, type[BaseException] | None]:
    """Run these tests in this process, silently: what each raised, by node id.

    Raises:
        ValueError: pytest does not find one of them, or cannot import it.
    """
    plugin, output = Verdicts(), io.StringIO()
    # Plugins that collect garbage, start processes, or leave something behind are of no use here.
    without = ("cacheprovider", "faulthandler", "unraisableexception", "threadexception", "benchmark")
    quiet = [
        f"--rootdir={ROOT}",
        f"--config-file={ROOT / 'pyproject.toml'}",
        "--capture=no",
        "--tb=no",
        *(f"-pno:{name}" for name in without),
    ]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        patch.delenv("PYTEST_ADDOPTS", raising=False)
        pytest.main([*quiet, *(str(ROOT / node) for node in nodes)], plugins=[plugin])
    if missing := set(nodes) - set(plugin.found):
        raise ValueError(f"{sorted(missing)} did not run:\n{output.getvalue()}")
    return plugin.found
