"""Formulas as MathML, which browsers draw by themselves: no script, nothing to fetch, right without a network too."""

from typing import Any

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.util import logging

logger = logging.getLogger(__name__)


def mathml(node: nodes.Element, display: str) -> str:
    """The formula of a node; one that is not understood is a warning that names its place."""
    try:
        formula = convert(node.astext(), display=display)
        problem = "a command that is not known" if "\\" in formula else ""
    except Exception as failure:  # of many kinds, without a common one
        formula, problem = "", repr(failure)
    if problem:
        logger.warning("formula %r: %s", node.astext(), problem, location=node)
    return formula


def visit_inline(self: Any, node: nodes.math) -> None:
    """In a line of text."""
    self.body.append(mathml(node, "inline"))
    raise nodes.SkipNode


def visit_display(self: Any, node: nodes.math_block) -> None:
    """On a line of its own, which scrolls where it is wider than the page."""
    self.body.append(f'<div class="math">{mathml(node, "block")}</div>\n')
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, bool]:
    """Known as html_math_renderer = "mathml"."""
    app.add_html_math_renderer("mathml", (visit_inline, None), (visit_display, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
