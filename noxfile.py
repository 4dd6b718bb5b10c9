"""The tasks of a contributor: ``nox -l`` lists them, ``nox -s NAME`` runs one.

All run in the environment that nox itself is installed in: another one would take 6 GB.
"""

import sys

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


@nox.session
def docs(session: nox.Session) -> None:
    """Build the site of the documentation into build/docs; a warning is an error."""
    python(session, "sphinx", "-q", "-W", "--keep-going", "docs", "build/docs")


@nox.session
def bench(session: nox.Session) -> None:
    """The benchmarks on the CPU, in about five minutes; arguments after -- go to pytest."""
    python(session, "pytest", "benchmarks", "-s", *session.posargs)
    python(session, "benchmarks.startup", "--output", "build/startup")
