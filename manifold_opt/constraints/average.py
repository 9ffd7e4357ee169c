"""What to do after weights have been averaged: put them back on their manifold, or average so that they stay there."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .persistence import restore_all
from .tag import constraint_of, find_off_manifold, write_points_

AverageFn = Callable[[Tensor, Tensor, Tensor | int], Tensor]


@torch.no_grad()
def project_to_manifold_(model: nn.Module) -> nn.Module:
    """Put every marked parameter of a module back on its manifold, to the nearest point, in place.

    The thing to do after weights have been averaged, pruned or merged. Blocks that are orthogonal to rounding keep
    their bits.

    Args:
        model: any module; one without marked parameters stays as it is.

    Returns:
        The same module.

    Raises:
        ValueError: one is not finite or rank-deficient; nothing has been written then.

    >>> import torch
    >>> from manifold_opt import mark_orthogonal, orthogonality_error, project_to_manifold_
    >>> layer = torch.nn.Linear(4, 4)
    >>> _ = mark_orthogonal(layer, "weight")
    >>> with torch.no_grad():
    ...     _ = layer.weight.mul_(1.1)
    >>> orthogonality_error(project_to_manifold_(layer))["weight"] < 1e-5
    True
    """
    found = []
    restore_all(model)
    for name, p in model.named_parameters():
        constraint = constraint_of(p)
        if constraint is not None:
            try:
                found.append((p, find_off_manifold(p, constraint)))
            except ValueError as refusal:
                raise ValueError(f"project_to_manifold_: {name}: {refusal}") from None
    for p, off in found:
        write_points_(p, off)
    return model


def orthogonal_average(model: nn.Module, decay: float | None = None) -> AverageFn:
    """An ``avg_fn`` for torch.optim.swa_utils.AveragedModel whose averages of marked parameters stay orthogonal.

    The average in the surrounding space, then the nearest point: the induced arithmetic mean of two.

    Args:
        model: the module whose parameters are averaged.
        decay: of an exponential moving average, in [0, 1); the mean of all, unless given.

    Returns:
        A function of the average so far, the current parameter and their count.

    Raises:
        ValueError: ``decay`` out of range; when called, a parameter that is not the model's.

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
        share = 1 - decay if decay is not None else 1 / (int(count) + 1)
        if not (averaged.is_floating_point() or averaged.is_complex()):  # a count, of a BatchNorm
            return averaged + (current - averaged) * share
        mean = averaged.lerp(current, share)
        # AveragedModel hands over detached tensors, on which no mark is to be seen: by the memory they share.
        marks = {p.data_ptr(): constraint_of(p) for p in (*model.buffers(), *model.parameters())}
        if current.data_ptr() not in marks:
            raise ValueError(
                "orthogonal_average: what is averaged is not the model that it was made for, or a copy of it on "
                "another device. Give it the model that update_parameters gets; for averages on another device, "
                "average as torch does and call project_to_manifold_(averaged_model) afterwards."
            )
        constraint = marks[current.data_ptr()]
        if constraint is not None:
            write_points_(mean, find_off_manifold(mean, constraint))
        return mean

    return average
