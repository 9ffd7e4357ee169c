"""Base class of the optimizers: the interface of torch.optim, and the step.

A step calls the closure, lets torch's own functions update the unmarked parameters, and updates the blocks of marked
parameters one bucket at a time:

    view or gather -> gradient -> direction -> retraction -> write in place

No value is read on an accelerator, or in a graph that torch.compile traces or CUDA captures, where reading would
synchronize with the device.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.optim.optimizer import ParamsT, _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from ..constraints import tag
from ..linalg.precision import full_precision, warn_if_reduced_precision, without_autocast
from ..linalg.products import Pool, host_can_branch, is_full_precision
from .engine.checkpoint import check_checkpoint, load_state_dict, state_dict, upgrade
from .engine.optimizer import GRAD_SCALER_ATTRIBUTES, Group, Lists, ManifoldOptimizer
from .engine.plan import (
    Plan,
    StateBackup,
    check_before_step,
    check_gradients_are_finite,
    make_plan,
    probe_memory,
    reset_engine,
    without_constrained,
)
from .engine.restore import restore_overwritten
from .engine.sharded import begin_step, has_dtensors
from .engine.update import StepContext, update_bucket
from .metrics import metrics
from .options import add_param_group, fill_options, merge_into_groups
from .other_optimizers import warn_once

Closure = Callable[[], Any]
GroupInputs = list[tuple[Group, Lists, bool]]  # group, lists of _init_group, has_complex (SGD: has_sparse_grad)


class BaseOptimizer(ManifoldOptimizer):
    """Base class of optimizers that also inherit from a class of torch.optim.

    A subclass sets ``_algorithm`` and calls this constructor from its own, which has torch's signature.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # Stored now, because torch.compile later replaces _init_group by a slower wrapper that disables compilation.
        cls._collect_unconstrained = super()._init_group  # type: ignore[method-assign]

    def __init__(self, params: ParamsT, options: Group, *args: Any, **kwargs: Any) -> None:
        """Call torch's constructor with ``args`` and ``kwargs``, and add ``options`` to every group."""
        super().__init__(merge_into_groups(params, options), *args, **kwargs)
        self.defaults.update(options)
        reset_engine(self)

    add_param_group = add_param_group
    load_state_dict = load_state_dict
    state_dict = state_dict

    def __getstate__(self) -> dict[str, Any]:
        if self._engine.sharded is not None:
            raise RuntimeError(
                f"{type(self).__name__}: an optimizer of marked DTensors cannot be copied or pickled: their moments "
                "are with the owners of the blocks. Save opt.state_dict(), which every rank has to call."
            )
        return super().__getstate__()

    def __setstate__(self, state: dict[str, Any]) -> None:
        check_checkpoint(self, state)
        fill_options(self, state)
        super().__setstate__(state)
        upgrade(self)
        reset_engine(self)

    def _patch_step_function(self) -> None:
        """Wrap ``step`` of the class as torch does, but call it directly in steps without hooks and profilers."""
        step = type(self).step
        super()._patch_step_function()
        if type(self).step is not step:
            type(self).step = _call_directly_if_possible(step, type(self).step)  # type: ignore[method-assign]

    def _init_group(self, group: Group, *lists: Any) -> bool:
        """Collect the unmarked parameters of a group. torch.compile finds this method by name."""
        return self._collect_unconstrained(without_constrained(self, group), *lists)

    def step(self, closure: Closure | None = None) -> Any:
        """Perform a single optimization step.

        With marked DTensors this is a collective: every rank has to call it.

        Args:
            closure: reevaluates the model and returns the loss. Optional.

        Returns:
            The loss, or None without a closure.
        """
        if "capturable" in self.defaults and not torch.compiler.is_compiling() and _has_accelerator():
            _check_capture(self)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if torch.compiler.is_compiling():
            _step_traced(self)
            return loss
        plan = self._engine.plan
        is_current = plan is not None and plan.is_current(self)
        prepare = functools.partial(_collect, self, plan) if is_current else functools.partial(_replan, self)
        if self._engine.sharded is not None or (plan.has_dtensors if is_current else has_dtensors(self)):
            check = functools.partial(check_gradients_are_finite if is_current else check_before_step, self)
            sharded, inputs = begin_step(self, check, prepare, _prepare, is_current=is_current)
        else:
            sharded, inputs = None, prepare()
        try:
            _step_unconstrained(self, inputs)
            _step_constrained_eager(self)
        finally:
            if sharded is not None:  # after an error too: the other ranks wait for the parts
                sharded.step(self, _step_constrained_eager)
        return loss

    metrics = metrics


@functools.cache
def _has_accelerator() -> bool:
    """Return True if the machine has an accelerator. Asking torch in every step takes longer than most operations."""
    return torch.accelerator.is_available()


def _check_capture(optimizer: torch.optim.Optimizer) -> None:
    """Raise torch's own error if a step that is not capturable is being captured, or emit its warning."""
    newer = getattr(optimizer, "_accelerator_graph_capture_health_check", None)
    (newer or optimizer._cuda_graph_capture_health_check)()


def _prepare(optimizer: ManifoldOptimizer) -> GroupInputs:
    """Make sure that the plan is current, and return the inputs of torch's step of the unmarked parameters."""
    plan = optimizer._engine.plan
    if plan is None or not plan.is_current(optimizer):
        return _replan(optimizer)
    return _collect(optimizer, plan)


def _step_constrained_eager(optimizer: ManifoldOptimizer) -> None:
    """Step the marked parameters outside of a traced graph."""
    plan = optimizer._engine.plan
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


def _step_traced(optimizer: ManifoldOptimizer) -> None:
    """Perform a step that torch.compile traces. It runs _init_group, which it finds by name, outside the graph."""
    warn_if_reduced_precision()
    assert tag.marks_made  # makes the graph depend on it: a later mark triggers a recompilation
    inputs = []
    for group in optimizer.param_groups:
        lists = optimizer._algorithm.lists(optimizer, group)
        inputs.append((group, lists, optimizer._init_group(group, *lists)))
    _step_unconstrained(optimizer, inputs)
    plan = optimizer._engine.plan
    if plan.active:
        with torch.no_grad(), without_autocast(plan.active[0].device.type):
            _step_constrained(optimizer, plan, None)


def _step_unconstrained(optimizer: ManifoldOptimizer, inputs: GroupInputs) -> None:
    defaults = optimizer.defaults
    for group, lists, has_complex_or_sparse in inputs:
        if lists[0]:
            with torch.set_grad_enabled("differentiable" in defaults and defaults["differentiable"]):
                optimizer._algorithm.step_unconstrained(optimizer, group, lists, has_complex_or_sparse)


def _step_constrained(optimizer: ManifoldOptimizer, plan: Plan, pool: Pool | None) -> None:
    algorithm = optimizer._algorithm
    grad_scale = getattr(optimizer, GRAD_SCALER_ATTRIBUTES[0], None)
    found_inf = getattr(optimizer, GRAD_SCALER_ATTRIBUTES[1], None)
    if found_inf is not None and host_can_branch(found_inf) and float(found_inf) != 0:
        return
    context = StepContext(pool, optimizer._engine.counters, algorithm, grad_scale, found_inf)
    groups = optimizer.param_groups
    for position, rows in plan.free_rows:
        algorithm.step_free_rows(optimizer, groups[position], rows)
    for position, bucket in plan.work:
        group = groups[position]
        bucket.increment_step(1 if found_inf is None else 1 - found_inf.to(bucket.steps))
        update_bucket(bucket, group, algorithm.rule(group, bucket), context)


def _collect(optimizer: ManifoldOptimizer, plan: Plan) -> GroupInputs:
    """Prepare a step under a current plan, and return the inputs of torch's step of the unmarked parameters.

    Overwritten parameters are put back on their manifold. Everything that can fail is done here or in :func:`_replan`,
    before anything is updated; if it fails, the state is rolled back.
    """
    overwritten = plan.is_overwritten()
    if not (overwritten or plan.needs_checks or plan.unmarked):
        return []
    backup = StateBackup(optimizer, entries=False)
    try:
        if plan.raises:
            check_gradients_are_finite(optimizer)
        if overwritten or plan.low_precision:
            restore_overwritten(optimizer, plan, plan.stamps())
        if plan.on_accelerator:
            probe_memory(optimizer, plan)
        return _init_groups(optimizer, plan)
    except BaseException:
        backup.roll_back()
        raise


def _replan(optimizer: ManifoldOptimizer) -> GroupInputs:
    """Make a new plan for the marked parameters, and return the inputs of torch's step of the unmarked ones."""
    backup = StateBackup(optimizer, entries=True)
    try:
        plan = make_plan(optimizer)
        probe_memory(optimizer, plan)
        inputs = _init_groups(optimizer, plan)
        restore_overwritten(optimizer, plan, optimizer._engine.stamps)
    except BaseException:
        backup.roll_back()
        raise
    return inputs


def _init_groups(optimizer: ManifoldOptimizer, plan: Plan) -> GroupInputs:
    """Collect the unmarked parameters of every group by torch's own ``_init_group``."""
    inputs = []
    for position, unmarked in plan.unmarked:
        group = optimizer.param_groups[position]
        lists = optimizer._algorithm.lists(optimizer, group)
        members = group if unmarked is None else {**group, "params": unmarked}
        inputs.append((group, lists, optimizer._collect_unconstrained(members, *lists)))
    return inputs


def _call_directly_if_possible(step: Callable[..., Any], hooked: Callable[..., Any]) -> Callable[..., Any]:
    """Return a method that calls torch's wrapper ``hooked`` if there are hooks or a profiler, and ``step`` otherwise.

    torch's wrapper records every step for the profiler, also if none is running. For a small parameter that is a
    quarter of the time of a step. With a closure, which may register a hook, the wrapper is always called.
    """

    @functools.wraps(step)
    def wrapper(self: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs or torch.compiler.is_compiling() or _is_profiling() or _has_hooks(self):
            return hooked(self, *args, **kwargs)
        return step(self)

    wrapper.hooked = True  # type: ignore[attr-defined]  # so that torch does not wrap it again
    return wrapper


def _is_profiling() -> bool:
    """Return True if a profiler of torch is running, of the current API or the legacy one."""
    return torch.autograd.profiler._is_profiler_enabled or torch._C._autograd._profiler_enabled()


def _has_hooks(optimizer: torch.optim.Optimizer) -> bool:
    """Return True if a step has hooks besides that of this package, which ignores the optimizers of this package."""
    return bool(
        optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or _global_optimizer_pre_hooks
        or any(hook is not warn_once for hook in _global_optimizer_post_hooks.values())
    )
