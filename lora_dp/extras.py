"""Packages that only some installations have: how a missing one is told."""

import contextlib
import importlib.util
from collections.abc import Iterator


class NotInstalled(ImportError):
    """A package is not installed here; the words name the extra that has it."""


def missing(who: str, package: str, extra: str) -> str:
    """One sentence with the remedy, for somebody who has the repository: the package is on no index."""
    return (
        f"{who} needs {package}, which is not installed: install the extra '{extra}' "
        f'(pip install -e ".[{extra}]" in the folder of lora-dp)'
    )


@contextlib.contextmanager
def needing(who: str, extra: str) -> Iterator[None]:
    """Inside, an import of a package that is not installed says so, and which extra has it.

    Raises:
        NotInstalled: in place of a ModuleNotFoundError for a package of somebody else's.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "lora_dp").partition(".")[0]
        if package == "lora_dp":
            raise
        raise NotInstalled(missing(who, package, extra)) from error


def require(who: str, package: str, extra: str) -> None:
    """Misses at the beginning what is imported at the end, after hours of training.

    Raises:
        NotInstalled: the package is not there.
    """
    if importlib.util.find_spec(package) is None:
        raise NotInstalled(missing(who, package, extra))
