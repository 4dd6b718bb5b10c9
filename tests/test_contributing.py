"""What CONTRIBUTING.md and RELEASING.md tell a contributor to open, run or mark is there."""

from __future__ import annotations

import ast
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PAGES = ("CONTRIBUTING.md", "RELEASING.md")


def page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def sessions() -> dict[str, str]:
    """Docstrings of noxfile.py's sessions, by name."""
    found = {}
    for function in ast.parse(page("noxfile.py")).body:
        for decorator in function.decorator_list if isinstance(function, ast.FunctionDef) else ():
            if ast.unparse(decorator).startswith("nox.session"):
                names = [ast.literal_eval(word.value) for word in getattr(decorator, "keywords", ())]
                found[names[0] if names else function.name] = ast.get_docstring(function) or ""
    return found


@pytest.mark.parametrize("name", PAGES)
def test_files_and_folders_that_it_names_are_there(name: str) -> None:
    text = page(name)
    # `folder/file.py` in text, and [pages](of/links.md#with-a-place); NAME is one to come, build/ is made.
    named = re.findall(r"`((?:[\w.-]+/)+[\w.-]*)`", text) + re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", text)
    named = [path for path in named if not re.search("NAME|://|^build/", path)]
    assert len(named) > 2
    assert [path for path in named if not (ROOT / path).exists()] == []
    # And `file.py`, which is in one of the folders.
    folders = [ROOT / folder for folder in ("lora_dp", "csrc", "kernels", "tests")]
    there = {path.name for folder in [*folders, ROOT] for path in folder.glob("*" if folder == ROOT else "**/*")}
    assert set(re.findall(r"`(\w+\.(?:cpp|h|py|toml))`", text)) <= there


def test_its_sessions_are_those_of_the_noxfile() -> None:
    assert set(re.findall(r"`nox -s ([\w-]+)`", page("CONTRIBUTING.md"))) == set(sessions())
    assert all(sessions().values())


def test_its_marks_are_those_of_pytest() -> None:
    declared = tomllib.loads(page("pyproject.toml"))["tool"]["pytest"]["ini_options"]["markers"]
    table = page("CONTRIBUTING.md").partition("| mark |")[2].partition("\n\n")[0]
    assert re.findall(r"(?m)^\| `(\w+)` \|", table) == [mark.split(":")[0] for mark in declared]


def test_ci_runs_every_check_of_the_lint_session() -> None:
    """Whoever passes them at home passes them there."""
    noxfile, ci = page("noxfile.py"), page(".ci/run")
    for check in ("ruff format --check .", "ruff check .", "mypy"):
        assert f".venv/bin/{check}\n" in ci
        assert ", ".join(f'"{word}"' for word in check.split()) in noxfile


def test_the_workflow_runs_ci_and_can_publish_nothing() -> None:
    workflow = yaml.safe_load(page(".github/workflows/ci.yml"))
    assert {"run": ".ci/run"} in workflow["jobs"]["run"]["steps"]
    assert workflow["permissions"] == {"contents": "read"}
    assert "secrets." not in page(".github/workflows/ci.yml")
    asked = tomllib.loads(page("pyproject.toml"))["project"]["requires-python"]
    assert f">={workflow['jobs']['run']['strategy']['matrix']['python'][0]}" == asked


@pytest.mark.parametrize("form", ["bug", "feature", "privacy-flaw"])
def test_forms_of_issues_are_whole(form: str) -> None:
    body = yaml.safe_load(page(f".github/ISSUE_TEMPLATE/{form}.yml"))
    assert {"name", "description", "body"} <= set(body)
    ids = [part["id"] for part in body["body"] if part["type"] != "markdown"]
    assert len(ids) == len(set(ids)) > 0
    if form != "feature":
        assert "SECURITY.md" in page(f".github/ISSUE_TEMPLATE/{form}.yml")


def test_commits_that_blame_passes_over_are_there_and_format() -> None:
    commits = re.findall(r"(?m)^[0-9a-f]{40}$", page(".git-blame-ignore-revs"))
    assert len(commits) > 0
    if not (ROOT / ".git").exists():
        pytest.skip("not a clone")
    for commit in commits:
        shown = subprocess.run(
            ["git", "show", "--no-patch", "--format=%s", commit], cwd=ROOT, capture_output=True, text=True
        )
        if shown.returncode:
            pytest.skip("a shallow clone")
        assert "format" in shown.stdout
