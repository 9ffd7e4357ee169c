"""Marking functions for constraints other than orthogonality."""

from __future__ import annotations

from numbers import Real
from typing import Any, TypeVar, overload

from torch import Tensor, nn

from ..manifolds import FixedSpectrum, Positive, Spectral, UnitNorm
from ..manifolds.geoopt import wrap
from ..manifolds.layout import get_points
from .validation import get_parameter, validate_and_constrain

T = TypeVar("T", bound=Tensor)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@overload
def mark_unit_norm(target: nn.Module, name: str, *, dim: int = 0, padding_idx: int | None = None) -> nn.Parameter: ...
@overload
def mark_unit_norm(target: T, name: None = None, *, dim: int = 0, padding_idx: int | None = None) -> T: ...
@overload
def mark_unit_norm(
    target: Tensor | nn.Module, name: str | None = None, *, dim: int = 0, padding_idx: int | None = None
) -> Tensor: ...
def mark_unit_norm(target: Any, name: Any = None, *, dim: int = 0, padding_idx: int | None = None) -> Any:
    r"""Mark a parameter so that its slices along ``dim`` have norm one, and divide them by their norms.

    The slices are the rows of a Linear or the filters of a convolution (``dim=0``), or the columns (``dim=1``). torch's
    weight_norm calls them directions. Weight decay has no effect, because the norms are fixed.

    Args:
        target: a leaf tensor, or a module that has one, with its name.
        name: name of the module's parameter, dots allowed. Left out for a tensor.
        dim: dimension that indexes the slices, at least 0.
        padding_idx: index of an unconstrained slice, which trains as with torch.optim, like the zero row of an
            embedding. Defaults to the ``padding_idx`` of an nn.Embedding or nn.EmbeddingBag.

    Returns:
        The parameter, the same object.

    Raises:
        ValueError: the parameter cannot be marked, for example because a slice is zero; the message names the slice
            and the remedy. The parameter is unchanged then.

    Reference: Absil & Gallivan (2006), *Joint diagonalization on the oblique manifold*.

    >>> import torch
    >>> from manifold_opt import Adam, mark_unit_norm
    >>> layer = torch.nn.Linear(8, 3)
    >>> _ = mark_unit_norm(layer, "weight")
    >>> opt = Adam(layer.parameters(), lr=0.1)
    >>> layer(torch.ones(1, 8)).square().sum().backward()
    >>> opt.step()
    >>> torch.linalg.vector_norm(layer.weight, dim=1).sub(1).abs().max() < 1e-6
    tensor(True)
    """
    if isinstance(target, nn.Module):
        get_parameter("mark_unit_norm", target, name)  # raises if the name is wrong
        owner = target.get_submodule(name.rpartition(".")[0])
        if padding_idx is None and dim == 0 and isinstance(owner, (nn.Embedding, nn.EmbeddingBag)):
            padding_idx = owner.padding_idx
    return validate_and_constrain("mark_unit_norm", target, name, UnitNorm(dim, padding_idx))


@overload
def mark_spectral(target: nn.Module, name: str, bound: float = 1.0, *, dim: int | None = None) -> nn.Parameter: ...
@overload
def mark_spectral(target: T, name: float = 1.0, bound: float | None = None, *, dim: int | None = None) -> T: ...
@overload
def mark_spectral(
    target: Tensor | nn.Module, name: str | float = 1.0, bound: float | None = None, *, dim: int | None = None
) -> Tensor: ...
def mark_spectral(target: Any, name: Any = None, bound: Any = None, *, dim: int | None = None) -> Any:
    r"""Mark a parameter, flattened to (first, rest), so that its largest singular value is at most ``bound``.

    Call ``mark_spectral(module, "weight", 1.0)`` or ``mark_spectral(param, 1.0)``. A marked linear layer is
    ``bound``-Lipschitz after every step; the bound does not rely on a power iteration. Below the bound a step equals
    that of torch.optim, with weight decay. A step that would exceed it ends at the nearest matrix within the bound.

    For a convolution the bound applies to the flattened filters, as in torch.nn.utils.parametrizations.spectral_norm.
    The norm of the layer itself is at most :math:`\sqrt k` times as large, for kernels with k positions (9 for 3 x 3).

    Args:
        target: a leaf tensor of at least two dimensions, or a module that has one, with its name.
        name: name of the module's parameter, dots allowed. Left out for a tensor.
        bound: the largest singular value allowed, from 1e-12 to 1e12. Defaults to 1.
        dim: dimension that becomes the rows when the parameter is flattened. Defaults to 0, and to 1 for the weight
            of a transposed convolution, as in torch.

    Returns:
        The parameter, the same object.

    Raises:
        ValueError: the bound is out of range or the parameter cannot be marked; it is unchanged then.

    Reference: Yoshida & Miyato (2017); Gouk et al. (2021), *Regularisation of neural networks by enforcing Lipschitz
    continuity*; their projection divides by the norm, while this one clips singular values.

    >>> import torch
    >>> from manifold_opt import Adam, mark_spectral
    >>> layer = torch.nn.Linear(8, 8)
    >>> _ = mark_spectral(layer, "weight", bound=0.5)
    >>> opt = Adam(layer.parameters(), lr=0.1)
    >>> layer(torch.ones(1, 8)).square().sum().backward()
    >>> opt.step()
    >>> torch.linalg.matrix_norm(layer.weight, 2) <= 0.5 * (1 + 1e-3)
    tensor(True)
    """
    if not isinstance(target, nn.Module) and bound is None:
        name, bound = None, name
    if dim is None:
        dim = 0
        if isinstance(target, nn.Module):
            get_parameter("mark_spectral", target, name)  # raises if the name is wrong
            dim = 1 if isinstance(target.get_submodule(name.rpartition(".")[0]), _TRANSPOSED) else 0
    bound = float(bound) if isinstance(bound, Real) and not isinstance(bound, bool) else bound
    return validate_and_constrain("mark_spectral", target, name, Spectral(1.0 if bound is None else bound, dim))


@overload
def mark_positive(target: nn.Module, name: str) -> nn.Parameter: ...
@overload
def mark_positive(target: T, name: None = None) -> T: ...
@overload
def mark_positive(target: Tensor | nn.Module, name: str | None = None) -> Tensor: ...
def mark_positive(target: Any, name: Any = None) -> Any:
    """Mark a parameter so that its entries stay positive: scales, temperatures, rates, variances.

    A step of SGD multiplies every entry by the exponential of ``-lr`` times the gradient with respect to its logarithm.
    Learning rates are relative changes: a step of Adam changes an entry by a factor of at most about ``1 + lr``.

    Args:
        target: a leaf tensor of any shape, or a module that has one, with its name. Its entries must be positive,
            from 1e-19 to 1e19 (float64: 1e-154 to 1e154).
        name: name of the module's parameter, dots allowed. Left out for a tensor.

    Returns:
        The parameter, the same object.

    Raises:
        ValueError: an entry is not positive, or the parameter cannot be marked; it is unchanged then.

    Reference: Bhatia (2007), *Positive Definite Matrices*, chapter 6, for 1 x 1 matrices.

    >>> import torch
    >>> from manifold_opt import SGD, mark_positive
    >>> scale = mark_positive(torch.nn.Parameter(torch.tensor([1.0, 4.0])))
    >>> scale.grad = torch.tensor([2.0, -0.5])
    >>> SGD([scale], lr=0.5).step()
    >>> scale.detach() / torch.tensor([1.0, 4.0])  # e ** -1, and e ** 1
    tensor([0.3679, 2.7183])
    """
    return validate_and_constrain("mark_positive", target, name, Positive())


@overload
def mark_fixed_spectrum(
    target: nn.Module, name: str, blocks: int = 1, *, side: str | None = None, dim: int = 0, flatten: bool = True
) -> nn.Parameter: ...
@overload
def mark_fixed_spectrum(
    target: T, name: None = None, blocks: int = 1, *, side: str | None = None, dim: int = 0, flatten: bool = True
) -> T: ...
@overload
def mark_fixed_spectrum(
    target: Tensor | nn.Module,
    name: str | None = None,
    blocks: int = 1,
    *,
    side: str | None = None,
    dim: int = 0,
    flatten: bool = True,
) -> Tensor: ...
def mark_fixed_spectrum(
    target: Any, name: Any = None, blocks: int = 1, *, side: str | None = None, dim: int = 0, flatten: bool = True
) -> Any:
    r"""Mark the blocks of a parameter so that their singular values do not change.

    Marking does not change the value. If other code writes to the parameter later, the singular values of the written
    value are kept from then on. The optimizers then move every block W on
    :math:`\{Q W_0 : Q \text{ orthogonal}\}`: they rotate its rows. This is orthogonal fine-tuning of a pretrained
    weight, without an adapter and with nothing to merge afterwards. The learning rate, ``retraction`` and
    ``orthogonal_lr_scale`` are those of orthogonal blocks; weight decay has no effect.

    The optimizer state keeps the rotation of every block and the marked values, one more copy of the weight.

    Args:
        target: a leaf tensor with at least two dimensions, or a module that has one.
        name: name of the module's parameter, dots allowed. Left out for a tensor.
        blocks: number of equal blocks stacked along ``dim``.
        side: ``"left"`` rotates the rows, :math:`Q W_0`; ``"right"`` the columns, :math:`W_0 Q`; ``"both"``
            :math:`Q W_0 R`. Defaults to the shorter side of a block, which is the cheaper one.
        dim: dimension along which the blocks are stacked, 0, or 1 for a matrix.
        flatten: True flattens dimensions beyond the second to (first, rest), False treats the parameter as a batch of
            matrices.

    Returns:
        The parameter, the same object.

    Raises:
        ValueError: the parameter cannot be marked with these arguments; the message names the remedy.

    Reference: Qiu et al. (2023), *Controlling text-to-image diffusion by orthogonal finetuning*, for the constraint.

    >>> import torch
    >>> from manifold_opt import AdamW, mark_fixed_spectrum
    >>> layer = torch.nn.Linear(6, 4)
    >>> before = torch.linalg.svdvals(layer.weight.detach())
    >>> _ = mark_fixed_spectrum(layer, "weight")
    >>> opt = AdamW(layer.parameters(), lr=0.1)
    >>> for _ in range(10):
    ...     opt.zero_grad()
    ...     layer(torch.ones(1, 6)).square().sum().backward()
    ...     opt.step()
    >>> torch.allclose(torch.linalg.svdvals(layer.weight), before)
    True
    """
    parameter = get_parameter("mark_fixed_spectrum", target, name) if isinstance(target, nn.Module) else target
    if side is None:
        side = "left"
        probe = FixedSpectrum(blocks, dim, side, flatten)
        if isinstance(parameter, Tensor) and probe.invalid_reason(parameter) is None:
            p, n = get_points(probe.layouts(parameter.shape)[0], parameter.detach()).shape[-2:]
            side = "left" if p <= n else "right"
    return validate_and_constrain("mark_fixed_spectrum", target, name, FixedSpectrum(blocks, dim, side, flatten))


@overload
def mark_manifold(target: nn.Module, name: str, manifold: Any) -> nn.Parameter: ...
@overload
def mark_manifold(target: T, name: Any, manifold: None = None) -> T: ...
@overload
def mark_manifold(target: Tensor | nn.Module, name: Any, manifold: Any = None) -> Tensor: ...
def mark_manifold(target: Any, name: Any = None, manifold: Any = None) -> Any:
    """Mark a parameter as a point, or a batch of points, of a manifold of geoopt or a :class:`~manifold_opt.Manifold`.

    Call ``mark_manifold(param, geoopt.PoincareBall())`` or ``mark_manifold(module, "weight", geoopt.Sphere())``. The
    gradient, the retraction and the transport are those of geoopt, except for its Stiefel manifolds: these use
    ``retraction`` and ``metric`` of the optimizer's parameter group. A geoopt.ManifoldParameter needs no mark; the
    optimizers of this package accept it directly.

    Args:
        target: a leaf tensor whose last dimensions are a point, or a module that has one, with its name.
        name: name of the module's parameter, dots allowed. Left out for a tensor.
        manifold: a manifold of geoopt, or a :class:`~manifold_opt.Manifold`.

    Returns:
        The parameter, the same object, projected to the manifold.

    Raises:
        ValueError: ``manifold`` is not a manifold, or the parameter does not fit it; it is unchanged then.

    >>> import geoopt, torch
    >>> from manifold_opt import SGD, mark_manifold
    >>> point = mark_manifold(torch.nn.Parameter(torch.tensor([3.0, 4.0])), geoopt.Sphere())
    >>> point
    Parameter containing:
    tensor([0.6000, 0.8000], requires_grad=True)
    """
    if isinstance(target, nn.Module):
        get_parameter("mark_manifold", target, name)  # raises if the name is wrong
    elif manifold is None:
        name, manifold = None, name
    return validate_and_constrain("mark_manifold", target, name, wrap(manifold))
