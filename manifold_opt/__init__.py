"""Orthogonal weights, kept orthogonal by the optimizer.

Mark a weight, or each gate block of it, and train it with the drop-in SGD, Adam or AdamW of this package:

    from manifold_opt import Adam, mark_orthogonal

    mark_orthogonal(net.weight_hh_l0, blocks=3)
    opt = Adam(net.parameters(), lr=1e-3)
"""

from . import init
from .average import orthogonal_average, project_
from .constraint import constraint_of, orthogonalize_
from .diagnostics import orthogonality_error
from .door import unmark
from .health import check
from .manifolds import MANIFOLDS, Manifold, Orthogonal
from .marking import mark_attention, mark_orthogonal, mark_recurrent
from .marks import mark_manifold, mark_positive, mark_spectral, mark_unit_norm
from .migration import from_parametrized
from .optim import SGD, Adam, AdamW
from .orthogonalizer import nearest_orthogonal
from .retractions import RETRACTIONS, Retraction, retract
from .stiefel import project

__version__ = "0.1.0.dev0"

__all__ = [
    "MANIFOLDS",
    "RETRACTIONS",
    "SGD",
    "Adam",
    "AdamW",
    "Manifold",
    "Orthogonal",
    "Retraction",
    "check",
    "constraint_of",
    "from_parametrized",
    "init",
    "mark_attention",
    "mark_manifold",
    "mark_orthogonal",
    "mark_positive",
    "mark_recurrent",
    "mark_spectral",
    "mark_unit_norm",
    "nearest_orthogonal",
    "orthogonal_average",
    "orthogonality_error",
    "orthogonalize_",
    "project",
    "project_",
    "retract",
    "unmark",
]
