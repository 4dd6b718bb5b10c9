"""The documentation as a site: ``sphinx-build -W docs build/docs``."""

import re
import sys
from pathlib import Path

from sphinx.application import Sphinx

sys.path.insert(0, str(Path(__file__).parent))
import command_line  # noqa: E402

project = "lora-dp"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = "lora-dp"
html_show_copyright = False
html_static_path = ["static"]
html_css_files = ["site.css"]

# Every role of a docstring must lead somewhere; types of other packages in signatures have no page here.
nitpicky = True
nitpick_ignore_regex = [("py:(class|obj)", ".*"), ("py:exc", "yaml.*")]

myst_heading_anchors = 4
autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False
toc_object_entries_show_parents = "hide"
napoleon_use_ivar = True

_SOURCE = re.compile(r"\[([^\]]+)\]\((?:\.\./)+(lora_dp/[\w/]+)\.py\)")
_OUTSIDE = re.compile(r"\[([^\]]+)\]\((?:\.\./)+(?:benchmarks|experiments|examples|tests)\b[^)]*\)")


def _links_out_of_the_site(app: Sphinx, docname: str, source: list[str]) -> None:
    """A link to a file of the code leads to the module's reference; what has no page here is named without a link."""
    text = _SOURCE.sub(lambda link: f"{{py:mod}}`{link[1].strip('`')} <{link[2].replace('/', '.')}>`", source[0])
    source[0] = _OUTSIDE.sub(r"\1", text)


def _add_options(app: Sphinx, docname: str, source: list[str]) -> None:
    """The page of the command line is its introduction and what the parsers say."""
    if docname == "reference/command-line":
        source[0] += command_line.markdown()


def setup(app: Sphinx) -> None:
    app.connect("source-read", _add_options)
    app.connect("source-read", _links_out_of_the_site)
