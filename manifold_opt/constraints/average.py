"""Weight averaging: project averaged parameters to their manifolds, or average so that they stay there."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..manifolds.shards import local
from .persistence import restore_model
from .tag import constraint_of, find_off_manifold, write_points_

AverageFn = Callable[[Tensor, Tensor, Tensor | int], Tensor]


@torch.no_grad()
def project_to_manifold_(model: nn.Module) -> nn.Module:
    """Project every marked parameter of a module to the nearest point of its manifold, in place.

    Call it after weights have been averaged, pruned or merged. Blocks that are orthogonal to rounding do not change.

    Args:
        model: any module; a module without marked parameters is not changed.

    Returns:
        The same module.

    Raises:
        ValueError: a parameter is not finite or rank-deficient; no parameter has been changed then.

    >>> import torch
    >>> from manifold_opt import mark_orthogonal, orthogonality_error, project_to_manifold_
    >>> layer = torch.nn.Linear(4, 4)
    >>> _ = mark_orthogonal(layer, "weight")
    >>> with torch.no_grad():
    ...     _ = layer.weight.mul_(1.1)
    >>> orthogonality_error(project_to_manifold_(layer))["weight"] < 1e-5
    True
    """
    corrections = []
    restore_model(model)
    for name, p in model.named_parameters():
        constraint = constraint_of(p)
        if constraint is not None:
            try:
                corrections.append((p, find_off_manifold(p, constraint)))
            except ValueError as error:
                raise ValueError(f"project_to_manifold_: {name}: {error}") from None
    for p, found in corrections:
        write_points_(p, found)
    return model


def orthogonal_average(model: nn.Module, decay: float | None = None) -> AverageFn:
    """Return an ``avg_fn`` for torch.optim.swa_utils.AveragedModel that keeps marked parameters on their manifolds.

    It averages the entries as torch does, and takes the nearest point of the manifold. For two points this is their
    induced arithmetic mean. A parameter with fixed singular values is only averaged, which makes these values smaller.

    Args:
        model: the module whose parameters are averaged.
        decay: decay of an exponential moving average, in [0, 1). By default the arithmetic mean of all parameters.

    Returns:
        A function of the average so far, the current parameter and their count.

    Raises:
        ValueError: ``decay`` is out of range; when the function is called, the parameter is not one of the model, or
            the average has no nearest point.

    Reference: Moakher (2002), *Means and averaging in the group of rotations*.

    >>> import torch
    >>> from torch.optim.swa_utils import AveragedModel
    >>> from manifold_opt import mark_orthogonal, orthogonal_average, orthogonality_error
    >>> layer = torch.nn.Linear(4, 4)
    >>> _ = mark_orthogonal(layer, "weight")
    >>> averaged = AveragedModel(layer, avg_fn=orthogonal_average(layer, decay=0.9))
    >>> averaged.update_parameters(layer)
    >>> orthogonality_error(averaged)["module.weight"] < 1e-5
    True
    """
    if decay is not None and not 0 <= decay < 1:
        raise ValueError(f"orthogonal_average: decay must lie in [0, 1), got {decay}.")

    def average(averaged: Tensor, current: Tensor, count: Tensor | int) -> Tensor:
        weight = 1 - decay if decay is not None else 1 / (int(count) + 1)
        if not (averaged.is_floating_point() or averaged.is_complex()):  # such as num_batches_tracked of a BatchNorm
            return averaged + (current - averaged) * weight
        mean = averaged.lerp(current, weight)
        # AveragedModel passes detached tensors without marks; find the parameter by its memory.
        named = {local(p).data_ptr(): (name, p) for name, p in (*model.named_buffers(), *model.named_parameters())}
        address = local(current).data_ptr()
        if address not in named:
            raise ValueError(
                "orthogonal_average: what is averaged is not the model that it was made for, or a copy of it on "
                "another device. Give it the model that update_parameters gets; for averages on another device, "
                "average as torch does and call project_to_manifold_(averaged_model) afterwards."
            )
        name, parameter = named[address]
        constraint = constraint_of(parameter)
        if constraint is not None:
            try:
                write_points_(mean, find_off_manifold(mean, constraint))
            except ValueError as error:
                raise ValueError(f"orthogonal_average: the average of {name}: {error}") from None
        return mean

    return average
