r"""The orthogonalizer: a tangent step, then Newton-Schulz steps at a rate :math:`\beta`.

References: POGO (Javaloy & Vergari, PMLR 306, 2026) for :math:`\beta = 1/2`; Ablin & Peyre (AISTATS 2022), *Fast and
accurate optimization on the orthogonal manifold without retraction*, for small :math:`\beta`.
"""

from __future__ import annotations

from torch import Tensor

from ..linalg.newton_schulz import newton_schulz


def newton_schulz_step(w: Tensor, v: Tensor, *, beta: float = 0.5, correction_steps: int = 1) -> Tensor:
    r"""Return ``w + v`` after ``correction_steps`` of :math:`X \leftarrow (1+\beta) X - \beta X X^\top X`.

    At :math:`\beta = 1/2` the result differs from the polar retraction by :math:`\tfrac38 \|V\|^4`. With a small
    :math:`\beta` the points return to the manifold over many steps, not in one.
    """
    return newton_schulz(w + v, beta=beta, steps=correction_steps)


def max_step_norm(*, beta: float = 0.5, **_: object) -> float:
    r"""Return the spectral norm to which a longer step is scaled down.

    It is 1, where :math:`\|W + V\|_2 \le \sqrt2` is below the convergence radius :math:`\sqrt{(1+\beta)/\beta}`, and
    :math:`\sqrt{2\beta}` for :math:`\beta` below 1/2, where steps of length t add up to an error of :math:`t^2/2\beta`.
    """
    return min(1.0, (2 * beta) ** 0.5)


def check_options(name: str, *, beta: float, correction_steps: int) -> None:
    """Raise a ValueError unless both options are in range."""
    if not (isinstance(beta, (int, float)) and 0 < beta < 1):
        raise ValueError(f"{name}: beta must lie in (0, 1), got {beta}; 0.5 converges fastest.")
    if isinstance(correction_steps, bool) or not isinstance(correction_steps, int) or correction_steps < 1:
        raise ValueError(f"{name}: correction_steps must be a whole number >= 1, got {correction_steps!r}.")
