"""How Sphinx builds these pages: sphinx-build -W --keep-going -b html docs docs/_build."""

import importlib.resources
import logging
import re

import manifold_opt
from sphinx.application import Sphinx

project = "manifold_opt"
author = "The manifold_opt authors"
project_copyright = author
version = release = manifold_opt.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinxarg.ext",
]
exclude_patterns = ["_build"]
smartquotes_action = "D"  # dashes only
highlight_language = "text"  # of what is indented and does not say what it is
nitpicky = True  # a name that leads nowhere is an error
nitpick_ignore_regex = [  # other packages, which would have to be fetched, and what is not public
    (
        r"py:.*",
        r"(torch|collections|geoopt|manifold_opt\.linalg|manifold_opt\.stiefel)\..*",
    )
]

# Of a kind of page there may be none. (The warning has no type by which suppress_warnings could name it.)
_toctree = logging.getLogger("sphinx.sphinx.directives.other")
_toctree.addFilter(lambda record: getattr(record, "subtype", "") != "empty_glob")

# Markdown
myst_enable_extensions = [
    "attrs_block",
    "colon_fence",
    "dollarmath",
]  # {.cards} above a list
myst_ref_domains = ["std", "py"]
myst_heading_anchors = 3  # links to headings, as GitHub makes them
myst_dmath_double_inline = True

# Docstrings
autodoc_member_order = "bysource"
autodoc_typehints = (
    "none"  # the text says them shorter; the source, a click away, has them all
)
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_param = False  # one line for "params, lr, betas: as in torch"
napoleon_use_ivar = True

# Formulas: one file of MathJax, fonts included, is copied beside the pages, so that they render offline.
_mathjax = (
    importlib.resources.files("sphinx-mathjax-offline") / "static/mathjax/tex-svg.js"
)
mathjax_path = "tex-svg.js"

# Pages
html_theme = "furo"
html_title = "manifold_opt"
pygments_dark_style = "monokai"  # furo's own underlines every import
html_static_path = ["_static", str(_mathjax)]
html_css_files = ["pages.css"]
html_show_sphinx = False
html_copy_source = False
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True


def setup(app: Sphinx) -> None:
    """Lead links to pages above docs/ to where those are here; other files become downloads by themselves."""

    def lead(_: Sphinx, __: str, source: list[str]) -> None:
        for name, page in (("README", "index"), ("CHANGELOG", "changelog")):
            source[0] = re.sub(
                rf"\]\((\.\./)+{name}\.md[^)]*\)", f"](/{page}.md)", source[0]
            )

    app.connect("source-read", lead)
