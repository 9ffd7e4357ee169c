r"""The orthographic retraction of square blocks: the point above ``w + v``, along a normal.

As a rotation (rotation.py): :math:`c(x) = \sqrt{1-x} - 1` and :math:`s(x) = 0`, that is
:math:`Q = \Omega + (I - \Omega\Omega^\top)^{1/2}`. It exists up to :math:`\lVert\Omega\rVert_2 = 1` and is used up to
0.7. Longer steps, and rectangular blocks, take the polar retraction.

Reference: Absil & Malick (2012), *Projection-like retractions on matrix manifolds*.
"""

from __future__ import annotations

from ..linalg.polynomials import fits_by_dtype, interpolate
from . import polar
from .rotation import Rotation

SQRT = fits_by_dtype(  # (1 - x)^(1/2) - 1, up to 0.7^2
    lambda degree, reach: interpolate(lambda x: -1 / (1 + (1 - x).sqrt()), degree, reach),
    {1: 1.18e-3, 2: 2.29e-2, 4: 0.198, 6: 0.42, 8: 0.49},
    {
        1: 5e-8,
        2: 2.85e-5,
        4: 3.9e-3,
        6: 3.02e-2,
        8: 9e-2,
        10: 0.175,
        12: 0.271,
        14: 0.364,
        16: 0.448,
        18: 0.49,
    },
)


ROTATION = Rotation(SQRT, fallback=polar.ROTATION)
