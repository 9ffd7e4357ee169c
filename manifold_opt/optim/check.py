"""Check that the constraints of a model and its optimizers are consistent."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.optim.optimizer import Optimizer

from ..constraints.persistence import has_records, module_records, reshard
from ..constraints.tag import constraint_of, find_off_manifold, is_flattened, was_unmarked
from ..linalg.precision import MASTER, working_dtype
from ..manifolds import Manifold, Orthogonal
from ..manifolds.geoopt import is_handled_by
from .engine.convert import check_owner, check_shapes
from .engine.optimizer import ManifoldOptimizer
from .options import (
    describe_param,
    flattened_problem,
    track_constraints,
    validate_finite_gradients,
    validate_gradients,
    validate_marked,
    validate_options,
    validate_unflattened,
)
from .wrappers import model_and_optimizers


def check(model: Any, opt: Optimizer | Iterable[Optimizer] | None = None) -> list[str]:
    """Return a list of problems with the constraints of a model and its optimizer; empty if there are none.

    It reports a marked parameter that

    - has lost its constraint;
    - is in no optimizer, or in one that ignores constraints;
    - is off its manifold by more than rounding;
    - shares memory with another parameter;
    - has optimizer state that is non-finite, or of another dtype or device;
    - is in the optimizer, but no longer in the model.

    It also reports errors that the next step would raise, and a model without marked parameters.

    Args:
        model: the module that is trained, or a wrapper such as that of torch.compile or DistributedDataParallel. A
            Trainer of transformers or Lightning is accepted too; it has both the model and the optimizer.
        opt: the optimizer of the model, of this package or another, or a wrapper of it such as that of Accelerate. If
            the model has several optimizers, a list of all. Leave it out for a Trainer.

    Returns:
        One message per problem, with the name of the parameter and the remedy.

    Raises:
        TypeError: the arguments are neither a module and an optimizer nor a Trainer.
        ValueError: the Trainer has no model or no optimizer yet.

    >>> import torch
    >>> from manifold_opt import Adam, check, mark_orthogonal
    >>> layer = torch.nn.Linear(4, 4)
    >>> _ = mark_orthogonal(layer, "weight")
    >>> opt = Adam(layer.parameters())
    >>> check(layer, opt)
    []
    >>> layer.weight = torch.nn.Parameter(torch.zeros(4, 4))
    >>> for problem in check(layer, opt):
    ...     print(problem)
    weight has lost its constraint Orthogonal(blocks=1, dim=0, gain=1.0): another parameter has taken its place, or a conversion has dropped the mark. Build the optimizer anew: it marks the parameter again.
    the optimizer still holds a marked parameter of shape (4, 4) that the model no longer has. Mark its replacement, if it is to be constrained, and recreate the optimizer.
    """  # noqa: E501
    model, opts = model_and_optimizers(model, opt)
    reshard(model)
    ours = [one for one in opts if isinstance(one, ManifoldOptimizer)]
    owners = {id(p): one for one in reversed(opts) for group in one.param_groups for p in group["params"]}
    refusals = _next_step_errors(ours)
    named = dict(model.named_parameters(remove_duplicate=False))
    lost = dict(_lost_constraints(model, opts))
    problems = [*(f"{name} {what}" for name, what in lost.items()), *refusals.get(None, ())]
    for name, p in named.items():
        refused, constraint = refusals.get(id(p), []), constraint_of(p)
        if name in lost:
            continue
        if constraint is None:
            problems.extend(f"{name}: {reason}" for reason in refused)
        elif refused:
            problems.extend(f"{name} cannot be kept {_describe(constraint)}: {reason}" for reason in refused)
        else:
            problems.extend(_parameter_problems(name, p, owners.get(id(p))))
            problems.extend(_pruning_problems(model, name, lost))
        problems.extend(_state_problems(name, p, owners.get(id(p))))
    problems.extend(_shared_memory_problems(named, owners))
    present = {id(p) for p in named.values()}
    for one in opts:
        for holder, p in ((group, p) for group in one.param_groups for p in group["params"]):
            if id(p) not in present and constraint_of(p) is not None:
                problems.append(
                    f"the optimizer still holds a marked parameter of shape {describe_param(holder, p)} that the model "
                    "no longer has. Mark its replacement, if it is to be constrained, and recreate the optimizer."
                )
    known = any(constraint_of(p) is not None or was_unmarked(p) for p in named.values()) or has_records(model)
    if ours and not problems and not known:
        problems.append("nothing in the model is marked: mark_recurrent(model), or mark_orthogonal(module, name).")
    return problems


def _lost_constraints(model: nn.Module, opts: list[Any]) -> Iterator[tuple[str, str]]:
    """Yield the names of parameters that lost their constraint, each with the reason."""
    in_optimizer = (p for one in opts for group in one.param_groups for p in group["params"])
    flat = {  # parameters in a flat parameter of FSDP1
        (id(info.module), info.param_name)
        for p in (*model.parameters(), *in_optimizer)
        for info in (*getattr(p, "_param_infos", ()), *getattr(p, "_shared_param_infos", ()))
    }
    for path, module in model.named_modules():
        for leaf, constraint in module_records(module).items():
            now = module._parameters.get(leaf)
            if now is None:  # prune.remove gives the parameter its name back
                now = module._parameters.get(leaf.removesuffix("_orig"))
            name = f"{path}.{leaf}" if path else leaf
            if now is not None and was_unmarked(now):
                continue
            if (id(module), leaf) in flat or (now is not None and is_flattened(now)):
                yield name, flattened_problem(constraint)
            elif now is None or constraint_of(now) != constraint:
                yield name, _loss_reason(module, leaf, constraint)


def _loss_reason(module: nn.Module, leaf: str, constraint: Manifold) -> str:
    """Return the reason and the remedy for a lost constraint, as the end of a sentence that begins with the name."""
    if module._parameters.get(leaf) is not None:
        return (
            f"has lost its constraint {constraint}: another parameter has taken its place, or a conversion has dropped "
            "the mark. Build the optimizer anew: it marks the parameter again."
        )
    if is_parametrized(module, leaf):
        return (
            f"was marked as {constraint} and is parametrized since: it is computed from other tensors, and only those "
            f"stay on a manifold that are marked. remove_parametrizations(module, {leaf!r}), then mark it again; or "
            "unmark(module), if the parametrization is meant instead."
        )
    if f"{leaf}_mask" in module._buffers and f"{leaf}_orig" in module._parameters:
        return (
            f"was marked as {constraint} and is pruned since: {leaf}_orig stays on the manifold, its product with the "
            f"mask does not. To keep the zeros, unmark(module); to undo the pruning, module.{leaf}_mask.fill_(1) and "
            f"torch.nn.utils.prune.remove(module, {leaf!r})."
        )
    return (
        f"has lost its constraint {constraint}: it is there no more, or computed by a hook like weight_norm. Undo "
        "that, mark it again and build the optimizer anew; or unmark(module), if it is meant."
    )


def _next_step_errors(ours: list[Any]) -> dict[int | None, list[str]]:
    """Return the errors that the next step would raise, by the id of the parameter, or None if they concern a group.

    Parameters without a gradient are checked too, because they may have one in the next step.
    """
    found: dict[int | None, list[str]] = {}

    def attempt(key: int | None, check_one: Callable[..., Any], *arguments: Any, **options: Any) -> None:
        try:
            check_one(*arguments, **options)
        except (ValueError, RuntimeError, ArithmeticError, TypeError) as refusal:
            found.setdefault(key, []).append(str(refusal).removeprefix(f"{name}: "))

    for opt in ours:
        name = type(opt).__name__
        attempt(None, track_constraints, opt, [p for group in opt.param_groups for p in group["params"]])
        for k, group in enumerate(opt.param_groups):
            # torch adds "differentiable" to the defaults, but not to the groups, when a state is loaded.
            lacking = [key for key in opt.defaults if key not in group and key != "differentiable"]
            if lacking:
                found.setdefault(None, []).append(f"group {k} of the optimizer lacks {', '.join(lacking)}.")
                continue
            marked = [p for p in group["params"] if constraint_of(p) is not None]
            if marked:
                attempt(None, validate_options, name, group)
            for p in group["params"]:
                attempt(id(p), validate_unflattened, name, [p])
                attempt(id(p), check_owner, name, group, p, opt.state.get(p, {}))
            for p in marked:
                attempt(id(p), _check_next_step, opt, group, p)
    return found


def _check_next_step(opt: Any, group: dict[str, Any], p: Tensor) -> None:
    """Raise the error that the next step would raise for a marked parameter, except for its value."""
    name, constraint = type(opt).__name__, constraint_of(p)
    assert constraint is not None
    validate_marked(opt, p, group)
    check_shapes(opt, group, p, opt.state.get(p, {}), constraint)
    if p.grad is not None:
        validate_gradients(name, group, [p], [p.grad])
        if group["nonfinite"] == "raise" and not p.is_meta:
            validate_finite_gradients(name, group, [p], [p.grad], getattr(opt, "grad_scale", None))


def _parameter_problems(name: str, p: Tensor, opt: Any) -> Iterator[str]:
    """Yield the problems of a marked parameter and its value. ``opt`` is its optimizer, or None."""
    constraint = constraint_of(p)
    assert constraint is not None
    description = _describe(constraint)
    if opt is None and p.requires_grad:
        yield f"{name} is marked, but in no optimizer that check was given, so none of them updates it."
    if opt is not None and not isinstance(opt, ManifoldOptimizer):
        if not is_handled_by(opt, p):
            yield _wrong_optimizer_problem(name, description, opt)
        return
    try:
        off = bool(find_off_manifold(p, constraint))
    except ValueError as refusal:
        yield f"{name} cannot be kept {description}: {refusal}"
        return
    if off and _is_exact(constraint, p, opt):
        yield (
            f"{name} is not {description} to rounding: project_to_manifold_(model) puts it back"
            f"{', and so does the next step' if opt is not None else ''}."
        )


def _pruning_problems(model: nn.Module, name: str, lost: dict[str, str]) -> Iterator[str]:
    """Yield a problem if the layer uses the product of a marked parameter with a mask, unless it is in ``lost``."""
    path, _, leaf = name.rpartition(".")
    used = leaf.removesuffix("_orig")
    if f"{path}.{used}".lstrip(".") in lost or used == leaf:
        return
    if f"{used}_mask" in model.get_submodule(path)._buffers:
        yield (
            f"{name} is marked, but the layer uses its product with {used}_mask, which is not on the manifold. To keep "
            f"the zeros, unmark(module, {leaf!r}); to keep the constraint, module.{used}_mask.fill_(1) and "
            f"torch.nn.utils.prune.remove(module, {used!r})."
        )


def _state_problems(name: str, p: Tensor, opt: Any) -> Iterator[str]:
    """Yield the problems of the state of a marked parameter in an optimizer of this package."""
    if constraint_of(p) is None or p.is_meta or not isinstance(opt, ManifoldOptimizer):
        return
    dtypes = {working_dtype(p.dtype), working_dtype(p.dtype).to_real()}  # a number per block is real
    for key in (*opt._algorithm.state_keys, MASTER):
        value = opt.state.get(p, {}).get(key)
        if not isinstance(value, Tensor):
            continue
        if not value.is_meta and not bool(value.isfinite().all()):
            yield f"the {key} of {name} is not finite, and its block no longer moves: del opt.state[{name}] resets it."
        if value.dtype not in dtypes or value.device != p.device:
            yield (
                f"{name} is {p.dtype} on {p.device}, its {key} {value.dtype} on {value.device}: the next step converts "
                "it."
            )


def _wrong_optimizer_problem(name: str, description: str, opt: Any) -> str:
    kind = f"{type(opt).__module__}.{type(opt).__name__}"
    if kind.startswith(("torch.", "geoopt.")):
        return (
            f"{name} is marked, but moved by {kind}, which does not keep it {description}: use the one of manifold_opt."
        )
    return (
        f"{name} is marked, but moved by {kind}, which is no optimizer of manifold_opt and wraps none that check "
        f"finds: it cannot say whether that keeps it {description}."
    )


def _shared_memory_problems(named: Mapping[str, Tensor], owners: dict[int, Any]) -> Iterator[str]:
    """Yield marked parameters that share memory with another parameter, so that the memory is updated twice."""
    first: dict[int, str] = {}
    for name, p in {id(p): (name, p) for name, p in named.items() if id(p) in owners}.values():
        if type(p) is not nn.Parameter or p.layout is not torch.strided or p.is_meta or not p.numel():
            continue
        other = first.setdefault(p.data_ptr(), name)
        marked = [n for n in (other, name) if constraint_of(named[n]) is not None]
        if other != name and marked:
            yield (
                f"{other} and {name} are two parameters in one memory, and {' and '.join(marked)} marked: each is "
                "stepped by itself. Tie the parameter, not its data: other.weight = one.weight."
            )


def _is_exact(constraint: Manifold, p: Tensor, opt: Any) -> bool:
    """Return True if a step ends on the manifold up to rounding."""
    if opt is None or not isinstance(constraint, Orthogonal):
        return True
    group = next(group for group in opt.param_groups if any(p is member for member in group["params"]))
    return bool(opt._algorithm.retraction_of(group).exact)


def _describe(constraint: Manifold) -> str:
    return "orthogonal" if isinstance(constraint, Orthogonal) else f"on {constraint}"
