"""One self-contained HTML page of a run or of a comparison."""

from importlib import metadata
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from lora_dp.atomic_files import write_atomically
from lora_dp.fed.compare.grid import DEFINITION
from lora_dp.fed.page import comparison_page, number_format, run_page

PAGE = "report.html"
_PACKAGES = ("lora-dp", "torch", "transformers", "timm", "datasets", "dp-accounting", "numpy")


def write_page(folder: Path) -> Path:
    """Writes report.html into the folder of a run or of a comparison, finished or not, and returns its path.

    The page loads nothing: images, styles and all are in the file. A former one is replaced as a whole.

    Raises:
        ValueError: no run and no comparison there, or a damaged one.
    """
    if (folder / DEFINITION).exists():
        template, content = "comparison.html.j2", comparison_page.content(folder)
    elif (folder / "config.yaml").exists():
        template, content = "run.html.j2", run_page.content(folder)
    else:
        raise ValueError(f"{folder} holds neither a run nor a comparison: name the folder that one has left.")
    page = _environment().get_template(template).render(**content, written_with=_versions())
    write_atomically(folder / PAGE, page)
    return folder / PAGE


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("lora_dp.fed.page", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters: dict[str, Any] = {
        "percent": number_format.percent,
        "number": number_format.number,
        "epsilon": number_format.epsilon,
        "size": number_format.size,
        "duration": number_format.duration,
    }
    environment.filters |= filters
    return environment


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
