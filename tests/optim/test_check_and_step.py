"""``check`` says what the next step refuses, and in its words: every refusal of a step, driven through both."""

import copy
import itertools
import warnings

import numpy
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from manifold_opt import (
    SGD,
    Adam,
    check,
    constraint_of,
    mark_manifold,
    mark_orthogonal,
    mark_positive,
    mark_unit_norm,
    orthogonality_error,
    project_to_manifold_,
    unmark,
)

from ..helpers import gaussian


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.gates = mark_orthogonal(nn.Parameter(gaussian(12, 4)), blocks=3)
        self.table = mark_unit_norm(nn.Parameter(gaussian(10, 4)))
        self.scale = mark_positive(nn.Parameter(torch.ones(5, dtype=torch.float64)))
        self.free = nn.Parameter(gaussian(3))


def started(**options):
    net = Net()
    opt = Adam(net.parameters(), lr=0.01, **options)
    step(net, opt)
    return net, opt


def step(net, opt):
    for k, p in enumerate(net.parameters()):
        p.grad = gaussian(*p.shape, seed=k).to(p)
    opt.step()


def resized(rows):
    """As resize_token_embeddings does, in place: the parameter is the same, its state has the old shape."""

    def spoil(net, _):
        net.table.data = nn.functional.normalize(gaussian(rows, 4))

    return spoil


def resized_and_off(net, _):
    net.table.data = gaussian(14, 4)


def resized_positive(net, _):
    net.scale.data = torch.ones(7, dtype=torch.float64)


def blocks_that_do_not_fit(net, _):
    net.gates.data = gaussian(10, 4)


def a_vector(net, _):
    net.gates.data = gaussian(48)


def a_dtype(net, _):
    net.gates.data = net.gates.data.to(torch.float8_e5m2)


def zeros(net, _):
    with torch.no_grad():
        net.gates[4:8] = 0


def zeros_through_data(net, _):
    net.gates.data = torch.zeros(12, 4, dtype=torch.float64)


def not_finite(net, _):
    with torch.no_grad():
        net.table[3, 1] = torch.nan


def negative(net, _):
    with torch.no_grad():
        net.scale[2] = -1


def an_option(_, opt):
    opt.param_groups[0]["retraction"] = "none such"


def differentiable(_, opt):
    opt.param_groups[0]["differentiable"] = True


def handed_over(net, opt):
    """The state of a marked parameter, to a new one that nobody has marked."""
    old, net.table = net.table, nn.Parameter(net.table.detach()[:7].clone())
    members = opt.param_groups[0]["params"]
    members[next(i for i, p in enumerate(members) if p is old)] = net.table
    opt.state[net.table] = {
        key: value[:7].clone() if value.shape == (10, 4) else value for key, value in opt.state.pop(old).items()
    }


SPOILT = [
    resized(14),
    resized(6),
    resized_and_off,
    resized_positive,
    blocks_that_do_not_fit,
    a_vector,
    a_dtype,
    zeros,
    zeros_through_data,
    not_finite,
    negative,
    an_option,
    differentiable,
    handed_over,
]


def reason_of(refusal):
    """Without the name of the optimizer, and of what check says in its own way."""
    return str(refusal).removeprefix("Adam: ").rpartition("has been written to: ")[2]


@pytest.mark.parametrize("spoil", SPOILT, ids=lambda f: f.__qualname__)
def test_check_says_what_the_step_refuses(spoil):
    net, opt = started()
    spoil(net, opt)
    problems = check(net, opt)
    before = [p.detach().clone() for p in net.parameters()]
    with pytest.raises((ValueError, RuntimeError)) as refusal:
        step(net, opt)
    assert sum(reason_of(refusal.value) in problem for problem in problems) == 1
    assert not any("so does the next step" in problem for problem in problems)
    for p, value in zip(net.parameters(), before, strict=True):
        if p.dtype.itemsize > 1:
            assert torch.equal(p.nan_to_num(), value.nan_to_num())
    assert check(net, opt) == [problem for problem in problems if "gradient" not in problem]


@pytest.mark.parametrize(
    ("gradient", "options"),
    [
        (lambda _: torch.eye(12, 4, dtype=torch.float64).to_sparse(), {}),
        (lambda p: torch.full_like(p, torch.nan), {"nonfinite": "raise"}),
    ],
)
def test_check_says_what_the_step_refuses_of_a_gradient(gradient, options):
    net, opt = started(**options)
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    net.gates.grad = gradient(net.gates)
    (problem,) = check(net, opt)
    with pytest.raises((RuntimeError, FloatingPointError)) as refusal:
        opt.step()
    assert reason_of(refusal.value) in problem
    opt.zero_grad()
    assert check(net, opt) == []


def test_check_says_what_the_step_refuses_of_a_gradient_of_another_shape():
    net, opt = started()
    opt.state.clear()
    net.table.grad = torch.zeros(10, 4, dtype=torch.float64)
    net.table.data = nn.functional.normalize(gaussian(6, 4))
    (problem,) = check(net, opt)
    with pytest.raises(RuntimeError) as refusal:
        opt.step()
    assert reason_of(refusal.value) in problem


@pytest.mark.parametrize("spoil", [lambda net: net.gates.mul_(1.1), lambda net: net.table.add_(0.01)])
def test_what_check_says_that_the_next_step_puts_back_it_does(spoil):
    net, opt = started()
    with torch.no_grad():
        spoil(net)
    (problem,) = check(net, opt)
    assert problem.endswith("project_to_manifold_(model) puts it back, and so does the next step.")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        step(net, opt)
    assert check(net, opt) == []


@pytest.mark.parametrize("loaded", [False, True])
def test_a_state_handed_to_a_new_parameter_goes_on_once_that_is_marked(loaded):
    """As code does that prunes points; the optimizer's state_dict is refused before that, and loads afterwards."""
    net, opt = started()
    handed_over(net, opt)
    with pytest.raises(ValueError, match=r"is not marked, but its state is that of a marked one, UnitNorm\(dim=0\)"):
        opt.state_dict()
    mark_unit_norm(net.table)
    if loaded:
        opt.load_state_dict(opt.state_dict())
    step(net, opt)
    assert check(net, opt) == []
    assert float(constraint_of(net.table).error(net.table.detach()).max()) < 1e-15
    assert float(opt.state[net.table]["step"]) == 2


def test_a_state_handed_to_a_new_parameter_may_be_dropped():
    net, opt = started()
    handed_over(net, opt)
    del opt.state[net.table]
    step(net, opt)
    assert check(net, opt) == []
    opt.load_state_dict(opt.state_dict())


def test_an_unmarked_state_is_saved_as_torchs():
    """Which torch.optim loads and goes on with; no step is needed in between."""
    weight = mark_orthogonal(nn.Parameter(gaussian(4, 4)))
    opt = SGD([weight], lr=0.1, momentum=0.9)
    weight.grad = gaussian(4, 4, seed=3)
    opt.step()
    framed = opt.state[weight]["momentum_buffer"].clone()
    unmark(weight)
    stock = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    stock.load_state_dict(opt.state_dict())
    assert stock.state[weight].keys() <= {"momentum_buffer", "step"}
    torch.testing.assert_close(stock.state[weight]["momentum_buffer"], framed @ weight.detach())


# Values that are written through .data leave no other trace than the address.


@pytest.mark.parametrize("rows", [1, 300])
@pytest.mark.parametrize(
    "write",
    [
        lambda p: setattr(p, "data", p.data * 1.5),
        lambda p: setattr(p, "data", p.data.bfloat16().float()),
        lambda p: setattr(p, "data", gaussian(*p.shape, dtype=torch.float32)),
    ],
)
def test_data_that_is_replaced_is_put_back_by_the_next_step(write, rows):
    weights = [mark_orthogonal(nn.Parameter(gaussian(8, 8, dtype=torch.float32, seed=k))) for k in range(rows)]
    opt = SGD(weights, lr=0.0)
    for p in weights:
        p.grad = torch.zeros_like(p)
    opt.step()
    write(weights[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        opt.step()
    assert orthogonality_error(weights[0]) < 1e-6


@pytest.mark.parametrize("size", [4, 300])
@pytest.mark.parametrize("kind", [SGD, Adam])
def test_a_state_whose_data_is_replaced_is_gone_on_with(kind, size):
    """As helpers do that move an optimizer's state to another device. What is saved is what is stepped with."""
    options = {"momentum": 0.9} if kind is SGD else {}
    ours, theirs = ([mark_orthogonal(nn.Parameter(gaussian(size, size, seed=k))) for k in range(2)] for _ in range(2))
    opts = [kind(params, lr=0.1, **options) for params in (ours, theirs)]
    for step_ in range(4):
        for params, opt in zip((ours, theirs), opts, strict=True):
            for k, p in enumerate(params):
                p.grad = gaussian(size, size, seed=10 * step_ + k)
            opt.step()
        for state in opts[0].state.values():
            for value in state.values():
                value.data = value.data.clone()
    for p, q in zip(ours, theirs, strict=True):
        assert torch.equal(p, q)
        for key, value in opts[1].state[q].items():
            assert torch.equal(opts[0].state[p][key], value)


# Wrappers, several optimizers, and what else check looks at.


class Sam(torch.optim.Optimizer):
    """As davda54/sam: an optimizer that makes its own of a class, and shows its groups."""

    def __init__(self, params, base, **options):
        super().__init__(params, options)
        self.base_optimizer = base(self.param_groups, **options)
        self.param_groups = self.base_optimizer.param_groups


class Holder:
    """As ScheduleFreeWrapper (base) and DPOptimizer (original_optimizer) hold theirs."""

    def __init__(self, name, opt):
        setattr(self, name, opt)
        self.param_groups = opt.param_groups


@pytest.mark.parametrize("name", ["base", "original_optimizer", "_optimizer", "inner"])
def test_check_looks_through_wrappers_of_any_kind(name):
    net, opt = started()
    assert check(net, Holder(name, opt)) == []
    assert check(net, Holder("outer", Holder(name, opt))) == []
    stock = torch.optim.Adam(net.parameters())
    assert check(net, Holder(name, stock)) == check(net, stock) != []


def test_check_looks_through_an_optimizer_that_is_a_wrapper():
    net = Net()
    assert check(net, Sam(net.parameters(), SGD, lr=0.1)) == []
    assert (
        "torch.optim.sgd.SGD, which does not keep it" in check(net, Sam(net.parameters(), torch.optim.SGD, lr=0.1))[0]
    )


def test_check_says_less_of_an_optimizer_that_it_does_not_know():
    class Own(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {})

    net = Net()
    said = "is no optimizer of manifold_opt and wraps none that check finds: it cannot say whether that keeps it"
    ends = ("orthogonal.", "on UnitNorm(dim=0).", "on Positive().")
    problems = check(net, Own(net.parameters()))
    assert len(problems) == 3
    for problem, end in zip(problems, ends, strict=True):
        assert f"{said} {end}" in problem


def test_check_takes_all_optimizers_of_a_model():
    """As of a generator and a discriminator, or one for each parameter."""
    net = Net()
    each = [Adam([p]) for p in net.parameters()]
    assert check(net, each) == []
    assert check(net, each[1:]) == [
        "gates is marked, but in no optimizer that check was given, so none of them updates it."
    ]
    assert check(net, [each[0], torch.optim.SGD(list(net.parameters())[1:])]) == [
        "table is marked, but moved by torch.optim.sgd.SGD, which does not keep it on UnitNorm(dim=0): use the one of "
        "manifold_opt.",
        "scale is marked, but moved by torch.optim.sgd.SGD, which does not keep it on Positive(): use the one of "
        "manifold_opt.",
    ]


def test_check_sees_a_frozen_copy_that_has_left_the_manifold():
    """As a target network that follows by averaging."""
    net, opt = started()
    target = Net().requires_grad_(False)
    agent = nn.ModuleDict({"net": net, "target": target})
    assert check(agent, opt) == []
    with torch.no_grad():
        target.gates.lerp_(net.gates, 0.5)
    assert check(agent, opt) == [
        "target.gates is not orthogonal to rounding: project_to_manifold_(model) puts it back."
    ]
    project_to_manifold_(agent)
    assert check(agent, opt) == []
    target.gates.data.zero_()
    assert "target.gates cannot be kept orthogonal: block 0: the matrix" in check(agent, opt)[0]


def test_check_sees_two_parameters_in_one_memory():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    mark_orthogonal(net, "0.weight")
    net[1].weight = nn.Parameter(net[0].weight.t())
    (problem,) = check(net, Adam(net.parameters()))
    assert problem.startswith("0.weight and 1.weight are two parameters in one memory, and 0.weight marked")
    net[1].weight = net[0].weight
    assert check(net, Adam(net.parameters())) == []


def pruned(by):
    layer = nn.Linear(6, 6)
    mark_orthogonal(layer, "weight")
    opt = Adam(layer.parameters(), lr=0.01)
    by(layer, "weight")
    return layer, opt


@pytest.mark.parametrize(
    "by",
    [
        lambda *a: prune.random_unstructured(*a, amount=0.3),
        lambda *a: prune.random_structured(*a, amount=0.3, dim=0),
    ],
)
@pytest.mark.parametrize("remedy", ["keep the zeros", "undo the pruning"])
def test_check_says_of_a_pruned_weight_what_works(by, remedy):
    layer, opt = pruned(by)
    (problem,) = check(layer, opt)
    assert problem.startswith("weight was marked as Orthogonal(blocks=1, dim=0, gain=1.0) and is pruned since")
    if remedy == "keep the zeros":
        assert "unmark(module)" in problem
        unmark(layer)
    else:
        assert "module.weight_mask.fill_(1) and torch.nn.utils.prune.remove(module, 'weight')" in problem
        layer.weight_mask.fill_(1)
        prune.remove(layer, "weight")
    assert check(layer, opt) == []
    layer(gaussian(3, 6, dtype=torch.float32)).square().sum().backward()
    opt.step()
    assert check(layer, opt) == []
    if remedy == "keep the zeros":
        prune.remove(layer, "weight")
        assert (layer.weight == 0).any()
    else:
        assert orthogonality_error(layer)["weight"] < 1e-6


def test_check_says_that_a_weight_has_been_parametrized():
    layer = nn.Linear(6, 6)
    mark_orthogonal(layer, "weight")
    parametrizations.spectral_norm(layer)
    (problem,) = check(layer, Adam(layer.parameters()))
    assert problem.startswith("weight was marked as Orthogonal(blocks=1, dim=0, gain=1.0) and is parametrized since")
    nn.utils.parametrize.remove_parametrizations(layer, "weight")
    mark_orthogonal(layer, "weight")
    assert check(layer, Adam(layer.parameters())) == []


# unmark and constraint_of of a module.


def test_unmark_takes_a_module():
    net = nn.Sequential(nn.Linear(4, 4), nn.GRU(4, 4))
    mark_orthogonal(net, "0.weight")
    mark_orthogonal(net[1].weight_hh_l0, blocks=3)
    assert constraint_of(net).keys() == {"0.weight", "1.weight_hh_l0"}
    assert unmark(net) is net
    assert constraint_of(net) == {}
    assert check(net, Adam(net.parameters())) == []
    net[0].weight = nn.Parameter(torch.zeros(4, 4))  # is missed by nobody
    assert check(net, Adam(net.parameters())) == []


def test_unmark_takes_a_module_of_geoopts_parameters():
    geoopt = pytest.importorskip("geoopt")
    net = nn.ParameterList([geoopt.ManifoldParameter(torch.eye(3), manifold=geoopt.Sphere())])
    mark_manifold(extra := nn.Parameter(torch.eye(3)), geoopt.PoincareBall(c=0.1))
    net.append(extra)
    assert len(constraint_of(net)) == 2
    unmark(net)
    assert constraint_of(net) == {}
    assert isinstance(net[0].manifold, geoopt.Euclidean)


@pytest.mark.parametrize("function", [unmark, constraint_of])
@pytest.mark.parametrize("target", ["weight", None, [nn.Parameter(torch.eye(2))]])
def test_what_is_neither_a_parameter_nor_a_module_is_refused(function, target):
    with pytest.raises(
        TypeError, match=f"{function.__name__}: needs a parameter or a module, got {type(target).__name__}"
    ):
        function(target)


# check looks into wrappers, and into nothing that looking would consume.


class Wrapped:
    """A wrapper, such as SAM, with other things beside its optimizer."""

    def __init__(self, optimizer, beside):
        self.optimizer, self.param_groups, self.beside = optimizer, optimizer.param_groups, beside


def nested(depth):
    inner: list = []
    for _ in range(depth):
        inner = [inner, inner]
    return inner


def test_check_consumes_nothing_that_a_wrapper_has():
    layer = nn.Linear(4, 4)
    mark_orthogonal(layer, "weight")
    opt, numbers = Adam(layer.parameters()), iter(range(5))
    for beside in (numbers, {"it": numbers}, [itertools.count()], nested(60), [numpy.array(1.0)], [object()]):
        assert check(layer, Wrapped(opt, beside)) == []
    assert next(numbers) == 0
    assert check(layer, [Wrapped(opt, [opt]), opt]) == []
    assert check(layer, {"a": opt}) == []
    assert check(layer, (one for one in [opt])) == []


def test_a_target_network_that_nobody_projects_is_reported_with_its_error():
    layer = nn.Linear(4, 4)
    mark_orthogonal(layer, "weight")
    target = copy.deepcopy(layer)
    with torch.no_grad():
        target.weight.mul_(1.01)
    said = check(nn.ModuleDict({"net": layer, "target": target}), Adam(layer.parameters()))
    assert [line.partition(":")[0].partition(",")[0] for line in said] == [
        "target.weight is marked",
        "target.weight is not orthogonal to rounding",
    ]


def test_a_marked_parameter_behind_a_mask_is_reported_and_the_remedy_works():
    layer = nn.Linear(6, 6)
    prune.l1_unstructured(layer, "weight", 0.3)
    with pytest.raises(ValueError, match=r"is pruned.*prune\.remove"):
        mark_orthogonal(layer, "weight")
    mark_orthogonal(layer, "weight_orig")
    (said,) = check(layer, Adam(layer.parameters()))
    assert said.startswith("weight_orig is marked, but the layer uses its product with weight_mask")
    layer.weight_mask.fill_(1)
    prune.remove(layer, "weight")
    assert check(layer, Adam(layer.parameters())) == []
    assert orthogonality_error(layer)["weight"] < 1e-5


def test_a_warning_that_a_value_is_put_back_is_true(recwarn):
    """A step that refuses one value puts no other one back, and does not say so."""
    one, other = nn.Linear(4, 4, bias=False), nn.Linear(3, 4, bias=False)
    mark_orthogonal(one, "weight")
    mark_orthogonal(other, "weight")
    opt = Adam([one.weight, other.weight])
    with torch.no_grad():
        one.weight.mul_(3)
        other.weight.zero_()
    one.weight.grad, other.weight.grad = torch.ones(4, 4), torch.ones(4, 3)
    with pytest.raises(ValueError, match="rank-deficient"):
        opt.step()
    assert not [w for w in recwarn if "put back" in str(w.message)]
    assert orthogonality_error(one.weight) > 1
