"""The tutorial runs as it is printed, and the reference lists every module."""

import ast
import contextlib
import io
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


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


# The rows of docs/explanation/house.svg, from the top; of the first box two files.
ROWS = (
    ("fed/__main__",),
    ("fed/launch",),
    ("fed/page", "fed/diagnostics", "fed/auditing", "fed/flower"),
    ("fed/compare",),
    ("fed/runs",),
    ("fed/rounds",),
    ("fed/methods", "fed/models"),
    ("fed/data",),
    ("auditing", "__init__"),
    ("engine",),
    ("isolation", "lora"),
    ("privacy", "nn"),
    ("ops",),
    ("kernels",),
)
PLACES = {box: row for row, boxes in enumerate(ROWS) for box in boxes}


def box_of(path: str) -> str | None:
    """The box of a module, given as a path below lora_dp."""
    return next((box for box in PLACES if f"{path}/".startswith(f"{box}/")), None)


def test_the_picture_of_the_folders_is_true():
    for folder, below in ((ROOT / "lora_dp", ""), (ROOT / "kernels", "kernels/")):
        for file in folder.rglob("*.py"):
            box = box_of(below + file.relative_to(folder).with_suffix("").as_posix())
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if box and isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lora_dp."):
                    other = box_of(node.module.removeprefix("lora_dp.").replace(".", "/"))
                    assert other in (None, box) or PLACES[other] > PLACES[box], f"{file} imports {node.module}"
