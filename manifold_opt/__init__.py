"""Riemannian optimizers for PyTorch that keep marked weights orthogonal, or on another manifold.

Mark a weight, or its gate blocks, and train it with the drop-in SGD, Adam, AdamW or Muon of this package:

    from manifold_opt import Adam, mark_orthogonal

    mark_orthogonal(net.weight_hh_l0, blocks=3)
    opt = Adam(net.parameters(), lr=1e-3)
"""

from . import init
from .constraints.average import orthogonal_average, project_to_manifold_
from .constraints.diagnostics import orthogonality_error, spectrum_error
from .constraints.from_parametrized import from_parametrized
from .constraints.lora import mark_lora, unmark_lora
from .constraints.mark import mark_fixed_spectrum, mark_manifold, mark_positive, mark_spectral, mark_unit_norm
from .constraints.modules import mark_attention, mark_orthogonal, mark_recurrent
from .constraints.orthogonalize import orthogonalize_
from .constraints.persistence import constraint_of
from .constraints.validation import unmark
from .linalg.nearest import nearest_orthogonal
from .manifolds import MANIFOLDS, Manifold, Orthogonal
from .optim.adam import Adam, AdamW
from .optim.check import check
from .optim.muon import Muon
from .optim.other_optimizers import warn_of_other_optimizers
from .optim.sgd import SGD
from .stiefel.geometry import riemannian_gradient
from .stiefel.retractions import RETRACTIONS, retract
from .stiefel.step import Retraction

warn_of_other_optimizers()

__version__ = "0.1.0"

__all__ = [
    "MANIFOLDS",
    "RETRACTIONS",
    "SGD",
    "Adam",
    "AdamW",
    "Manifold",
    "Muon",
    "Orthogonal",
    "Retraction",
    "check",
    "constraint_of",
    "from_parametrized",
    "init",
    "mark_attention",
    "mark_fixed_spectrum",
    "mark_lora",
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
    "project_to_manifold_",
    "retract",
    "riemannian_gradient",
    "spectrum_error",
    "unmark",
    "unmark_lora",
]
