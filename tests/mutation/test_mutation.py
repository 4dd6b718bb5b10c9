"""Mutants are what they say, keep their names, and a drawn sample of them is noticed by the tests."""

import secrets
import shutil
import subprocess

import pytest

from tests.mutation.__main__ import equivalents, main, mutants_of
from tests.mutation.cpp_mistakes import cpp_mutants
from tests.mutation.mutant import Mutant
from tests.mutation.python_mistakes import python_mutants
from tests.mutation.targets import SETTLED, SETTLED_NATIVE, TARGETS
from tests.mutation.workbench import ROOT, Workbench

SOURCE = '''
"""Not mutated: 1 + 1."""


def bounded(values, bound, dtype=None):
    """Nor this: 2 * 2."""
    if not values or bound < 0:
        raise ValueError(f"{bound + 1} is too little")
    values.sort()
    scale = min(1.0, bound / sum(values, dtype=dtype))
    return swap(values, bound).measured(scale).double()
'''


def lines(mutants: list[Mutant], source: str) -> set[str]:
    """The line that each mutant changes, as it is then."""
    old = source.splitlines()
    changed = set()
    for mutant in mutants:
        new = mutant.applied(source).splitlines()
        differing = {line.strip() for line in new if line not in old}
        assert len(differing) == 1, mutant.id
        changed |= differing
    return changed


def test_python():
    mutants = python_mutants("bounded.py", SOURCE)
    assert lines(mutants, SOURCE) == {
        "if not (not values or bound < 0):",
        "if (values) or bound < 0:",
        "if not values and bound < 0:",
        "if not values or bound <= 0:",
        "if not values or bound >= 0:",
        "if not values or bound < 1:",
        "pass",
        "scale = max(1.0, bound / sum(values, dtype=dtype))",
        "scale = min(1.0, bound / max(values, dtype=dtype))",
        "scale = min(1.02, bound / sum(values, dtype=dtype))",
        "scale = min(1.0, bound * sum(values, dtype=dtype))",
        "scale = min(1.0, (bound * 1.02) / sum(values, dtype=dtype))",
        "scale = min(1.0, bound / (values))",
        "scale = min(1.0, bound / sum(values))",
        "return swap(bound, values).measured(scale).double()",
        "return swap(values, (bound * 1.02)).measured(scale).double()",
        "return swap(values, bound).measured((scale * 1.02)).double()",
        "return (scale).double()",
        "return swap(values, bound).double()",
        "return swap(values, bound).measured(scale)",
    }
    assert all(mutant.function == "bounded" for mutant in mutants)


def test_cpp():
    source = (
        '// a < b\n#define A 1\nint round(int a, int b) {\n    if (a < b && !b) throw Error("a < b");\n'
        "    a ^= b + 2;  // a + b\n    return a;\n}\n"
    )
    mutants = cpp_mutants("round.h", source)
    assert {mutant.applied(source).splitlines()[mutant.line.startswith("a") + 3].strip() for mutant in mutants} == {
        'if (a <= b && !b) throw Error("a < b");',
        'if (a < b || !b) throw Error("a < b");',
        'if (a < b && b) throw Error("a < b");',
        "a |= b + 2;  // a + b",
        "a ^= b - 2;  // a + b",
        "a ^= b + 3;  // a + b",
        ";  // a + b",
    }
    assert {mutant.function for mutant in mutants} == {"round"}


def test_names_survive_edits_elsewhere():
    names = {mutant.id for mutant in python_mutants("bounded.py", SOURCE)}
    assert len(names) == len(python_mutants("bounded.py", SOURCE))
    edited = SOURCE.replace("    values.sort()\n", "    values.reverse()\n    # a < b\n    values = values[1:]\n")
    edited = f"FIRST = 1 + 2\n{edited}"
    gone = names - {mutant.id for mutant in python_mutants("bounded.py", edited)}
    assert gone == {"bounded.py::bounded::drop statement::values.sort() → pass"}


def test_a_mutant_of_another_source_is_refused():
    mutant = python_mutants("bounded.py", SOURCE)[0]
    with pytest.raises(ValueError, match="has changed since"):
        mutant.applied("#" + SOURCE)


# The repository's own


@pytest.mark.parametrize("path", TARGETS)
def test_every_target_and_its_tests_are_there(path):
    assert (ROOT / path).exists() and all(
        (ROOT / test).exists() for test in (*TARGETS[path].tests, *TARGETS[path].interpreted)
    )
    mutants = mutants_of(path)
    assert len({mutant.id for mutant in mutants}) == len(mutants) > 5


@pytest.mark.parametrize(
    "name",
    [
        "lora_dp/privacy/sampling.py::PoissonSampler.draw::quantity::self.sample_rate → (self.sample_rate * 1.02)",
        "lora_dp/fed/rounds/server_noise.py::NoisySum.add::drop call::rule.measured(change[name]) → (change[name])",
        "lora_dp/fed/rounds/client.py::Trainer._noised::drop call::rules[name].measured(tensor - start[name])",
        "lora_dp/engine/fused_step.py::_native_step::extreme::sum → max",
        "lora_dp/isolation/trial_values.py::::constant::1e-4 → 0.01",
    ],
)
def test_mistakes_that_tests_once_missed_are_among_them(name):
    path = name.partition("::")[0]
    assert any(mutant.id.startswith(name) for mutant in mutants_of(path))


@pytest.mark.slow
def test_what_is_written_down_as_equivalent_is_a_mutant_and_has_its_reason():
    known = {mutant.id for path in TARGETS for mutant in mutants_of(path)}
    found = equivalents()
    assert [name for name in found if name not in known] == []
    assert all(len(reason.split()) > 3 for reason in found.values())


@pytest.mark.slow
def test_an_entry_that_is_no_mutant_fails(tmp_path, monkeypatch, capsys):
    gone = tmp_path / "equivalents.toml"
    gone.write_text('"because of this and that" = ["lora_dp/privacy/noise.py::grid_step::compare::no more"]\n')
    monkeypatch.setattr("tests.mutation.__main__.EQUIVALENTS", gone)
    assert main(["--only", "lora_dp/privacy/noise.py", "--list"]) == 1
    assert "and no mutant: lora_dp/privacy/noise.py::grid_step::compare::no more" in capsys.readouterr().out


@pytest.mark.slow
def test_a_survivor_fails_and_what_was_noticed_is_not_run_again(tmp_path, monkeypatch, capsys):
    """The second mutant is beside the one test that is run: nobody looks there."""
    from tests.mutation import __main__ as command

    monkeypatch.setitem(
        command.TARGETS,
        "lora_dp/privacy/clipping.py",
        command.TARGETS["lora_dp/privacy/clipping.py"].__class__(("tests/nn/test_regulator.py",)),
    )
    words = [
        "--only",
        "lora_dp/privacy/clipping.py",
        "--match",
        "drop statement",
        "--sample",
        "1",
        "--work",
        str(tmp_path),
    ]
    assert main(words) == 1
    assert "survived: lora_dp/privacy/clipping.py" in capsys.readouterr().out
    monkeypatch.undo()
    assert main(words) == 0
    assert " s  lora_dp" in capsys.readouterr().out
    assert main(words) == 0
    assert " s  lora_dp" not in capsys.readouterr().out


def sample(files: tuple[str, ...], number: int, minutes: float, work: str) -> None:
    """No mutant of a new draw survives; what the draw was is said where one does."""
    seed = secrets.randbelow(10**6)
    words = [word for path in files for word in ("--only", path)]
    words += ["--sample", str(number), "--seed", str(seed), "--minutes", str(minutes), "--work", work]
    assert main(words) == 0, f"python -m tests.mutation {' '.join(words[:-2])}"


@pytest.mark.slow
def test_a_few_mutants_are_noticed(tmp_path):
    sample(SETTLED, 4, 2, str(tmp_path))


@pytest.mark.long
def test_a_sample_of_mutants_is_noticed(tmp_path):
    sample(SETTLED, 25, 6, str(tmp_path))


@pytest.mark.long
def test_mistakes_in_native_code(tmp_path):
    """What the compiler makes the same library of is told apart; a few mutants are noticed."""
    missing = [name for name in ("cmake", "ninja", "g++") if shutil.which(name) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}")
    source = (ROOT / "csrc/stream.h").read_bytes()
    end = source.index(b"\n")
    first = source[:end].decode()
    with Workbench(tmp_path / "plain-0") as bench:
        try:
            found = bench.try_out(Mutant("csrc/stream.h", "", "text", 0, end, first, "// Anything.", first), [], [])
        except subprocess.CalledProcessError as error:
            pytest.skip(f"nanobind could not be fetched: {error}")
        assert found["status"] == "same code"
        # What leaves an array ends the process, whatever it reads there.
        (beyond,) = (
            mutant
            for mutant in mutants_of("csrc/chacha20.h")
            if mutant.operator == "compare" and "block[w] = little_endian" in mutant.line
        )
        assert bench.try_out(beyond, ["tests/ops/test_chacha20.py"], [])["status"] == "killed"
    sample(SETTLED_NATIVE, 3, 2, str(tmp_path))
