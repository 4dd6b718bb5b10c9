"""Packages that only some installations have: how a missing one is told."""


def missing(who: str, package: str, extra: str) -> str:
    """One sentence with the remedy, for somebody who has the repository: the package is on no index."""
    return (
        f"{who} needs {package}, which is not installed: install the extra '{extra}' "
        f'(pip install -e ".[{extra}]" in the folder of lora-dp)'
    )
