"""Constraints other than orthogonality: mark_unit_norm, mark_spectral, mark_positive, mark_manifold."""

from __future__ import annotations

from numbers import Real
from typing import Any, TypeVar, overload

from torch import Tensor, nn

from ..manifolds import Positive, Spectral, UnitNorm
from ..manifolds.geoopt import wrap
from .validation import get_parameter, marked

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
    r"""Mark a parameter whose slices along ``dim`` have norm one, and divide them by their norms.

    The rows of a Linear, the filters of a convolution (``dim=0``), the columns (``dim=1``): what torch's weight_norm
    calls the direction. Weight decay does not act on it: its length is fixed.

    Args:
        target: a leaf tensor, or a module that has one, with its name.
        name: name of the module's parameter, dots allowed. Left out for a tensor.
        dim: dimension whose slices they are, from 0.
        padding_idx: index of a slice that is left as it is and trained as torch trains it, like the row of zeros of an
            embedding. Of an nn.Embedding or nn.EmbeddingBag its own, unless given.

    Returns:
        The parameter, the same object.

    Raises:
        ValueError: a parameter that cannot be marked, or not so, like one with a slice of zeros; the message names the
            slice and the remedy. Nothing has been written then.

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
        get_parameter("mark_unit_norm", target, name)  # or it says what is wrong with the name
        owner = target.get_submodule(name.rpartition(".")[0])
        if padding_idx is None and dim == 0 and isinstance(owner, (nn.Embedding, nn.EmbeddingBag)):
            padding_idx = owner.padding_idx
    return marked("mark_unit_norm", target, name, UnitNorm(dim, padding_idx))


@overload
def mark_spectral(target: nn.Module, name: str, bound: float = 1.0, *, dim: int | None = None) -> nn.Parameter: ...
@overload
def mark_spectral(target: T, name: float = 1.0, bound: float | None = None, *, dim: int | None = None) -> T: ...
@overload
def mark_spectral(
    target: Tensor | nn.Module, name: str | float = 1.0, bound: float | None = None, *, dim: int | None = None
) -> Tensor: ...
def mark_spectral(target: Any, name: Any = None, bound: Any = None, *, dim: int | None = None) -> Any:
    r"""Mark a parameter whose largest singular value is at most ``bound``, flattened to (first, rest).

    ``mark_spectral(module, "weight", 1.0)`` or ``mark_spectral(param, 1.0)``. A linear layer so marked is
    ``bound``-Lipschitz after every step, and not by the estimate of a power iteration. Inside the ball a weight moves
    as torch would move it, with weight decay; a step that leads out ends at the nearest point.

    Of a convolution it is the norm of the flattened filters, as in torch.nn.utils.parametrizations.spectral_norm: that
    of the layer itself, with kernels of k entries, is at most :math:`\sqrt k` times it.

    Args:
        target: a leaf tensor of at least two dimensions, or a module that has one, with its name.
        name: name of the module's parameter, dots allowed. Left out for a tensor.
        bound: the largest singular value allowed, from 1e-12 to 1e12; 1 unless given.
        dim: dimension that the rows are when it is flattened. 0 unless given, and 1 for the weight of a transposed
            convolution, as in torch.

    Returns:
        The parameter, the same object.

    Raises:
        ValueError: a bound out of range, or a parameter that cannot be marked; nothing has been written then.

    Reference: Yoshida & Miyato (2017); Gouk et al. (2021), *Regularisation of neural networks by enforcing Lipschitz
    continuity*, whose projection divides, where this one cuts off.

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
            get_parameter("mark_spectral", target, name)  # or it says what is wrong with the name
            dim = 1 if isinstance(target.get_submodule(name.rpartition(".")[0]), _TRANSPOSED) else 0
    bound = float(bound) if isinstance(bound, Real) and not isinstance(bound, bool) else bound
    return marked("mark_spectral", target, name, Spectral(1.0 if bound is None else bound, dim))


@overload
def mark_positive(target: nn.Module, name: str) -> nn.Parameter: ...
@overload
def mark_positive(target: T, name: None = None) -> T: ...
@overload
def mark_positive(target: Tensor | nn.Module, name: str | None = None) -> Tensor: ...
def mark_positive(target: Any, name: Any = None) -> Any:
    """Mark a parameter whose entries are positive, and stay so: scales, temperatures, rates, variances.

    A step multiplies every entry, by the exponential of minus the learning rate times the gradient with respect to its
    logarithm: with Adam by at most about ``1 + lr``. Learning rates are relative changes.

    Args:
        target: a leaf tensor of any shape, or a module that has one, with its name. Its entries are positive already,
            from 1e-19 to 1e19 (float64: 1e-154 to 1e154).
        name: name of the module's parameter, dots allowed. Left out for a tensor.

    Returns:
        The parameter, the same object.

    Raises:
        ValueError: entries that are not positive, or a parameter that cannot be marked; nothing has been written then.

    Reference: Bhatia (2007), *Positive Definite Matrices*, chapter 6, for matrices of one entry.

    >>> import torch
    >>> from manifold_opt import SGD, mark_positive
    >>> scale = mark_positive(torch.nn.Parameter(torch.tensor([1.0, 4.0])))
    >>> scale.grad = torch.tensor([2.0, -0.5])
    >>> SGD([scale], lr=0.5).step()
    >>> scale.detach() / torch.tensor([1.0, 4.0])  # e ** -1, and e ** 1
    tensor([0.3679, 2.7183])
    """
    return marked("mark_positive", target, name, Positive())


@overload
def mark_manifold(target: nn.Module, name: str, manifold: Any) -> nn.Parameter: ...
@overload
def mark_manifold(target: T, name: Any, manifold: None = None) -> T: ...
@overload
def mark_manifold(target: Tensor | nn.Module, name: Any, manifold: Any = None) -> Tensor: ...
def mark_manifold(target: Any, name: Any = None, manifold: Any = None) -> Any:
    """Mark a parameter as a point, or a batch of points, of a manifold of geoopt, or of one of your own.

    ``mark_manifold(param, geoopt.PoincareBall())`` or ``mark_manifold(module, "weight", geoopt.Sphere())``. The
    gradient, the retraction and the transport are geoopt's. Its Stiefel manifolds are the exception: they take this
    package's own path, the ``retraction`` and ``metric`` of the optimizer's group. A geoopt.ManifoldParameter needs no
    mark: handed to an optimizer of this package it is taken as it is.

    Args:
        target: a leaf tensor whose last dimensions are a point, or a module that has one, with its name.
        name: name of the module's parameter, dots allowed. Left out for a tensor.
        manifold: of geoopt, or a :class:`~manifold_opt.Manifold`.

    Returns:
        The parameter, the same object; projected where it was not on the manifold.

    Raises:
        ValueError: something else than a manifold, or a parameter that it has no place for; nothing has been written
            then.

    >>> import geoopt, torch
    >>> from manifold_opt import SGD, mark_manifold
    >>> point = mark_manifold(torch.nn.Parameter(torch.tensor([3.0, 4.0])), geoopt.Sphere())
    >>> point
    Parameter containing:
    tensor([0.6000, 0.8000], requires_grad=True)
    """
    if isinstance(target, nn.Module):
        get_parameter("mark_manifold", target, name)  # or it says what is wrong with the name
    elif manifold is None:
        name, manifold = None, name
    return marked("mark_manifold", target, name, wrap(manifold))
