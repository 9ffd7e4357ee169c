r"""Steps of any length: computed in double precision if they are long, and clipped to a largest norm.

A retraction is a function ``(w, v, **options) -> w'`` of points and tangents, ``(..., p, n)`` with ``p <= n``. In its
formulas :math:`V = \Omega W + N`, with the skew p x p matrix :math:`\Omega = V W^\top` and :math:`N W^\top = 0`; of
square matrices N is zero. For complex matrices every transpose is the conjugate transpose.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from ..linalg.matrices import in_double
from ..linalg.newton_schulz import newton_schulz
from ..linalg.polar_factor import polar_factor
from ..linalg.products import host_can_branch
from .geometry import transport

RetractionFn = Callable[..., Tensor]

LONG_STEP_NORM = 32.0  # Frobenius norm of a step above which the rounding of W and V is visible in I + V V^T


def in_double_if_long(retraction: RetractionFn) -> RetractionFn:
    """Let a retraction compute the blocks with a step longer than ``LONG_STEP_NORM`` in double precision.

    A long step magnifies the rounding of the input. So the point and the tangent are first made exact in double
    precision: W W^T = I, and V tangent at W. The polar factor removes the error of the result. If values may not be
    read (:func:`~manifold_opt.linalg.products.host_can_branch`), longer steps are scaled down instead.
    """

    @functools.wraps(retraction)
    def with_long_steps(w: Tensor, v: Tensor, **options: object) -> Tensor:
        length = torch.linalg.matrix_norm(v, keepdim=True)
        if not host_can_branch(w):
            return retraction(w, v * (LONG_STEP_NORM / length).clamp_max(1), **options)
        result = retraction(w, v, **options)
        long = length[..., 0, 0] > LONG_STEP_NORM
        if not bool(long.any()):
            return result
        double = in_double(w.dtype)
        point = newton_schulz(w[long].to(double))
        tangent = transport(point, transport(point, v[long].to(double)))
        # In place, so that the memory layout, and with it the bits of the other blocks' products, stay.
        result[long] = polar_factor(retraction(point, tangent, **options)).to(w.dtype)
        return result

    return with_long_steps


def clip_step(v: Tensor, max_norm: float) -> Tensor:
    """Return ``v`` with the blocks whose spectral norm exceeds ``max_norm`` scaled down to it, within a few percent.

    If no block does, the result is ``v`` itself.
    """
    # The Frobenius norm costs nearly nothing, and nearly always decides.
    if host_can_branch(v) and not bool((torch.linalg.matrix_norm(v) > max_norm).any()):
        return v
    largest = v.abs().amax((-2, -1), keepdim=True).clamp_min(torch.finfo(v.dtype).tiny)
    scaled = v / largest  # entries of at most one: squares cannot overflow
    length = torch.minimum(torch.linalg.matrix_norm(scaled), _spectral_norm_bound(scaled))
    # A comparison with NaN is false, so a block with NaN is returned as it is.
    return torch.where(
        (largest[..., 0, 0] > max_norm / length)[..., None, None], scaled * (max_norm / length)[..., None, None], v
    )


def _spectral_norm_bound(v: Tensor, squarings: int = 3) -> Tensor:
    r"""Return :math:`(\sum_i \sigma_i^{32})^{1/32}`, one to :math:`p^{1/32}` times the spectral norm."""
    power = v @ v.mH
    exponent, log_scale = 2.0, torch.zeros_like(v[..., 0, 0].real)
    for _ in range(squarings):
        size = torch.linalg.matrix_norm(power).clamp_min(torch.finfo(v.dtype).tiny)
        power = power / size[..., None, None]
        power, log_scale, exponent = power @ power, 2 * (log_scale + size.log()), 2 * exponent
    return ((torch.linalg.matrix_norm(power).clamp_min(torch.finfo(v.dtype).tiny).log() + log_scale) / exponent).exp()
