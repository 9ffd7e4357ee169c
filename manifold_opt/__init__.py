"""Orthogonal weights, kept orthogonal by the optimizer.

Mark a weight, or each gate block of it, and train it with the drop-in SGD, Adam or AdamW of this package:

    from manifold_opt import Adam, mark_orthogonal

    mark_orthogonal(net.weight_hh_l0, blocks=3)
    opt = Adam(net.parameters(), lr=1e-3)
"""

from . import init
from .constraint import Orthogonal, constraint_of, orthogonalize_, unmark
from .diagnostics import orthogonality_error
from .health import check, orthogonal_average, project_
from .marking import mark_orthogonal, mark_recurrent
from .optim import SGD, Adam, AdamW
from .orthogonalizer import nearest_orthogonal
from .retractions import RETRACTIONS, Retraction, retract
from .stiefel import project

__version__ = "0.1.0.dev0"

__all__ = [
    "RETRACTIONS",
    "SGD",
    "Adam",
    "AdamW",
    "Orthogonal",
    "Retraction",
    "check",
    "constraint_of",
    "init",
    "mark_orthogonal",
    "mark_recurrent",
    "nearest_orthogonal",
    "orthogonal_average",
    "orthogonality_error",
    "orthogonalize_",
    "project",
    "project_",
    "retract",
    "unmark",
]
