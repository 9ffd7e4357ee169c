"""`check`, and what a module remembers of its marks: everything that can have gone wrong is said, once, and truly."""

import copy
from collections import OrderedDict
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from manifold_opt import SGD, Adam, check, constraint_of, mark_orthogonal, orthogonality_error, unmark

from ..helpers import gaussian
from ..integration.test_lifecycle import CONSTRAINT, assigned, replaced, start, swapped, weight_of


def test_what_has_come_by_assignment_is_remembered_in_its_turn():
    net, _ = start("module")
    assigned(net)
    unmark(weight_of(net))
    assert check(net, Adam(net.parameters())) == []
    assigned(net)
    assert constraint_of(weight_of(net)) is None


@pytest.mark.parametrize("gone", [lambda rnn: setattr(rnn, "weight", None), nn.utils.parametrizations.weight_norm])
def test_a_module_whose_marked_parameter_is_none_any_more_still_loads(gone):
    layer = nn.Linear(4, 4)
    mark_orthogonal(layer, "weight")
    gone(layer)
    layer.load_state_dict(copy.deepcopy(layer.state_dict()))
    assert check(layer, Adam(layer.parameters()))[0].startswith(("weight has lost its constraint", "weight was marked"))


def test_a_module_remembers_every_parameter_that_was_marked():
    rnn = nn.GRU(3, 4, num_layers=2)
    mark_orthogonal(rnn, "weight_hh_l0")
    mark_orthogonal(rnn, "weight_hh_l1")
    for name in ("weight_hh_l0", "weight_hh_l1"):
        setattr(rnn, name, nn.Parameter(torch.randn(12, 4)))
    problems = check(rnn, Adam(rnn.parameters()))
    assert [problem.split()[0] for problem in problems] == ["weight_hh_l0", "weight_hh_l1"]


def test_a_lost_constraint_is_reported_once():
    net, opt = start("module")
    replaced(net)
    assert check(net, opt) == [
        f"rnn.weight_hh_l0 has lost its constraint {CONSTRAINT}: another parameter has taken its place, or a "
        "conversion has dropped the mark. Build the optimizer anew: it marks the parameter again.",
        "the optimizer still holds a marked parameter of shape (12, 4) that the model no longer has. Mark its "
        "replacement, if it is to be constrained, and recreate the optimizer.",
    ]
    assert constraint_of(weight_of(net)) is None


def test_check_sees_what_is_not_finite():
    net, opt = start("module")
    with torch.no_grad():
        weight_of(net)[5, 1] = float("nan")
    (problem,) = check(net, opt)
    assert problem.startswith(
        "rnn.weight_hh_l0 cannot be kept orthogonal: block 1: the matrix of shape (4, 4) has entr"
    )


@pytest.mark.parametrize("retraction", ["orthogonalizer", "cayley_iterative"])
def test_check_finds_nothing_wrong_with_an_inexact_scheme(retraction):
    weight = mark_orthogonal(nn.Parameter(gaussian(6, 6)))
    opt = SGD([weight], lr=0.1, retraction=retraction)
    weight.grad = gaussian(6, 6, seed=2)
    opt.step()
    assert orthogonality_error(weight) > 1e-6
    assert check(nn.ParameterList([weight]), opt) == []


def test_check_sees_state_on_another_device():
    net, opt = start("module")
    opt.state[weight_of(net)]["exp_avg"] = opt.state[weight_of(net)]["exp_avg"].to("meta")
    assert check(net, opt) == [
        "rnn.weight_hh_l0 is torch.float32 on cpu, its exp_avg torch.float32 on meta: the next step converts it."
    ]


def test_check_sees_a_parameter_that_lost_its_mark_and_its_model():
    net, opt = start("parameter")
    opt.zero_grad()
    swapped(net, "set_swap_module_params_on_conversion")
    replaced(net)
    assert any("that the model no longer has" in problem for problem in check(net, opt))


def test_check_sees_a_parameter_that_was_marked_late_and_replaced():
    layer = nn.Linear(4, 4)
    opt = Adam(layer.parameters())
    mark_orthogonal(layer.weight)
    layer.weight = nn.Parameter(torch.randn(4, 4))
    (problem,) = check(layer, opt)
    assert problem.startswith("the optimizer still holds a marked parameter of shape (4, 4) that the model no longer")


def test_check_sees_that_nothing_is_marked():
    layer = nn.Linear(4, 4)
    assert check(layer, torch.optim.Adam(layer.parameters())) == []
    assert check(layer, Adam(layer.parameters()))[0].startswith("nothing in the model is marked: mark_recurrent(model)")
    unmark(mark_orthogonal(layer.weight))
    assert check(layer, Adam(layer.parameters())) == []


def test_check_says_what_it_needs():
    layer = nn.Linear(4, 4)
    for arguments in ((Adam(layer.parameters()), layer), (layer.parameters(), layer), (layer, layer)):
        with pytest.raises(TypeError, match="needs a model and its optimizer, in this order, or a Trainer alone, got"):
            check(*arguments)


def test_check_sees_a_parameter_whose_successor_is_marked_otherwise():
    layer = nn.Linear(4, 8)
    mark_orthogonal(layer, "weight", 2)
    layer.weight = mark_orthogonal(nn.Parameter(torch.randn(8, 4)), blocks=1)
    assert "weight has lost its constraint Orthogonal(blocks=2" in check(layer, Adam(layer.parameters()))[0]


def test_check_names_a_tied_parameter_by_each_of_its_names():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    net[1].weight = net[0].weight
    mark_orthogonal(net, "0.weight")
    with torch.no_grad():
        net[0].weight.mul_(2)
    assert [problem.split()[0] for problem in check(net, Adam(net.parameters()))] == ["0.weight", "1.weight"]


def test_check_asks_the_group_of_the_parameter_for_its_retraction():
    weights = [mark_orthogonal(nn.Parameter(gaussian(6, 6, seed=k))) for k in range(2)]
    opt = SGD([{"params": weights[:1]}, {"params": weights[1:], "retraction": "orthogonalizer"}], lr=0.1)
    for p in weights:
        p.grad = gaussian(6, 6, seed=2)
    opt.step()
    assert check(nn.ParameterList(weights), opt) == []


def test_check_reads_no_value_of_the_meta_device():
    layer = nn.Linear(4, 4)
    mark_orthogonal(layer, "weight")
    layer.load_state_dict({key: value.to("meta") for key, value in layer.state_dict().items()}, assign=True)
    assert check(layer, Adam(layer.parameters())) == []


# A mark that a conversion drops is known to have been there, however it came and whatever else has happened.


def later(layer):
    """Marked after the optimizer was built, known from its first step on."""
    opt = Adam(layer.parameters())
    mark_orthogonal(layer.weight)
    layer.weight.grad = torch.ones(4, 4)
    opt.step()
    return opt


def added(layer):
    """Handed over as another group."""
    opt = Adam([layer.bias])
    mark_orthogonal(layer.weight)
    opt.add_param_group({"params": [layer.weight]})
    return opt


def loaded(layer):
    """And then an optimizer's state is loaded."""
    return at_once(layer)


def at_once(layer):
    mark_orthogonal(layer.weight)
    return Adam(layer.parameters())


@pytest.mark.parametrize("look", [False, True])
@pytest.mark.parametrize("come", [later, added, loaded, at_once])
def test_a_mark_once_known_is_put_back(come, look):
    """By check and by the next step, where torch has swapped the parameter's contents for others."""
    layer = nn.Linear(4, 4)
    opt = come(layer)
    opt.zero_grad()
    swapped(layer, "set_swap_module_params_on_conversion")
    assert constraint_of(layer.weight) is None
    if come is loaded:
        opt.load_state_dict(opt.state_dict())
    if come is at_once:  # a step that raises
        layer.weight.grad = layer.bias.grad = None
        mark_orthogonal(other := nn.Parameter(torch.eye(3)))
        other.grad = torch.eye(3)
        opt.add_param_group({"params": [other]})
        opt.param_groups[1]["retraction"] = "none such"
        with pytest.raises(ValueError, match="none such"):
            opt.step()
        opt.param_groups[1]["retraction"] = "qr"
    if look:
        check(layer, opt)
        assert constraint_of(layer.weight) is not None
    layer.weight.grad = gaussian(4, 4)
    opt.step()
    assert orthogonality_error(layer.weight) < 1e-13
    assert check(layer, opt) == [] or come is at_once


def test_what_unmark_has_freed_is_not_put_back():
    """Also where the mark had been dropped before."""
    layer = nn.Linear(4, 4)
    opt = at_once(layer)
    swapped(layer, "set_swap_module_params_on_conversion")
    unmark(layer.weight)
    layer.weight.grad = gaussian(4, 4)
    opt.step()
    assert constraint_of(layer.weight) is None
    assert orthogonality_error(layer.weight) > 1e-4
    assert check(layer, opt) == []


def test_marked_anew_and_otherwise_is_what_counts():
    layer = nn.Linear(4, 8)
    mark_orthogonal(layer, "weight", 2)
    mark_orthogonal(unmark(layer.weight), blocks=1)
    assert check(layer, Adam(layer.parameters())) == []
    layer.load_state_dict(copy.deepcopy(layer.state_dict()), assign=True)
    assert constraint_of(layer.weight).blocks == 1


def test_a_tied_parameter_is_marked_wherever_it_hangs():
    net = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    net["b"].weight = net["a"].weight
    mark_orthogonal(net, "a.weight")
    net.load_state_dict(copy.deepcopy(net.state_dict()), assign=True)
    assert constraint_of(net["a"].weight) == constraint_of(net["b"].weight) is not None


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda layer: layer.weight.data.zero_(), "rank-deficient"),
        (
            lambda layer: setattr(layer.weight, "data", layer.weight.data.to(torch.float8_e5m2)),
            "has dtype torch.float8",
        ),
        (lambda layer: setattr(layer.weight, "data", torch.ones(5, 4)), "blocks=2 must divide dim 0"),
        (lambda layer: setattr(layer.weight, "data", torch.ones(16)), "must have at least 2 dimensions"),  # of FSDP1
    ],
)
def test_check_says_what_the_next_step_would_refuse(spoil, said):
    layer = nn.Linear(4, 8)
    mark_orthogonal(layer, "weight", 2)
    opt = Adam(layer.parameters())
    spoil(layer)
    (problem,) = check(layer, opt)
    assert problem.startswith("weight cannot be kept orthogonal: ")
    assert said in problem


def test_check_says_that_a_parameter_is_gone():
    layer = nn.Linear(4, 4)
    mark_orthogonal(layer, "weight")
    layer.weight = None
    assert "it is there no more" in check(layer, Adam(layer.parameters()))[0]


def test_check_looks_into_an_optimizer_that_wraps_ours():
    layer = nn.Linear(4, 4)
    mark_orthogonal(layer, "weight")

    class Wrapper:
        optim = Adam(layer.parameters())
        param_groups = optim.param_groups

    assert check(layer, Wrapper()) == []


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel, lambda net: torch.compile(nn.DataParallel(net))])
def test_check_names_parameters_as_the_model_inside_a_wrapper_does(wrap):
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    mark_orthogonal(net, "1.weight")
    problems = check(net, torch.optim.Adam(net.parameters()))
    assert problems[0].startswith("1.weight is marked, but moved by torch.optim")
    assert check(wrap(net), torch.optim.Adam(net.parameters())) == problems


def test_check_keeps_the_name_of_a_module_that_is_no_wrapper():
    model = type("Model", (nn.Module,), {"forward": None})()
    model.module = nn.Linear(4, 4)
    mark_orthogonal(model, "module.weight")
    assert check(model, torch.optim.Adam(model.parameters()))[0].startswith("module.weight is marked")
    model = nn.Sequential(OrderedDict(module=nn.Linear(4, 4)))
    mark_orthogonal(model, "module.weight")
    assert check(model, torch.optim.Adam(model.parameters()))[0].startswith("module.weight is marked")


@pytest.mark.parametrize("many", [False, True])
def test_check_takes_a_trainer(many):
    """transformers' has ``optimizer``, which is None until training begins, and Lightning's has ``optimizers``."""
    layer = nn.Linear(4, 4)
    mark_orthogonal(layer, "weight")
    for kind in (Adam, torch.optim.Adam):
        opt = kind(layer.parameters())
        trainer = SimpleNamespace(model=layer, **({"optimizers": [opt]} if many else {"optimizer": Wrapper(opt)}))
        assert check(trainer) == check(layer, opt)
    for missing in ({"model": None, "optimizers": [opt]}, {"model": layer, "optimizers": []}):
        with pytest.raises(ValueError, match=r"SimpleNamespace has no (model|optimizer) yet"):
            check(SimpleNamespace(**missing))
    with pytest.raises(TypeError, match=r"got Linear and no optimizer\. A Trainer creates its optimizer"):
        check(layer, None)


class Wrapper:
    """What Accelerate's AcceleratedOptimizer shows."""

    def __init__(self, optimizer):
        self.optimizer = optimizer
        self.param_groups = optimizer.param_groups


@pytest.mark.parametrize("kind", [Adam, torch.optim.Adam])
def test_a_wrapped_optimizer_is_judged_by_what_it_wraps(kind):
    layer = nn.Linear(4, 4)
    mark_orthogonal(layer, "weight")
    opt = kind(layer.parameters())
    assert check(layer, Wrapper(Wrapper(opt))) == check(layer, opt)
    assert bool(check(layer, opt)) == (kind is torch.optim.Adam)


def test_a_flat_parameter_of_fsdp1_is_refused_with_what_to_do():
    layer = nn.Linear(4, 4)
    mark_orthogonal(layer, "weight")
    opt = Adam(layer.parameters())
    layer.weight = nn.Parameter(torch.eye(4))
    layer.weight._fsdp_flattened = True
    assert "is a part of a flat parameter of FSDP1 since" in check(layer, opt)[0]
    with pytest.raises(ValueError, match="is a part of a flat parameter of FSDP1, which does not keep its matrices"):
        mark_orthogonal(layer, "weight")
