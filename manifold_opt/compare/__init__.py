"""Comparison of retractions and other libraries, on standard tasks or on the user's model.

Command line: ``python -m manifold_opt compare --out report``.
"""

from .api import Comparison, compare
from .results import Cost, Curve, Results, RunResult, Summary

__all__ = ["Comparison", "Cost", "Curve", "Results", "RunResult", "Summary", "compare"]
