"""What is installed: the native library, the kernels under their own name, the typing marker, one version."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import re
import subprocess
import sys
import tomllib
from importlib.resources import files
from pathlib import Path

import pytest
import yaml

import lora_dp

ROOT = Path(__file__).parents[1]


def run_python(code: str, folder: Path) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_version_and_license_are_the_same_wherever_they_are_written() -> None:
    """RELEASING.md names the places."""
    metadata = importlib.metadata.metadata("lora-dp")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert project["version"] == citation["version"] == lora_dp.__version__ == metadata["Version"]
    assert project["license"] == citation["license"] == metadata["License-Expression"] == "Apache-2.0"
    newest = re.search(r"(?m)^## (\S+) \((.+)\)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"))
    assert newest is not None and newest[1] == lora_dp.__version__
    # A released version has its day in both, one to come in neither.
    day = citation.get("date-released", "unreleased")
    assert newest[2] == str(day)


def test_native_library_loads_without_torch(tmp_path: Path) -> None:
    """No torch at build time, so a new torch release cannot break the binary."""
    spec = importlib.util.find_spec("lora_dp._native")
    assert spec is not None and spec.origin is not None
    code = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('_native', {spec.origin!r})\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "print('torch' in sys.modules, hasattr(module, 'private_update'))"
    )
    assert run_python(code, tmp_path) == "False True"


@pytest.mark.slow
def test_imports_are_the_same_in_the_repository_and_elsewhere(tmp_path: Path) -> None:
    code = (
        "import lora_dp, lora_dp._native, lora_dp.kernels, lora_dp.privacy.randomness\n"
        "print(*(m.__file__ for m in (lora_dp, lora_dp._native, lora_dp.kernels, lora_dp.privacy.randomness)))"
    )
    assert run_python(code, tmp_path) == run_python(code, ROOT)


@pytest.mark.slow
def test_no_package_called_kernels_is_installed(tmp_path: Path) -> None:
    """That name is another project's, and transformers looks for it."""
    top_level = {path.parts[0] for path in importlib.metadata.files("lora-dp") or []}
    assert "kernels" not in top_level
    # From the repository's root the folder can be seen: it must not pass for that project either.
    code = "from transformers.utils import is_kernels_available; print(is_kernels_available())"
    assert run_python(code, ROOT) == run_python(code, tmp_path)


def test_the_folder_above_the_repository_is_not_importable(tmp_path: Path) -> None:
    """An install must not make every neighbour of a checkout look like a package."""
    paths = run_python("import sys; print(*sys.path, sep='\\n')", tmp_path).splitlines()
    assert str(ROOT.parent) not in paths


def test_package_is_typed() -> None:
    assert (files(lora_dp) / "py.typed").is_file()
