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
    project_to_manifold_,
    unmark,
)
from manifold_opt.constraints import persistence as survival
from manifold_opt.constraints.persistence import flattened_constraints

from ..helpers import gaussian


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
        project_to_manifold_(net)
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
    assert [(label, constraint) for _, label, constraint in flattened_constraints(other.parameters())] == [
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
    assert not opt._engine.constraints


def test_a_group_that_lacks_an_option_is_said_to():
    net = layer()
    opt = Adam(net.parameters())
    del opt.param_groups[0]["nonfinite"]
    assert check(net, opt) == ["group 0 of the optimizer lacks nonfinite."]


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
    with pytest.raises(
        ValueError, match=r"project_to_manifold_: 1\.weight: the matrix of shape \(4, 4\) is rank-deficient"
    ):
        project_to_manifold_(net)


# Conversions that swap the contents of parameters drop what is an attribute of them.


@pytest.mark.parametrize("by_name", [True, False])
def test_a_state_is_saved_and_loaded_after_a_conversion_by_swapping(by_name):
    made = nn.Linear(4, 4, bias=False)
    mark_orthogonal(made, "weight") if by_name else mark_orthogonal(made.weight)
    opt = Adam(made.parameters(), lr=0.01)
    step(opt)
    swapping(made.double)
    saved = copy.deepcopy(opt.state_dict())
    assert constraint_of(made.weight) == Orthogonal()
    swapping(made.float)
    opt.load_state_dict(saved)
    step(opt)
    assert check(made, opt) == []


@pytest.mark.parametrize("by_name", [True, False])
def test_what_was_unmarked_stays_free_through_a_conversion_by_swapping(by_name):
    made = nn.Linear(4, 4, bias=False)
    mark_orthogonal(made, "weight") if by_name else mark_orthogonal(made.weight)
    opt = SGD(made.parameters(), lr=0.01, momentum=0.9)
    step(opt)
    unmark(made.weight)
    swapping(made.double)
    opt.state_dict()
    step(opt)
    assert constraint_of(made.weight) is None
    assert orthogonality_error(made.weight) > 1e-3
    assert SGD(made.parameters()) is not None
    assert constraint_of(made.weight) is None


def test_unmarking_does_not_depend_on_what_was_unmarked_before():
    unmark(layer().weight)
    made = layer()
    made.weight = nn.Parameter(torch.eye(4, dtype=torch.float64))
    unmark(made.weight)
    SGD(made.parameters())
    assert constraint_of(made.weight) is None


def test_unmarking_one_parameter_of_a_module_by_its_name():
    gru = nn.GRU(3, 4)
    mark_orthogonal(gru, "weight_hh_l0")
    mark_orthogonal(gru, "weight_ih_l0", blocks=3)
    assert unmark(gru, "weight_hh_l0") is gru
    assert list(constraint_of(gru)) == ["weight_ih_l0"]
    with pytest.raises(ValueError, match="has no parameter 'weight_hh'"):
        unmark(gru, "weight_hh")
    with pytest.raises(ValueError, match="a tensor takes no name"):
        unmark(gru.weight_hh_l0, "weight_hh_l0")


def test_a_module_that_hands_on_the_parameters_of_another_does_not_miss_their_marks():
    class Wrapper(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def __getattr__(self, name):
            return super().__getattr__(name) if name == "inner" else getattr(self.inner, name)

    wrapped = Wrapper(nn.Linear(4, 4))
    mark_orthogonal(wrapped, "weight")
    assert check(wrapped, SGD(wrapped.parameters(), lr=0.1)) == []
    compiled = torch.compile(nn.Linear(4, 4))
    mark_orthogonal(compiled, "weight")
    assert check(compiled, SGD(compiled.parameters(), lr=0.1)) == []


def test_a_shallow_copy_of_a_module_has_a_record_of_its_own():
    made = layer()
    replica = made._replicate_for_data_parallel()
    replica._parameters = {"weight": nn.Parameter(made.weight.detach().clone())}
    unmark(replica)
    made.load_state_dict({"weight": made.weight.detach().clone()}, assign=True)
    assert constraint_of(made.weight) == Orthogonal()


def test_a_mark_that_the_new_parameter_cannot_have_is_refused_by_name():
    net = nn.Sequential(nn.Linear(4, 4, bias=False))
    mark_orthogonal(net, "0.weight")
    net[0].weight = nn.Parameter(torch.zeros(0, 4))
    net[0].weight = nn.Parameter(torch.zeros(4))
    with pytest.raises(ValueError, match=r"0\.weight was marked as Orthogonal.*unmark\(module, name\)"):
        SGD(net.parameters())
    assert constraint_of(net[0].weight) is None
    unmark(net, "0.weight")
    SGD(net.parameters())
    frozen = nn.Sequential(nn.Linear(4, 4, bias=False))
    mark_orthogonal(frozen, "0.weight")
    frozen[0].weight = nn.Parameter(torch.zeros(4, dtype=torch.int8), requires_grad=False)
    SGD(frozen.parameters())  # quantized, say: it is not trained


def test_project_and_the_error_see_a_mark_that_a_conversion_has_dropped():
    made = layer()
    swapping(made.float)
    with torch.no_grad():
        made.weight.mul_(1.5)
    assert orthogonality_error(made)["weight"] > 1
    assert orthogonality_error(project_to_manifold_(made))["weight"] < 1e-5


def test_marks_of_many_modules_are_found_in_one_pass(monkeypatch):
    """Unmarking a module, checking it and building an optimizer look through all records a few times, not per layer."""
    net = nn.Sequential(*(layer() for _ in range(30)))
    passes, find = [], survival._find_records
    monkeypatch.setattr(survival, "_find_records", lambda some: passes.append(1) or find(some))
    opt = SGD([{"params": [p]} for p in net.parameters()] + [{"params": [nn.Parameter(torch.zeros(2))]}], lr=0.1)
    check(net, opt)
    step(opt)
    unmark(net)
    assert len(passes) <= 5 + len(opt.param_groups)
