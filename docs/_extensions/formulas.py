"""Formulas as SVG, drawn when the pages are built: nothing to fetch, no script, no font that a reader may lack."""

import re
from html import escape
from typing import Any
from xml.etree import ElementTree

import ziamath
from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.util import logging

logger = logging.getLogger(__name__)
ziamath.config.svg2 = False  # outlines where they stand: ids of a page's formulas would meet
# The converter knows \big and the like before one character only; braces stay small there, \left\{ makes them large.
SIZED = re.compile(r"(\\[bB]igg?)[lrm]?\s*\\(\||[lr]?Vert|[lr]angle|[{}])")
DELIMITERS = {
    "|": "\u2016",
    "Vert": "\u2016",
    "lVert": "\u2016",
    "rVert": "\u2016",
    "langle": "\u27e8",
    "rangle": "\u27e9",
}
SIZE = 100  # pixels an em, to be scaled to the text's


def sized(found: re.Match[str]) -> str:
    """A delimiter with its size, as the converter takes it."""
    size, name = found.groups()
    return size + DELIMITERS[name] if name in DELIMITERS else f"\\{name}"


def drawn(node: nodes.Element, *, inline: bool) -> str:
    """The formula of a node; one that is not understood is a warning that names its place."""
    source = node.astext()
    try:
        tex = SIZED.sub(sized, source)
        if "\\" in convert(tex):
            raise ValueError("it has a command that is not known")
        formula = ziamath.Latex(tex, size=SIZE, inline=inline, color="currentColor")
        svg = formula.svgxml()
        width, height = (float(svg.attrib.pop(side)) / SIZE for side in ("width", "height"))
        if height <= 0:
            raise ValueError("there is nothing to see of it")
    except Exception as problem:  # of many kinds, without a common one
        logger.warning("formula %r: %s", source, problem or type(problem).__name__, location=node)
        return f"<code>{escape(source)}</code>"
    place = f"width:{width:.3f}em;height:{height:.3f}em;vertical-align:{formula.getyofst() / SIZE:.3f}em"
    for name, value in (("role", "img"), ("aria-label", source), ("class", "formula"), ("style", place)):
        svg.set(name, value)
    return ElementTree.tostring(svg, encoding="unicode")


def visit_inline(self: Any, node: nodes.math) -> None:
    """In a line of text."""
    self.body.append(drawn(node, inline=True))
    raise nodes.SkipNode


def visit_display(self: Any, node: nodes.math_block) -> None:
    """On a line of its own, which scrolls where it is wider than the page."""
    self.body.append(f'<div class="math">{drawn(node, inline=False)}</div>\n')
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, bool]:
    """Known as html_math_renderer = "svg"."""
    app.add_html_math_renderer("svg", (visit_inline, None), (visit_display, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
