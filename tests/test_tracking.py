"""What remembers a mark remembers it right: copies and pickles of any kind, threads, conversions, unmarking."""

import copy
import io
import pickle
import threading
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
from torch import nn

from manifold_opt import (
    SGD,
    Adam,
    Orthogonal,
    check,
    constraint_of,
    mark_orthogonal,
    mark_unit_norm,
    orthogonality_error,
    project_,
    unmark,
)
from manifold_opt.survival import sharded_marks

from .helpers import gaussian


def swapping(function):
    """With torch swapping the contents of parameters, as it may by a flag."""
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        return function()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def step(opt, seed=0):
    for group in opt.param_groups:
        for k, p in enumerate(group["params"]):
            p.grad = gaussian(*p.shape, seed=seed + k).to(p.dtype)
    opt.step()


def layer(size=4):
    made = nn.Linear(size, size, bias=False, dtype=torch.float64)
    mark_orthogonal(made, "weight")
    return made


# state_dict leaves the optimizer as it is.


def stock_checkpoint():
    model = nn.Linear(6, 6, bias=False, dtype=torch.float64)
    opt = torch.optim.Adam(model.parameters(), lr=0.01)
    step(opt)
    return model.state_dict(), opt.state_dict()


@pytest.mark.parametrize("between", [None, "unmark"])
def test_looking_at_a_state_dict_changes_nothing(between):
    """As a template for dcp.load, or to log something, between loads; also with a value that is no point."""
    values, state = stock_checkpoint()
    ends = []
    for look in (False, True):
        torch.manual_seed(0)
        net = layer(6)
        opt = Adam(net.parameters(), lr=0.01)
        opt.load_state_dict(copy.deepcopy(state))
        if between:
            step(opt, 3)
            unmark(net)
        if look:
            before = dict(opt.state[net.weight])
            opt.state_dict()
            assert all(opt.state[net.weight][key] is value for key, value in before.items())
            with torch.inference_mode():
                opt.state_dict()
        net.load_state_dict(values)
        project_(net)
        step(opt, 7)
        ends.append(net.weight.detach())
    assert torch.equal(*ends)


@pytest.mark.parametrize(
    "value", [torch.zeros(6, 6), torch.full((6, 6), torch.nan), torch.ones(6, 6), torch.ones(8, 6), torch.ones(6)]
)
@pytest.mark.parametrize("kind", [SGD, Adam])
def test_an_unmarked_parameter_may_be_anything(kind, value):
    """Of any value and shape: its moments start anew, if they cannot be converted, with a warning."""
    net = layer(6)
    opt = kind(net.parameters(), lr=0.01, **({"momentum": 0.9} if kind is SGD else {}))
    step(opt)
    unmark(net)
    net.weight.grad = None
    net.weight.data = value.double()
    assert check(net, opt) == []
    with pytest.warns(UserWarning, match="start anew"):
        saved = opt.state_dict()
    fresh = nn.Parameter(net.weight.detach().clone())
    stock = getattr(torch.optim, kind.__name__)([fresh], **{k: opt.defaults[k] for k in ("lr",)})
    stock.load_state_dict(copy.deepcopy(saved))
    with pytest.warns(UserWarning, match="start anew"):
        step(opt)
    step(stock)
    assert torch.equal(net.weight.nan_to_num(), fresh.nan_to_num())


def test_a_hook_that_unmarks_before_a_state_is_saved_is_in_time():
    net = layer()
    opt = Adam(net.parameters())
    step(opt)
    opt.register_state_dict_pre_hook(lambda _: unmark(net))
    assert "constrained" not in opt.state_dict()["state"][0]


# Marks that torch drops, and those that were taken off.


@pytest.mark.parametrize("form", ["module", "parameter"])
def test_a_weight_that_was_unmarked_is_not_marked_again(form):
    net = layer()
    opt = Adam(net.parameters())
    unmark(net if form == "module" else net.weight)
    swapping(lambda: net.load_state_dict({"weight": gaussian(4, 4)}))
    swapping(net.float)
    before = net.weight.detach().clone()
    net.weight.grad = torch.zeros(4, 4)
    for one in (opt, Adam(net.parameters())):
        one.step()
    assert constraint_of(net.weight) is None
    assert torch.equal(net.weight, before)
    net.weight = nn.Parameter(torch.zeros(4, 4))
    assert check(net, Adam(net.parameters())) == []


def test_a_conversion_before_the_optimizer_is_built_loses_no_mark():
    net = layer()
    swapping(net.float)
    assert constraint_of(net.weight) is None
    opt = SGD(net.parameters(), lr=0.1)
    assert constraint_of(net.weight) == Orthogonal()
    for seed in range(5):
        step(opt, seed)
    assert orthogonality_error(net.weight) < 1e-5


def test_a_bare_mark_that_is_dropped_is_known_to_its_optimizer_alone():
    weight = mark_orthogonal(nn.Parameter(gaussian(4, 4)))
    net = nn.ParameterList([weight])
    opt = SGD([weight], lr=0.1)
    unmark(weight)
    swapping(net.float)
    step(opt)
    assert constraint_of(weight) is None


# Copies and pickles.


class CopiesItself(nn.Linear):
    def __deepcopy__(self, memo):
        new = type(self).__new__(type(self))
        new.__dict__ = copy.deepcopy(self.__dict__, memo)
        return new


class Reduced(nn.Linear):
    """As a torch.fx.GraphModule: its dictionary is an argument of what rebuilds it."""

    def __reduce__(self):
        return rebuilt, (type(self), self.__dict__)


def rebuilt(cls, values):
    new = cls.__new__(cls)
    new.__dict__ = values
    return new


def saved(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "torch.save": saved,
    "to a process": lambda module: pickle.loads(bytes(ForkingPickler.dumps(module))),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", [nn.Linear, CopiesItself, Reduced])
def test_a_copy_is_known_by_its_own_parameters(kind, way):
    module = kind(4, 4)
    mark_orthogonal(module, "weight")
    other = WAYS[way](module)
    other.weight._fsdp_flattened = True
    assert [(label, constraint) for _, label, constraint in sharded_marks(other.parameters())] == [
        (f"{kind.__name__}.weight", Orthogonal())
    ]
    unmark(other)
    assert check(other, Adam(other.parameters())) == []
    other.load_state_dict(copy.deepcopy(other.state_dict()), assign=True)
    assert constraint_of(other) == {}
    assert constraint_of(module) == {"weight": Orthogonal()}
    unmark(module.weight)
    module.weight = nn.Parameter(torch.eye(4))
    assert check(module, Adam(module.parameters())) == []


def test_a_traced_module_is_saved_and_copied():
    """Its parameters are marked. torch.fx makes its copy of a choice of attributes, without what it remembers."""
    traced = torch.fx.symbolic_trace(nn.Linear(4, 4))
    mark_orthogonal(traced, "weight")
    for way in WAYS.values():
        other = way(traced)
        assert constraint_of(other) == {"weight": Orthogonal()}
        step(opt := SGD(other.parameters(), lr=0.1))
        assert check(other, opt) == []


@pytest.mark.parametrize("way", WAYS)
def test_what_has_been_unmarked_stays_so_on_its_way(way):
    """With the optimizer's state, which is in the frame until the next step."""
    net = layer()
    opt = Adam(net.parameters())
    step(opt)
    unmark(net)
    _, other = WAYS[way]((net, opt)) if way != "torch.save" else pickle.loads(pickle.dumps((net, opt)))
    step(other)
    step(opt)
    assert torch.equal(net.weight, other.param_groups[0]["params"][0])


def test_a_parameter_of_an_earlier_version_loads():
    """It had the constraint itself as its mark."""
    weight = nn.Parameter(torch.eye(3))
    weight._manifold_opt_constraint = Orthogonal(gain=1.0)
    file = io.BytesIO()
    torch.save(weight, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert constraint_of(loaded) == Orthogonal()
    step(SGD([loaded], lr=0.1))
    assert orthogonality_error(loaded) < 1e-6


def test_a_mark_with_more_options_than_this_version_knows_is_said_to_be_so():
    weight = nn.Parameter(torch.eye(3))
    weight._manifold_opt_constraint = ("orthogonal", 1, 0, 1.0, None, True, "more")
    with pytest.raises(ValueError, match="this version of manifold_opt does not have"):
        constraint_of(weight)


def test_modules_are_marked_copied_and_unmarked_in_several_threads():
    failures, template = [], layer(3)

    def work(seed):
        try:
            for _ in range(60):
                net = copy.deepcopy(template) if seed % 2 else layer(3)
                Adam(net.parameters())
                unmark(net.weight)
                mark_unit_norm(net, "weight")
        except Exception as failure:
            failures.append(failure)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


# Groups.


def test_a_step_of_no_group_is_none():
    net = layer()
    opt = Adam(net.parameters())
    step(opt)
    opt.param_groups.clear()
    opt.state.clear()
    opt.step()
    assert not opt._marks


def test_a_group_that_lacks_an_option_is_said_to():
    net = layer()
    opt = Adam(net.parameters())
    del opt.param_groups[0]["on_fault"]
    assert check(net, opt) == ["group 0 of the optimizer lacks on_fault."]


# What check says of memory and of optimizers that hold others.


def test_columns_of_one_tensor_are_two_memories():
    whole = gaussian(8, 16)
    net = nn.ParameterList([nn.Parameter(whole[:, :8]), nn.Parameter(whole[:, 8:])])
    mark_orthogonal(net, "0")
    assert check(net, Adam(net.parameters())) == []


def test_an_alias_that_no_optimizer_moves_is_nobodys_fault():
    net = layer()
    net.alias = nn.Parameter(net.weight.data, requires_grad=False)
    assert check(net, Adam([net.weight])) == []


def test_an_optimizer_of_torch_is_not_taken_for_a_wrapper():
    net = layer()
    stock = torch.optim.Adam(net.parameters())
    stock.warmup = Adam([nn.Parameter(torch.eye(3))])
    assert check(net, stock) == [
        "weight is marked, but moved by torch.optim.adam.Adam, which does not keep it orthogonal: use the one of "
        "manifold_opt."
    ]


class Several:
    def __init__(self, optimizers):
        self.optimizers = optimizers

    @property
    def param_groups(self):
        return [group for opt in self.optimizers for group in opt.param_groups]


def test_a_wrapper_of_several_is_looked_into():
    net = nn.ModuleList([layer(), layer()])
    both = [Adam(child.parameters()) for child in net]
    for opts in (Several(both), tuple(both), dict(enumerate(both)).values(), (one for one in both)):
        assert check(net, opts) == []


# Messages.


def test_the_shape_of_a_tall_block_is_as_it_lies_in_the_parameter():
    with pytest.raises(ValueError, match=r"the matrix of shape \(10, 4\)"):
        mark_orthogonal(nn.Parameter(torch.zeros(10, 4)))
    with pytest.raises(ValueError, match=r"block 1: the matrix of shape \(7, 4\)"):
        mark_orthogonal(nn.Parameter(torch.cat([gaussian(7, 4), torch.zeros(7, 4)])), blocks=2)
    with pytest.raises(ValueError, match=r"block 0: the matrix of shape \(7, 2\)"):
        mark_orthogonal(nn.Parameter(torch.zeros(7, 4)), blocks=2, dim=1)


def test_projecting_names_the_parameter():
    net = nn.Sequential(layer(), layer())
    net[1].weight.data.zero_()
    with pytest.raises(ValueError, match=r"project_: 1\.weight: the matrix of shape \(4, 4\) is rank-deficient"):
        project_(net)
