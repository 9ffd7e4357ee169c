"""A sharded parameter, the part of it that this rank owns, and what the outer optimizer has of its state."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ...constraints.tag import CONSTRAINED
from .owners import Ownership

OUTER_KEYS = ("step", CONSTRAINED)  # entries of the state that the outer optimizer has


class ShardedState(dict[str, Any]):
    """State of a sharded parameter in the outer optimizer: its step count and the record of its constraint.

    Iteration yields the keys of the moments too: torch.distributed.checkpoint loads a flattened state by iterating over
    the state of the optimizer. ``keys()`` and ``items()`` have only what is here.

    Attributes:
        moments: keys of what the owners have.
    """

    moments: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[str]:
        yield from self.keys()
        yield from self.moments

    def __missing__(self, key: str) -> Any:
        raise KeyError(
            f"{key!r} of a sharded parameter is held by the ranks that own its blocks. opt.state_dict(), which every "
            "rank has to call, returns it as a DTensor."
        )


@dataclass(eq=False)
class Member:
    """A sharded parameter, and the part of it that this rank owns.

    Attributes:
        parameter: the parameter, a DTensor.
        position: position of its group.
        ownership: its blocks and their owners.
        part: what this rank owns; None if it owns nothing.
        empty: an empty tensor in place of a part.
        shard: the shard that this rank has; set at the begin of a step.
    """

    parameter: Any
    position: int
    ownership: Ownership
    part: nn.Parameter | None
    empty: Tensor
    shard: Tensor

    def part_or_empty(self) -> Tensor:
        """Return the part, without its graph."""
        return self.empty if self.part is None else self.part.detach()


def loaded_keys(state: dict[str, Any]) -> list[str]:
    """Return the keys of moments that were loaded and have not been moved to the owners yet."""
    return sorted(key for key in state.keys() if key not in OUTER_KEYS)  # noqa: SIM118


def is_held(state: dict[str, Any]) -> bool:
    """Return True if the owners have the moments; False if a state was loaded or cleared since the last step."""
    return isinstance(state, ShardedState) and not loaded_keys(state)
