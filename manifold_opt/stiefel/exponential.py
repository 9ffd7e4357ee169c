r"""The exponential map: along the geodesic of a metric.

As a rotation of square blocks (rotation.py): :math:`c(x) = \cos\sqrt x - 1` and
:math:`s(x) = \sin(\sqrt x)/\sqrt x - 1`.

Reference: Edelman, Arias & Smith (1998), *The geometry of algorithms with orthogonality constraints*.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..linalg.newton_schulz import spectral_bound
from ..linalg.polynomials import Fit, fits_by_dtype
from .geometry import Metric, coordinates
from .long_steps import in_double_if_long
from .rotation import Rotation


@in_double_if_long
def exp(w: Tensor, v: Tensor, *, metric: Metric = "euclidean") -> Tensor:
    r"""Return the end of the geodesic from ``w`` in the direction ``v``, followed for unit time.

    .. math::
        \text{square:} \quad & e^{\Omega} W \\
        \text{canonical:} \quad & [I \; 0] \exp\begin{pmatrix} \Omega & I \\ -N N^\top & 0 \end{pmatrix}
            \begin{pmatrix} W \\ N \end{pmatrix} \\
        \text{euclidean:} \quad & e^{-\Omega} [I \; 0]
            \exp\begin{pmatrix} \Omega & I \\ -V V^\top & \Omega \end{pmatrix}
            \begin{pmatrix} W \\ V \end{pmatrix}

    with the second block row scaled so that both off-diagonal blocks have the size of the step.

    Reference: Edelman, Arias & Smith (1998), sections 2.2.2 and 2.3.1, transposed; the canonical one in
    the basis (W, N), which needs no QR of N.
    """
    omega, *normal = coordinates(w, v)
    if not normal:
        return _matrix_exp(omega) @ w
    # Not v itself: rounding leaves a part in v that is not tangent, which would grow with the length of the step.
    across = omega @ w + normal[0] if metric == "euclidean" else normal[0]
    gram = across @ across.mH
    size = spectral_bound(gram).sqrt().clamp_min(torch.finfo(w.dtype).tiny)[..., None, None]
    identity = torch.eye(w.shape[-2], dtype=w.dtype, device=w.device)
    corner = omega if metric == "euclidean" else torch.zeros_like(omega)
    generator = torch.cat([torch.cat([omega, size * identity], -1), torch.cat([-gram / size, corner], -1)], -2)
    top = _matrix_exp(generator)[..., : w.shape[-2], :]
    moved = top @ torch.cat([w, across / size], -2)
    return _matrix_exp(-omega) @ moved if metric == "euclidean" else moved


def _matrix_exp(a: Tensor) -> Tensor:
    """Return the matrix exponential, as exact for a single matrix as for a batch."""
    # torch 2.13 cuts the series of a single matrix too early: an error of 1e-11 at norm 0.03 in float64.
    if a[..., 0, 0].numel() > 1:
        return torch.linalg.matrix_exp(a)
    single = a.reshape(1, *a.shape[-2:])
    return torch.linalg.matrix_exp(torch.cat([single, single]))[0].reshape(a.shape)


def _taylor(offset: int) -> Callable[[int, float], Fit]:
    """Return a function that cuts the series of x^k (-1)^k / (2k + offset)! at a degree."""

    def fit(degree: int, reach: float) -> Fit:
        return Fit(reach, tuple((-1) ** k / math.factorial(2 * k + offset) for k in range(1, degree + 1)))

    return fit


_REACHES = ({1: 8e-4, 2: 2.7e-2, 4: 0.67, 6: 3.6}, {1: 3.5e-8, 2: 3.3e-5, 4: 1.1e-2, 6: 0.17, 8: 0.91})
COS = fits_by_dtype(_taylor(0), *_REACHES)  # cos(x^(1/2)) - 1
SINC = fits_by_dtype(_taylor(1), *_REACHES)  # sin(x^(1/2)) / x^(1/2) - 1


ROTATION = Rotation(COS, sine_fits=SINC)
