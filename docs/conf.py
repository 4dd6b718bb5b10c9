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
smartquotes_action = "q"  # two hyphens begin an option
html_static_path = ["static"]
html_css_files = ["site.css"]

# Every role of a docstring must lead somewhere. Not so, in signatures: names of other packages, pieces of nested types,
# aliases of types, and variables for types.
nitpicky = True
nitpick_ignore_regex = [
    ("py:(class|exc)", r"(?!lora_dp)\w+\..*"),
    ("py:(class|obj)", r".*\[.*"),
    ("py:class", r"Tensor|Optimizer|State|Contribution|Matrix|AbstractContextManager|lora_dp\..*\.(T|Result|_Parser)"),
]

myst_heading_anchors = 4
autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False
toc_object_entries_show_parents = "hide"
# Several names of one meaning stand in one line there.
napoleon_custom_sections = [("Attributes", "params_style")]

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


def _no_type_before_a_colon(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """An empty comment goes first: else napoleon takes what stands before a colon in the first line for a type."""
    if what in ("attribute", "data", "property"):
        lines[:0] = ["..", ""]


def _indented_is_code(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Formulas and code stand indented below a paragraph, where reStructuredText sees a quotation."""
    for place in range(len(lines) - 1, 1, -1):
        before, above = lines[place - 1], lines[place - 2]
        if lines[place].startswith("    ") and not before and above and above[0] != " " and not above.endswith("::"):
            lines[place:place] = ["::", ""]


def setup(app: Sphinx) -> None:
    app.connect("autodoc-process-docstring", _indented_is_code, priority=300)
    app.connect("autodoc-process-docstring", _no_type_before_a_colon, priority=400)
    app.connect("source-read", _add_options)
    app.connect("source-read", _links_out_of_the_site)
