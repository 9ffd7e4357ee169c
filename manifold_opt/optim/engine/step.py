"""One step: the closure, the unmarked parameters as torch steps them, the marked ones on their manifold.

The blocks of marked parameters are stepped, one bucket at a time,

    view or gather -> gradient -> direction -> step -> retraction -> back in place

and are written through their views only. Nothing on the way depends on a value where reading one would make the
host wait: on an accelerator, or in a graph that torch.compile traces or CUDA captures.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ...constraints import tag
from ...linalg.precision import full_precision, is_full_precision, warn_if_reduced_precision, without_autocast
from ...linalg.products import host_can_branch
from ...linalg.workspace import Pool
from .context import StepContext
from .optimizer import GRAD_SCALER_ATTRIBUTES, Group, Lists, ManifoldOptimizer
from .plan import Plan, StateBackup, check_gradients_are_finite, make_plan, probe_memory
from .restore import restore_overwritten
from .update import update_bucket

Closure = Callable[[], Any]
Prepared = list[tuple[Group, Lists, bool]]


def step(optimizer: ManifoldOptimizer, closure: Closure | None) -> Any:
    """Take one step of every group: the closure, then the unmarked parameters, then the marked ones."""
    loss = None
    if closure is not None:
        with torch.enable_grad():
            loss = closure()
    if torch.compiler.is_compiling():
        _step_traced(optimizer)
        return loss
    plan = optimizer._engine.plan
    if plan is None or not plan.is_current(optimizer):
        prepared = _plan_anew(optimizer)
        plan = optimizer._engine.plan
    else:
        prepared = _collect(optimizer, plan)
    _step_unconstrained(optimizer, prepared)
    if plan.active:
        grad_enabled = torch.is_grad_enabled()
        torch.set_grad_enabled(False)
        try:
            if is_full_precision(plan.devices):
                _step_constrained(optimizer, plan, plan.pool)
            else:
                with full_precision(plan.devices):
                    _step_constrained(optimizer, plan, plan.pool)
        finally:
            torch.set_grad_enabled(grad_enabled)
        plan.remember_values()
    return loss


def _step_traced(optimizer: ManifoldOptimizer) -> None:
    """Take a step in a graph that torch.compile traces. It knows _init_group by name, and runs it outside the graph."""
    warn_if_reduced_precision()
    assert tag.marks_made  # a graph that depends on it is compiled anew where a mark is made later
    prepared = []
    for group in optimizer.param_groups:
        lists = optimizer._algorithm.lists(optimizer, group)
        prepared.append((group, lists, optimizer._init_group(group, *lists)))
    _step_unconstrained(optimizer, prepared)
    plan = optimizer._engine.plan
    if plan.active:
        with torch.no_grad(), without_autocast(plan.active[0].device.type):
            _step_constrained(optimizer, plan, None)


def _step_unconstrained(optimizer: ManifoldOptimizer, prepared: Prepared) -> None:
    for group, lists, flag in prepared:
        if lists[0]:
            with torch.set_grad_enabled(optimizer.defaults["differentiable"]):
                optimizer._algorithm.step_unconstrained(optimizer, group, lists, flag)


def _step_constrained(optimizer: ManifoldOptimizer, plan: Plan, pool: Pool | None) -> None:
    algorithm = optimizer._algorithm
    scale = getattr(optimizer, GRAD_SCALER_ATTRIBUTES[0], None)
    overflow = getattr(optimizer, GRAD_SCALER_ATTRIBUTES[1], None)
    if overflow is not None and host_can_branch(overflow) and float(overflow) != 0:
        return
    context = StepContext(pool, optimizer._engine.counters, algorithm.decoupled, scale, overflow)
    groups = optimizer.param_groups
    for position, rows in plan.free_rows:
        algorithm.step_free_rows(optimizer, groups[position], rows)
    for position, bucket in plan.work:
        group = groups[position]
        bucket.increment_step(1 if overflow is None else 1 - overflow.to(bucket.steps))
        update_bucket(bucket, group, algorithm.rule(group, bucket), context)


def _collect(optimizer: ManifoldOptimizer, plan: Plan) -> Prepared:
    """Return what the unmarked parameters need, where the plan of the marked ones still holds.

    All that can be refused or fail before a step is done here and in :func:`_plan_anew`, so that nothing has changed.
    """
    overwritten = plan.is_overwritten()
    if not (overwritten or plan.needs_care or plan.unmarked):
        return []
    backup = StateBackup(optimizer, entries=False)
    try:
        if plan.raises:
            check_gradients_are_finite(optimizer)
        if overwritten or plan.low:
            restore_overwritten(optimizer, plan, plan.values())
        if plan.on_accelerator:
            probe_memory(optimizer, plan)
        return _init_groups(optimizer, plan)
    except BaseException:
        backup.restore()
        raise


def _plan_anew(optimizer: ManifoldOptimizer) -> Prepared:
    """Return what the unmarked parameters need, and plan the marked ones anew."""
    backup = StateBackup(optimizer, entries=True)
    try:
        plan = make_plan(optimizer)
        probe_memory(optimizer, plan)
        prepared = _init_groups(optimizer, plan)
        restore_overwritten(optimizer, plan, optimizer._engine.values)
    except BaseException:
        backup.restore()
        raise
    return prepared


def _init_groups(optimizer: ManifoldOptimizer, plan: Plan) -> Prepared:
    """Let torch collect the unmarked parameters of every group."""
    prepared = []
    for position, unmarked in plan.unmarked:
        group = optimizer.param_groups[position]
        lists = optimizer._algorithm.lists(optimizer, group)
        members = group if unmarked is None else {**group, "params": unmarked}
        prepared.append((group, lists, optimizer._collect_unconstrained(members, *lists)))
    return prepared
