"""Manifolds that parameters can be constrained to, one file each."""

from .base import Manifold
from .fixed_spectrum import FixedSpectrum
from .geoopt import Geoopt
from .orthogonal import Orthogonal
from .positive import Positive
from .spectral_ball import Spectral
from .unit_norm import UnitNorm

MANIFOLDS: dict[str, type[Manifold]] = {
    "orthogonal": Orthogonal,
    "unit_norm": UnitNorm,
    "spectral": Spectral,
    "positive": Positive,
    "fixed_spectrum": FixedSpectrum,
    "geoopt": Geoopt,
}

__all__ = ["MANIFOLDS", "FixedSpectrum", "Geoopt", "Manifold", "Orthogonal", "Positive", "Spectral", "UnitNorm"]
