"""What the engine needs to know of an optimizer: its algorithm, and what it remembers between steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from torch import Tensor
from torch.optim.optimizer import Optimizer

from ...manifolds import Manifold
from .counters import Counters

Group = dict[str, Any]
Lists = tuple[Any, ...]  # what torch's _init_group fills for a group
GRAD_SCALER_ATTRIBUTES = ("grad_scale", "found_inf")  # set by a GradScaler on a fused optimizer for the time of a step


class Algorithm(NamedTuple):
    """What distinguishes one optimizer from another in a step.

    Attributes:
        state_keys: keys of the moments in the state.
        moments: ``group -> (keys, per_block_keys)``: those of ``state_keys`` that the options of a group ask for, and
            those among them with one number per block.
        rule: ``(group, bucket) -> rule``: how the directions of a bucket are made.
        lists: ``(optimizer, group) -> lists``: the empty lists that torch's ``_init_group`` fills.
        step_unconstrained: ``(optimizer, group, lists, flag)``: torch's own step of the parameters in these lists.
        step_free_rows: ``(optimizer, group, rows)``: torch's own step of rows outside every block.
        decoupled: whether weight decay is decoupled, unless a group says otherwise.
    """

    state_keys: tuple[str, ...]
    moments: Callable[[Group], tuple[list[str], list[str]]]
    rule: Callable[[Group, Any], Any]
    lists: Callable[[Any, Group], Lists]
    step_unconstrained: Callable[[Any, Group, Lists, bool], None]
    step_free_rows: Callable[[Any, Group, Any], None]
    decoupled: bool = False


@dataclass(eq=False)
class Engine:
    """What an optimizer remembers between steps.

    Attributes:
        plan: which parameters move together (plan.py); None before the first step, and where it has to be made anew.
        values: version, address and dtype of parameters by id, as a step left them.
        constraints: the constraint of every marked parameter, None for one that was unmarked.
        counters: counts of blocks that were skipped, and of steps that were shortened.
    """

    plan: Any = None
    values: dict[int, tuple[Any, ...]] = field(default_factory=dict)
    constraints: dict[Tensor, Manifold | None] = field(default_factory=dict)
    counters: Counters = field(default_factory=Counters)


class ManifoldOptimizer(Optimizer):
    """An optimizer with an algorithm and an engine."""

    _algorithm: ClassVar[Algorithm]
    _engine: Engine

    if TYPE_CHECKING:  # a method here would hide that of torch's class

        def _init_group(self, group: Group, *lists: Any) -> bool:
            """Fill ``lists`` with the unmarked parameters of a group, in a graph that torch.compile traces."""

        def _collect_unconstrained(self, group: Group, *lists: Any) -> bool:
            """Fill ``lists`` with all parameters of a group, by torch's own ``_init_group``."""
