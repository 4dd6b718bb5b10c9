"""The tasks of a contributor: ``nox -l`` lists them, ``nox -s NAME`` runs one.

All run in the environment that nox itself is installed in: another one would take 6 GB.
"""

import os
import shutil
import sys
import tarfile
from pathlib import Path

import nox

nox.options.default_venv_backend = "none"
nox.options.sessions = ["lint", "test-fast"]

# A worker takes about 1.3 GB of memory.
WORKERS = ("-n", "logical", "--maxprocesses", "8")


def python(session: nox.Session, *arguments: str, **environment: str) -> None:
    session.run(sys.executable, "-m", *arguments, env=environment)


@nox.session(name="test-fast")
def test_fast(session: nox.Session) -> None:
    """The tests to run at every change, in about two and a half minutes; arguments after -- go to pytest."""
    python(session, "pytest", *WORKERS, "-m", "not slow and not long", *session.posargs)


@nox.session
def test(session: nox.Session) -> None:
    """All tests, those marked slow and long too, then the Triton kernels in the interpreter."""
    python(session, "pytest", *WORKERS)
    python(session, "pytest", *WORKERS, "tests/kernels", TRITON_INTERPRET="1")


@nox.session
def lint(session: nox.Session) -> None:
    """Formatting, ruff's rules and types, as CI checks them."""
    python(session, "ruff", "format", "--check", ".")
    python(session, "ruff", "check", ".")
    python(session, "mypy")


@nox.session(name="peft-tests")
def peft_tests(session: nox.Session) -> None:
    """PEFT's own tests of LoRA on small models, each made private, in a minute; a version of PEFT after --."""
    folder = Path("build/peft-tests").resolve()
    shutil.rmtree(folder, ignore_errors=True)
    source = f"peft=={(session.posargs or ['0.20.0'])[0]}"
    python(session, "pip", "download", "-q", "--no-deps", "--no-binary", ":all:", "--dest", str(folder), source)
    [archive] = folder.glob("peft-*.tar.gz")
    with tarfile.open(archive) as opened:
        opened.extractall(folder, filter="data")
    [unpacked] = (path for path in folder.glob("peft-*") if path.is_dir())
    (unpacked / "tests").rename(folder / "tests")  # beside "src" they would import it
    (folder / "tests" / "__init__.py").touch()
    (folder / "pytest.ini").write_text("[pytest]\n")  # rather than this project's
    beside = folder / "beside"
    python(session, "pip", "install", "-q", "--no-deps", "--target", str(beside), "diffusers", "parameterized")
    with session.chdir(folder):
        found = os.pathsep.join([str(Path(__file__).parent / "tests" / "lora"), str(beside)])
        options = ("-q", "-p", "peft_suite", "-p", "no:cacheprovider", "-rfs", "tests/test_custom_models.py")
        environment = {"PYTHONPATH": found}
        # Some fail for PEFT itself.
        session.run(sys.executable, "-m", "pytest", *options, env=environment, success_codes=[0, 1])


@nox.session
def docs(session: nox.Session) -> None:
    """Build the site of the documentation into build/docs; a warning is an error."""
    python(session, "sphinx", "-q", "-W", "--keep-going", "docs", "build/docs")


@nox.session
def bench(session: nox.Session) -> None:
    """The benchmarks on the CPU, in about five minutes; arguments after -- go to pytest."""
    python(session, "pytest", "benchmarks", "-s", *session.posargs)
    python(session, "benchmarks.startup", "--output", "build/startup")
