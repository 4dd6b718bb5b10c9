"""Without an extra one sentence says which to install."""

import subprocess
import sys

import pytest

from lora_dp.extras import needing

RUN = ("--rounds", "1", "--clients", "2", "--output", "out")
GRID = ("compare", "--methods", "la-lora", "--output", "out")
CALLS = {
    "run": "from lora_dp.fed import run",
    "resume": "from lora_dp.fed import resume",
    "digits": "from lora_dp.fed.data.opening import open_data; from lora_dp.fed.data.options import DataConfig; "
    "open_data(DataConfig())",
    "data": "from lora_dp.fed.data.opening import open_data; from lora_dp.fed.data.options import DataConfig; "
    "open_data(DataConfig('some.csv'))",
    "hub": "from lora_dp.fed.hub import hub; hub('some/model').__enter__()",
    "plot": "from lora_dp.auditing import plot_audits; plot_audits({}, 'audit.png')",
}


def without(package: str, code: str, folder) -> tuple[int, str, list[str]]:
    """What a process without a package ends with, prints, and says on its standard error."""
    hidden = f"import sys; sys.modules[{package!r}] = None; {code}"
    done = subprocess.run([sys.executable, "-c", hidden], capture_output=True, text=True, timeout=120, cwd=folder)
    return done.returncode, done.stdout, done.stderr.splitlines()


def is_the_sentence(line: str, package: str, extra: str = "fed") -> bool:
    return (
        f" needs {package}, which is not installed: install the extra '{extra}' (pip install -e \".[{extra}]\"" in line
    )


@pytest.mark.parametrize("package", ["jsonargparse", "rich", "yaml"])
def test_without_its_extra_it_says_which_to_install(package, tmp_path):
    code, out, [line] = without(package, "from lora_dp.fed.cli import main; sys.exit(main(['--help']))", tmp_path)
    assert code == 2 and out == ""
    assert line.startswith("error: lora_dp.fed") and is_the_sentence(line, package)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("package", "words"),
    [
        ("timm", RUN),
        pytest.param("transformers", RUN, marks=pytest.mark.long),
        pytest.param("sklearn", RUN, marks=pytest.mark.long),
        ("matplotlib", RUN),
        pytest.param("PIL", RUN, marks=pytest.mark.long),
        ("datasets", ("--dataset", ".", *RUN)),
        ("pandas", GRID),
        pytest.param("tabulate", GRID, marks=pytest.mark.long),
        pytest.param("jinja2", GRID, marks=pytest.mark.long),
        ("jinja2", ("report", ".")),
        ("matplotlib", ("audit", "options.yaml")),
        ("timm", ("pretrain", "--dataset", ".", "--output", "out")),
    ],
)
def test_a_command_without_a_package_says_which_extra_has_it(package, words, tmp_path):
    (tmp_path / "options.yaml").write_text("rounds: 1\n")
    code, out, [line] = without(package, f"from lora_dp.fed.cli import main; sys.exit(main({list(words)}))", tmp_path)
    assert code == 2 and not (tmp_path / "out").exists()
    assert line.startswith("error: ") and is_the_sentence(line, package)
    # Nothing has been trained by then.
    assert "loss" not in out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("package", "call"),
    [
        ("timm", "run"),
        ("yaml", "run"),
        ("transformers", "resume"),
        ("matplotlib", "run"),
        ("sklearn", "digits"),
        ("datasets", "data"),
        ("datasets", "hub"),
        ("matplotlib", "plot"),
    ],
)
def test_python_without_a_package_says_which_extra_has_it(package, call, tmp_path):
    code, _, lines = without(package, CALLS[call], tmp_path)
    assert code == 1
    assert lines[-1].startswith("lora_dp.extras.NotInstalled: ") and is_the_sentence(lines[-1], package)


@pytest.mark.slow
@pytest.mark.parametrize(("package", "named"), [("flwr", "Flower"), ("ray", "Ray")])
def test_engine_flower_names_the_extra_flower(package, named, tmp_path):
    words = ["--engine", "flower", "--output", "out"]
    code, _, [*_, line] = without(package, f"from lora_dp.fed.cli import main; sys.exit(main({words}))", tmp_path)
    assert code == 2 and line.startswith("error: ") and is_the_sentence(line, named, "flower")


def test_a_module_of_our_own_that_is_missing_is_no_matter_of_extras():
    with pytest.raises(ModuleNotFoundError), needing("x", "fed"):
        raise ModuleNotFoundError("No module named 'lora_dp.x'", name="lora_dp.x")
    with pytest.raises(ImportError, match="cannot import name"), needing("x", "fed"):
        raise ImportError("cannot import name 'y' from 'z'", name="z")
