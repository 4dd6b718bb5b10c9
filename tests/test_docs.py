"""The tutorial runs as it is printed, and the reference lists every module."""

import contextlib
import io
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


@pytest.mark.slow
def test_the_tutorial_runs():
    page = (DOCS / "tutorials" / "first-steps.md").read_text(encoding="utf-8")
    program = "\n".join(re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL))
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(program, {})
    found = re.fullmatch(r"accuracy (\d\.\d\d) at ε = 3\.00\n", said.getvalue())
    assert found and float(found[1]) > 0.7


def test_the_reference_lists_every_module():
    listed = set()
    for page in (DOCS / "reference" / "api").glob("*.rst"):
        listed |= set(re.findall(r"^\.\. automodule:: (\S+)$", page.read_text(encoding="utf-8"), re.MULTILINE))
    files = [*(ROOT / "lora_dp").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]
    names = set()
    for file in files:
        parts = file.relative_to(ROOT).with_suffix("").parts
        parts = ("lora_dp", *parts) if parts[0] == "kernels" else parts
        names.add(".".join(parts).removesuffix(".__init__"))
    assert listed == {name for name in names if not name.endswith(".__main__")}


def test_every_installation_looks_at_python_before_it_downloads():
    """An older Python would otherwise be told after minutes, by pip."""
    check = "python3 -c 'import sys; assert sys.version_info >= (3, 11), \"Python 3.11 or later is needed\"' && "
    installing = 0
    for page in [*ROOT.glob("*.md"), *DOCS.rglob("*.md")]:
        for line in page.read_text(encoding="utf-8").splitlines():
            if "python3 -m venv" in line:
                installing += 1
                assert line.startswith(f"{check}python3 -m venv .venv"), page
    assert installing >= 6
