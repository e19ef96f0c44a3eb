"""The site that `make docs` builds: README and the guides as they are, and a reference from the docstrings.

Its source folder is the checkout's, so that links between the documents work here as they do there.
"""

from __future__ import annotations

from importlib.metadata import version as installed_version

from sphinx.application import Sphinx

project = "fused-sgd"
copyright = "the fused-sgd authors"  # noqa: A001
version = release = installed_version("fused-sgd")

root_doc = "README"
PAGES = ["docs/api", "docs/precision", "docs/large-batch", "docs/performance"]
MORE_PAGES = ["benchmarks/REPORT", "benchmarks/results/README", "CONTRIBUTING", "CHANGELOG"]
include_patterns = [f"{page}.md" for page in (root_doc, *PAGES, *MORE_PAGES)]

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = "fused-sgd"

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
napoleon_numpy_docstring = False


def add_contents(_: Sphinx, page: str, source: list[str]) -> None:
    """Puts the table of contents, which GitHub would show as text, under README."""
    if page == root_doc:
        for caption, pages in (("Guides", PAGES), ("Project", MORE_PAGES)):
            source[0] += "\n".join(["\n```{toctree}", ":hidden:", f":caption: {caption}", "", *pages, "```\n"])


def setup(app: Sphinx) -> None:
    """Sphinx calls this."""
    app.connect("source-read", add_contents)
