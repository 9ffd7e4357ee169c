"""Which retraction? Measured: on standard tasks from the command line, on one's own model from Python.

python -m manifold_opt compare --out report
"""

from .api import Comparison, compare
from .results import Cost, Curve, Results, Row, Summary

__all__ = ["Comparison", "Cost", "Curve", "Results", "Row", "Summary", "compare"]
