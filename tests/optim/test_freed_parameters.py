"""Nothing that has left an optimizer or a module is kept: memory is freed as with torch.optim, files are as small."""

import copy
import io
import pickle
import weakref

import pytest
import torch
from torch import nn

from manifold_opt import SGD, Adam, check, constraint_of, mark_orthogonal, mark_unit_norm, orthogonality_error, unmark

from ..helpers import gaussian, pairs

COUNT = 30
MARKS = {
    "orthogonal": mark_orthogonal,
    "one block": lambda p: mark_orthogonal(p, blocks=2, which=(1,)),
    "unit norm": mark_unit_norm,
    "free": lambda p: p,
}
RULES = {
    "SGD": lambda params: SGD(params, lr=0.01, momentum=0.9),
    "Adam": lambda params: Adam(params, lr=0.01),
}


def made(mark, seed=0):
    return mark(nn.Parameter(gaussian(6, 6, seed=seed)))


def step(opt):
    for group in opt.param_groups:
        for k, p in enumerate(group["params"]):
            p.grad = gaussian(*p.shape, seed=k).to(p.dtype)
    opt.step()


def replaced(opt, mark, seed):
    """As code does that adds and prunes points: the new parameter takes over group, place and state."""
    group, new = opt.param_groups[0], made(mark, seed)
    old, group["params"][0] = group["params"][0], new
    opt.state[new] = {key: value.clone() for key, value in opt.state.pop(old).items()}
    return old


def replaced_without_state(opt, mark, seed):
    group = opt.param_groups[0]
    old, group["params"][0] = group["params"][0], made(mark, seed)
    opt.state.pop(old)
    return old


def removed_group(opt, mark, seed):
    opt.add_param_group({"params": [made(mark, seed)]})
    step(opt)
    (old,) = opt.param_groups.pop()["params"]
    opt.state.pop(old)
    return old


def removed_first_group(opt, mark, seed):
    opt.add_param_group({"params": [made(mark, seed)]})
    old = opt.param_groups.pop(0)["params"][0]
    opt.state.pop(old)
    return old


def unmarked_then_removed(opt, mark, seed):
    old = unmark(opt.param_groups[0]["params"][0])
    step(opt)
    opt.state.pop(old)
    opt.param_groups[0]["params"][0] = made(mark, seed)
    return old


WAYS = [replaced, replaced_without_state, removed_group, removed_first_group, unmarked_then_removed]


@pairs(rule=RULES, mark=MARKS, way=WAYS)
def test_parameters_that_have_left_are_freed(way, mark, rule):
    """With the next step, for a plan holds what it was made for until then; without a garbage collection."""
    opt = RULES[rule]([made(MARKS[mark]), nn.Parameter(gaussian(3))])
    step(opt)
    alive = []
    for k in range(COUNT):
        alive.append(weakref.ref(way(opt, MARKS[mark], seed=k + 1)))
        step(opt)
    assert sum(old() is not None for old in alive) == 0
    here = {id(p) for group in opt.param_groups for p in group["params"]}
    assert {id(p) for p in opt._engine.constraints} <= here


def test_a_free_parameter_that_leaves_is_freed_at_once():
    """Where its group has no marked one: a scene of points is large, and its memory is wanted now."""
    opt = Adam([{"params": [made(mark_unit_norm)]}, {"params": [made(MARKS["free"])]}], lr=0.01)
    for _ in range(2):
        step(opt)
    group = opt.param_groups[1]
    old = weakref.ref(group["params"][0])
    new = nn.Parameter(gaussian(4, 4))
    opt.state[new] = opt.state.pop(group["params"][0])
    group["params"][0] = new
    assert old() is None


@pytest.mark.filterwarnings("ignore:torch.optim.adam.Adam has moved a marked parameter")
@pytest.mark.parametrize("kind", [Adam, torch.optim.Adam])
def test_a_module_that_is_replaced_is_freed(kind):
    """Marked by name, so that the module remembers; a stock optimizer shows what can be had."""
    net = nn.ModuleList([nn.Linear(5, 5), nn.Linear(5, 5)])
    opt = kind(net.parameters(), lr=0.01)
    alive = []
    for k in range(COUNT):
        old = net[0]
        alive += [weakref.ref(old), weakref.ref(old.weight)]
        net[0] = nn.Linear(5, 5)
        mark_orthogonal(net, "0.weight")
        for p in old.parameters():
            opt.state.pop(p, None)
        del opt.param_groups[0]
        opt.add_param_group({"params": list(net.parameters())})
        del old, p
        step(opt)
        assert kind is torch.optim.Adam or orthogonality_error(net[0].weight) < 1e-5, k
    assert sum(one() is not None for one in alive) == 0


def replaced_weight(layer):
    layer.weight = nn.Parameter(gaussian(256, 256, dtype=torch.float32))


def unmarked_and_replaced(layer):
    unmark(layer)
    replaced_weight(layer)


def assigned(layer):
    layer.load_state_dict({"weight": gaussian(256, 256, dtype=torch.float32)}, assign=True)


def size_of(module):
    file = io.BytesIO()
    torch.save(module, file)
    return file.getbuffer().nbytes


@pytest.mark.parametrize("replace", [replaced_weight, unmarked_and_replaced, assigned])
def test_a_module_holds_no_weight_that_was_replaced(replace):
    """Neither alive, nor in a copy, nor in its file, which is as large as that of a module never marked."""
    layer = nn.Linear(256, 256, bias=False)
    never = size_of(layer)
    mark_orthogonal(layer, "weight")
    old = weakref.ref(layer.weight)
    replace(layer)
    assert old() is None
    for module in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert size_of(module) < never + 2000  # 256 KB is a weight
        assert sum(t.numel() for t in torch_objects(module)) == layer.weight.numel()


def torch_objects(module):
    """The tensors of whatever a module has in its dictionary."""
    found, seen, queue = [], set(), [module]
    while queue:
        x = queue.pop()
        if id(x) in seen:
            continue
        seen.add(id(x))
        if isinstance(x, torch.Tensor):
            found.append(x)
        elif isinstance(x, dict):
            queue.extend(x.values())
        elif isinstance(x, (list, tuple)):
            queue.extend(x)
        elif hasattr(x, "__dict__") and not isinstance(x, type):
            queue.extend(vars(x).values())
    return found


def test_a_copy_of_a_module_remembers_for_itself():
    """Whichever is unmarked, the other stays marked, and both know what was lost."""
    layer = nn.Linear(4, 4)
    mark_orthogonal(layer, "weight")
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), copy.deepcopy(copy.deepcopy(layer))):
        unmark(other)
        assert constraint_of(other) == {}
        other.load_state_dict(copy.deepcopy(other.state_dict()), assign=True)
        assert constraint_of(other) == {}
        assert constraint_of(layer).keys() == {"weight"}
    other = copy.deepcopy(layer)
    for module in (layer, other):
        module.weight = nn.Parameter(torch.eye(4))
        assert "weight has lost its constraint" in check(module, torch.optim.Adam(module.parameters()))[0]


def test_swapping_tensors_still_works():
    """torch refuses to swap a tensor that something refers to weakly."""
    layer = nn.Linear(4, 4)
    mark_orthogonal(layer, "weight")
    opt = Adam(layer.parameters())
    step(opt)
    opt.zero_grad()
    torch.utils.swap_tensors(layer.weight, nn.Parameter(torch.eye(4)))
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        layer.load_state_dict(copy.deepcopy(layer.state_dict()))
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert constraint_of(layer.weight) is not None


@pytest.mark.parametrize("form", ["by name", "by itself"])
def test_a_plain_load_that_swaps_keeps_the_mark(form):
    """At once where the module remembers; with the next step, or a look, where only the optimizer does."""
    layer = nn.Linear(4, 4)
    if form == "by name":
        mark_orthogonal(layer, "weight")
    else:
        mark_orthogonal(layer.weight)
    opt = Adam(layer.parameters(), lr=0.1)
    values = {"weight": gaussian(4, 4, dtype=torch.float32), "bias": torch.zeros(4)}
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        layer.load_state_dict(values)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert (constraint_of(layer.weight) is not None) == (form == "by name")
    assert check(layer, opt) == [
        "weight is not orthogonal to rounding: project_to_manifold_(model) puts it back, and so does the next step."
    ]
    with pytest.warns(UserWarning, match="away from its manifold"):
        step(opt)
    for _ in range(4):
        step(opt)
    assert orthogonality_error(layer.weight) < 1e-5
    assert check(layer, opt) == []
