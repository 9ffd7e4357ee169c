"""Interface between an optimizer and the engine: its algorithm, and the data that is kept between steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from torch import Tensor
from torch.optim.optimizer import Optimizer

from ...manifolds import Manifold
from ...stiefel.retractions import RETRACTIONS
from ...stiefel.step import Retraction
from .counters import Counters

Group = dict[str, Any]
Lists = tuple[Any, ...]  # the lists that torch's _init_group fills for a group
# A direction, (points, gradients, moments, workspace, options) -> step (directions/), and its options. Their ``finite``
# is set if values cannot be read.
Rule = tuple[Callable[..., Tensor], Any]
GRAD_SCALER_ATTRIBUTES = ("grad_scale", "found_inf")  # set by a GradScaler on a fused optimizer during a step


class Algorithm(NamedTuple):
    """Functions and keys in which one optimizer differs from another.

    Attributes:
        means: keys of the moments that are means of gradients.
        moments: ``group -> (keys, per_block_keys)``: keys of the moments that the options of a group need, and those
            among them with one number per block.
        rule: ``(group, bucket) -> rule``: direction for the points of a bucket, and its options.
        lists: ``(optimizer, group) -> lists``: empty lists for torch's ``_init_group`` to fill.
        step_unconstrained: ``(optimizer, group, lists, has_complex_or_sparse)``: torch's own step of these parameters.
        step_free_rows: ``(optimizer, group, rows)``: torch's own step of rows outside every block.
        decoupled: whether weight decay is decoupled by default; a group may override it.
        mean_squares: keys of the moments that are mean squares.
        retraction: retraction of orthogonal blocks; None for that of the parameter group.
        refusal: ``(constraint, parameter) -> reason``: why it cannot train a marked parameter, to follow its name in an
            error message, or None if it can.
    """

    means: tuple[str, ...]
    moments: Callable[[Group], tuple[list[str], list[str]]]
    rule: Callable[[Group, Any], Rule]
    lists: Callable[[Any, Group], Lists]
    step_unconstrained: Callable[[Any, Group, Lists, bool], None]
    step_free_rows: Callable[[Any, Group, Any], None]
    decoupled: bool = False
    mean_squares: tuple[str, ...] = ()
    retraction: Retraction | None = None
    refusal: Callable[[Manifold, Tensor], str | None] = lambda constraint, parameter: None  # noqa: ARG005

    @property
    def state_keys(self) -> tuple[str, ...]:
        """Return the keys of all moments in the state."""
        return self.means + self.mean_squares

    def retraction_of(self, group: Group) -> Retraction:
        """Return the retraction of the orthogonal blocks of a group."""
        return RETRACTIONS[group["retraction"]] if self.retraction is None else self.retraction


@dataclass(eq=False)
class Engine:
    """Data that an optimizer keeps between steps.

    Attributes:
        plan: the buckets (plan.py); None before the first step, and if they must be rebuilt.
        stamps: version, address and dtype of parameters after their last step, by id.
        constraints: constraint of every marked parameter, None for an unmarked one that was marked before.
        counters: counts of skipped blocks and shortened steps.
        sharded: the marked DTensors (sharded.py); None if there are none.
        has_agreed: whether the ranks have compared their marks.
    """

    plan: Any = None
    stamps: dict[int, tuple[Any, ...]] = field(default_factory=dict)
    constraints: dict[Tensor, Manifold | None] = field(default_factory=dict)
    counters: Counters = field(default_factory=Counters)
    sharded: Any = None
    has_agreed: bool = False


class ManifoldOptimizer(Optimizer):
    """Optimizer with an algorithm and an engine."""

    _algorithm: ClassVar[Algorithm]
    _engine: Engine

    if TYPE_CHECKING:  # at run time, these would hide the methods of torch's class

        def _init_group(self, group: Group, *lists: Any) -> bool:
            """Fill ``lists`` with the unmarked parameters of a group, for torch.compile."""

        def _collect_unconstrained(self, group: Group, *lists: Any) -> bool:
            """Fill ``lists`` with all parameters of a group, by torch's own ``_init_group``."""
