"""Other constraints than orthogonality are never lost in silence; a checkpoint goes on bit for bit."""

import copy
import io
import pickle
import shutil

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR
from torch.optim.swa_utils import AveragedModel

from manifold_opt import (
    SGD,
    Adam,
    check,
    constraint_of,
    mark_manifold,
    mark_positive,
    mark_spectral,
    mark_unit_norm,
    orthogonal_average,
    unmark,
)
from manifold_opt import project_to_manifold_ as project_model
from manifold_opt.manifolds import Positive, Spectral, UnitNorm
from manifold_opt.manifolds.layout import get_points

from ..helpers import gaussian
from ..integration.test_lifecycle import REPLACES, saved, sent
from .test_manifold_steps import OTHERS, OWN, RULES, build, give, parameter, run

CONSTRAINTS = {"conv": UnitNorm(1), "head": Spectral(0.9), "scale": Positive()}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)
        self.head = nn.Linear(4, 3)
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, x):
        return self.scale * self.head(self.conv(x).amax((-2, -1)).tanh())


def by_name(net):
    mark_unit_norm(net, "conv.weight", dim=1)
    mark_spectral(net, "head.weight", 0.9)
    mark_positive(net, "scale")


def by_parameter(net):
    mark_unit_norm(net.conv.weight, dim=1)
    mark_spectral(net.head.weight, 0.9)
    mark_positive(net.scale)


FORMS = {"by name": by_name, "by parameter": by_parameter}


def train(net, opt, steps=2, first=0):
    for step in range(first, first + steps):
        opt.zero_grad()
        x = gaussian(5, 2, 6, 6, dtype=torch.float32, seed=step).to(next(net.parameters()))
        net(x).square().sum().backward()
        opt.step()


def start(form="by name"):
    torch.manual_seed(0)
    net = Net()
    FORMS[form](net)
    opt = Adam(net.parameters(), lr=0.01)
    train(net, opt)
    return net, opt


def marked(net):
    net = getattr(net, "module", net)
    return {"conv": net.conv.weight, "head": net.head.weight, "scale": net.scale}


def assert_marked(net):
    assert {key: constraint_of(p) for key, p in marked(net).items()} == CONSTRAINTS


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda net: pickle.loads(pickle.dumps(net)),
    "torch.save": saved,
    "multiprocessing": sent,
    "AveragedModel": AveragedModel,
    "deepcopy of a pickle": lambda net: copy.deepcopy(pickle.loads(pickle.dumps(net))),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("way", COPIES)
def test_a_copy_is_marked(form, way):
    net, _ = start(form)
    copied = COPIES[way](net)
    assert_marked(copied)
    assert marked(copied)["scale"] is not net.scale
    opt = Adam(copied.parameters(), lr=0.01)
    train(copied, opt)
    assert check(copied, opt) == []


@pytest.mark.parametrize("form", FORMS)
def test_the_same_parameter_stays_marked(form):
    """The optimizer of the marked ones alone: torch refuses to convert the state of the others."""
    net, _ = start(form)
    opt = Adam(marked(net).values(), lr=0.01)
    train(net, opt)
    net.to(torch.float64).requires_grad_(False).requires_grad_(True)
    net.load_state_dict(copy.deepcopy(net.state_dict()))
    net.zero_grad()
    train(net, opt)
    assert_marked(net)
    assert check(net, opt) == []
    assert opt.state[net.scale]["exp_avg"].dtype == torch.float64
    net.bfloat16()
    net.zero_grad()
    train(net, opt)
    assert check(net, opt) == []


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("operation", ["setattr", "meta", "load_state_dict(assign=True)", "overwrite on conversion"])
def test_where_a_parameter_becomes_another_it_is_marked_or_reported(form, operation):
    net, opt = start(form)
    if operation == "setattr":
        net.scale = nn.Parameter(torch.tensor(1.0))
        net.conv.weight = nn.Parameter(torch.ones(4, 2, 3, 3))
        net.head.weight = nn.Parameter(torch.ones(3, 4))
    else:
        net = REPLACES[operation](net)
    problems = check(net, opt)
    kept = operation.startswith("load") and form == "by name"
    if kept:
        assert_marked(net)
    for name, shape in (("scale", "()"), ("conv.weight", "(4, 2, 3, 3)"), ("head.weight", "(3, 4)")):
        assert any(name in problem or shape in problem for problem in problems)


def test_unmarking_hands_a_parameter_back_to_torch():
    net, opt = start()
    for p in marked(net).values():
        unmark(p)
    assert check(net, opt) == []
    train(net, opt)
    assert all(constraint_of(p) is None for p in marked(net).values())
    assert float(torch.linalg.vector_norm(net.conv.weight.detach()[:, 0]) - 1) != 0


@pytest.mark.parametrize("decay", [None, 0.7])
def test_averages_stay_on_the_manifold(decay):
    net, opt = start()
    averaged, plain = AveragedModel(net, avg_fn=orthogonal_average(net, decay)), AveragedModel(net)
    for k in range(3):
        train(net, opt, 3, first=3 * k)
        averaged.update_parameters(net)
        plain.update_parameters(net)
    for model in (averaged, project_model(plain)):
        assert check(model, Adam(model.parameters())) == []
    assert_marked(averaged)


# Checkpoints.


@pytest.mark.parametrize("rule", RULES)
def test_a_resumed_run_is_the_uninterrupted_one(rule):
    """With weights_only=True: what is saved is tensors and primitives."""

    def new():
        cases = [case for name, case in OTHERS.items() if name != "geoopt spd"]
        return [parameter(case, torch.float32, seed=k) for case in cases for k in range(2)]

    whole = new()
    run(rule, whole, 6)
    first = new()
    opt = run(rule, first, 3)
    file = io.BytesIO()
    torch.save({"values": [p.detach() for p in first], "opt": opt.state_dict()}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    second = new()
    with torch.no_grad():
        for p, value in zip(second, loaded["values"], strict=True):
            p.copy_(value)
    other = build(rule, second)
    other.load_state_dict(loaded["opt"])
    run(rule, second, 3, first=3, opt=other)
    assert all(torch.equal(p, q) for p, q in zip(second, whole, strict=True))


@pytest.mark.parametrize("other", ["not marked", "another number", "another manifold"])
def test_a_checkpoint_of_other_constraints_is_refused_by_name(other):
    net, opt = start()
    opt = Adam(net.named_parameters(), lr=0.01)
    train(net, opt)
    fresh = Net()
    mark_positive(fresh, "scale")
    if other == "another number":
        mark_unit_norm(fresh, "conv.weight", dim=0)
    elif other == "another manifold":
        mark_spectral(fresh, "conv.weight")
    else:
        mark_spectral(fresh, "head.weight", 0.9)
    new = Adam(fresh.named_parameters(), lr=0.01)
    found = {"not marked": "not marked", "another number": r"UnitNorm\(dim=0\)", "another manifold": "Spectral"}[other]
    message = rf"parameter \d of group 0 \(conv.weight\), .*marked as UnitNorm\(dim=1\); here it is {found}"
    with pytest.raises(ValueError, match=message):
        new.load_state_dict(opt.state_dict())
    with pytest.raises(ValueError, match=r"parameter 0 of group 0 \(scale\), shape \(\), marked as Positive\(\)"):
        Adam(Net().named_parameters()).load_state_dict(opt.state_dict())


def test_a_checkpoint_of_torch_is_taken_over():
    """And one number a point becomes one an entry, and the other way round."""
    for second_moment in ("element", "block"):
        net, plain = Net(), Net()
        by_name(net)
        stock = torch.optim.Adam(plain.parameters(), lr=0.01)
        train(plain, stock)
        opt = Adam(net.parameters(), lr=0.01, second_moment=second_moment)
        opt.load_state_dict(stock.state_dict())
        train(net, opt)
        other = Adam(net.parameters(), lr=0.01, second_moment={"element": "block", "block": "element"}[second_moment])
        state = opt.state_dict()
        for group in state["param_groups"]:
            del group["second_moment"]
        other.load_state_dict(state)
        train(net, other)
        assert check(net, other) == []


def test_a_parameter_saved_whole_loads_with_weights_only():
    for case in OWN.values():
        p = parameter(case)
        file = io.BytesIO()
        torch.save(p, file)
        file.seek(0)
        assert constraint_of(torch.load(file, weights_only=True)) == case.manifold


# With the rest of torch.


def test_closures_schedules_clipping_and_scalers():
    net, _ = start()
    opt = SGD(net.parameters(), lr=0.1, momentum=0.9)
    schedules = [CosineAnnealingLR(opt, 10), OneCycleLR(opt, 0.1, total_steps=20)]
    scaler = torch.amp.GradScaler("cpu")

    def closure():
        opt.zero_grad()
        loss = net(torch.ones(2, 2, 6, 6)).square().sum()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 0.1)
        return loss

    for _ in range(5):
        assert float(opt.step(closure).detach()) > 0
        [schedule.step() for schedule in schedules]
        opt.zero_grad()
        scaler.scale(net(torch.ones(2, 2, 6, 6)).square().sum()).backward()
        scaler.step(opt)
        scaler.update()
    assert check(net, opt) == []
    before = [p.detach().clone() for p in net.parameters()]
    for p in net.parameters():
        p.grad = torch.full_like(p, torch.inf)
    scaler.step(opt)
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))


@pytest.mark.compiled
@pytest.mark.parametrize(("rule", "rate"), [("momentum", 1e-2), ("amsgrad", torch.tensor(1e-2))])
@pytest.mark.filterwarnings("ignore")  # of the compiler's own
def test_a_compiled_step_is_one_graph(rule, rate):
    torch._dynamo.reset()
    counters.clear()
    names = [
        "unit rows",
        "unit filters, transposed",
        "spectral wide",
        "spectral filters, transposed",
        "positive vector",
    ]
    params, expected = ([parameter(OWN[name], torch.float32) for name in names] for _ in range(2))
    opt, eager = build(rule, params), build(rule, expected)
    opt.param_groups[0]["lr"] = eager.param_groups[0]["lr"] = rate
    compiled = torch.compile(opt.step, backend="eager")
    for step in range(3):
        for ps in (params, expected):
            for index, p in enumerate(ps):
                p.grad = gaussian(*p.shape, dtype=torch.float32, seed=100 * step + index)
        compiled()
        eager.step()
    assert not counters["graph_break"]
    for p, q in zip(params, expected, strict=True):
        # Clipping without looking resolves singular values to 1e-6 of the norm, in each of three steps.
        torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-5, atol=2e-5)


def test_points_of_a_marked_parameter_lie_where_it_says():
    p = mark_manifold(nn.Parameter(gaussian(3, 4)), UnitNorm(1))
    (part,) = constraint_of(p).layouts(p.shape)
    assert torch.equal(get_points(part, p.detach()), p.detach().mT)


def test_moments_of_positive_entries_are_those_of_the_logarithm_and_come_back():
    """By the chain rule: the gradient with respect to log x is x times that with respect to x."""
    x = nn.Parameter(gaussian(3, 4).exp())
    torch_optimizer = torch.optim.Adam([x], lr=1e-2)
    x.grad = gaussian(3, 4, seed=1)
    torch_optimizer.step()
    before = {key: torch_optimizer.state[x][key].clone() for key in ("exp_avg", "exp_avg_sq")}
    opt = Adam([mark_positive(x)], lr=0.0, betas=(1 - 1e-12, 1 - 1e-12))  # a step that hardly changes the moments
    opt.load_state_dict(torch_optimizer.state_dict())
    opt.param_groups[0].update(betas=(1 - 1e-12, 1 - 1e-12), lr=0.0)
    x.grad = torch.zeros_like(x)
    opt.step()
    for key, power in (("exp_avg", 1), ("exp_avg_sq", 2)):
        torch.testing.assert_close(opt.state[x][key], before[key] * x.detach() ** power)
    unmark(x)
    opt.step()
    for key, moment in before.items():
        torch.testing.assert_close(opt.state[x][key], moment)


@pytest.mark.compiled
@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a compiler for C++")
@pytest.mark.filterwarnings("ignore")  # of the compiler's own
@pytest.mark.parametrize("rule", ["momentum", "adam"])
def test_inductor_compiles_a_step(rule):
    torch._dynamo.reset()
    eager, traced = ([mark_unit_norm(nn.Parameter(gaussian(8, 64, dtype=torch.float32)))] for _ in range(2))
    expected, opt = build(rule, eager, lr=1e-2), build(rule, traced, lr=torch.tensor(1e-2))
    step = torch.compile(opt.step)
    for k in range(3):
        give(eager, k)
        give(traced, k)
        expected.step()
        step()
    torch.testing.assert_close(traced[0].detach(), eager[0].detach(), rtol=1e-5, atol=1e-5)
