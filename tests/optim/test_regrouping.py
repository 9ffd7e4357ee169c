"""Groups whose parameters are moved, reordered and handed on by hand: state stays with its parameter, held as it is."""

import copy
import io
import pickle
import random

import pytest
import torch
from torch import nn

import manifold_opt
from manifold_opt import SGD, Adam, AdamW, mark_orthogonal, mark_unit_norm, orthogonality_error, unmark
from manifold_opt.optim.engine import grouping, plan

from ..helpers import gaussian, pairs

RULES = {
    "SGD": lambda params: SGD(params, lr=0.05, momentum=0.9),
    "Adam": lambda params: Adam(params, lr=0.05),
    "Adam block": lambda params: Adam(params, lr=0.05, second_moment="block"),
}


def parameters(count=3):
    free = [nn.Parameter(gaussian(3, seed=9))]
    return free + [mark_orthogonal(nn.Parameter(gaussian(4, 4, seed=k))) for k in range(count)]


def steps(opt, params, first, count=2):
    for step in range(first, first + count):
        for k, p in enumerate(params):
            p.grad = gaussian(*p.shape, seed=100 * step + k).to(p.dtype)
        opt.step()


def assert_alike(ours, theirs):
    """But for the order in which batches of another size add up."""
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=0, atol=1e-12)


def moved(opt):
    opt.param_groups[0]["params"].append(opt.param_groups[1]["params"].pop(0))


def reversed_groups(opt):
    opt.param_groups.reverse()


def reversed_members(opt):
    opt.param_groups[1]["params"].reverse()


def inserted(opt):
    opt.param_groups[1]["params"].insert(0, nn.Parameter(torch.zeros(2)))


def removed(opt):
    del opt.param_groups[1]["params"][0]


def copied(opt, params):
    return copy.deepcopy((opt, params))


def pickled(opt, params):
    return pickle.loads(pickle.dumps((opt, params)))


def refused(opt, params):
    """A step that raises."""
    params[-1].grad = torch.zeros(4, 4).to_sparse().double()
    with pytest.raises(RuntimeError, match="sparse"):
        opt.step()
    return opt, params


def saved(opt, params):
    """To new parameters, in the order of the groups as they are now."""
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    again = [nn.Parameter(p.detach().clone()) for p in params]
    for p, q in zip(again, params, strict=True):
        if manifold_opt.constraint_of(q) is not None:
            mark_orthogonal(p)
    twin = {id(q): p for p, q in zip(again, params, strict=True)}
    groups = [
        {"params": [twin.get(id(q), nn.Parameter(torch.zeros(2))) for q in group["params"]]}
        for group in opt.param_groups
    ]
    resumed = type(opt)(groups, lr=1.0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    return resumed, again


@pairs(
    rule=RULES,
    then=[None, copied, pickled, refused, saved],
    edit=[moved, reversed_groups, reversed_members, inserted, removed],
)
def test_state_stays_with_its_parameter(edit, then, rule):
    if (edit, then) == (removed, saved):
        pytest.skip("torch saves no state of what is in no group")
    ours, theirs = parameters(), parameters()
    opt = RULES[rule]([{"params": ours[:1]}, {"params": ours[1:]}])
    each = [RULES[rule]([p]) for p in theirs]
    steps(opt, ours, 0)
    for k, other in enumerate(each):
        for step in range(2):
            theirs[k].grad = gaussian(*theirs[k].shape, seed=100 * step + k)
            other.step()
    edit(opt)
    if then is not None:
        opt, ours = then(opt, ours)
    steps(opt, ours, 2)
    for k, other in enumerate(each):
        if edit is removed and k == 1:
            continue
        for step in (2, 3):
            theirs[k].grad = gaussian(*theirs[k].shape, seed=100 * step + k)
            other.step()
    assert_alike(ours, theirs)


@pytest.mark.parametrize("seed", range(12))
def test_whatever_is_done_to_groups_each_moves_as_alone(seed):
    """Members of some batches leave, come back, or are without gradient for a while."""
    dice = random.Random(seed)
    shapes = [dice.choice([(4, 4), (4, 4), (3, 6), (8, 4)]) for _ in range(8)]
    ours = [nn.Parameter(gaussian(*shape, seed=k)) for k, shape in enumerate(shapes)]
    for p in ours:
        chance = dice.random()
        if chance < 0.7:
            mark_orthogonal(p, blocks=2 if p.shape[0] == 8 else 1)
        elif chance < 0.85:
            mark_unit_norm(p)
    theirs = copy.deepcopy(ours)
    rule = RULES[dice.choice(list(RULES))]
    opt, each = rule([{"params": ours[:3]}, {"params": ours[3:6]}, {"params": ours[6:]}]), [rule([p]) for p in theirs]
    for step in range(10):
        group, other = dice.choice(opt.param_groups), dice.choice(opt.param_groups)
        what = dice.random()
        if what < 0.2:
            opt.param_groups.reverse()
        elif what < 0.5 and group["params"]:
            other["params"].append(group["params"].pop(dice.randrange(len(group["params"]))))
        elif what < 0.6:
            group["params"].reverse()
        elif what < 0.7:
            opt, ours = copy.deepcopy((opt, ours))
        for k, (p, q) in enumerate(zip(ours, theirs, strict=True)):
            given = dice.random() > 0.25
            p.grad = gaussian(*p.shape, seed=100 * step + k) if given else None
            q.grad = p.grad.clone() if given else None
        for one in (opt, *each):
            one.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=0, atol=1e-8)  # Adam's quotient magnifies


def test_a_parameter_that_is_moved_and_unmarked_is_torchs():
    """Its momentum, in torch's coordinates again, is what torch goes on with."""
    ours = parameters()
    opt = RULES["SGD"]([{"params": ours[:1]}, {"params": ours[1:]}])
    steps(opt, ours, 0)
    moved(opt)
    unmark(ours[1])
    theirs = nn.Parameter(ours[1].detach().clone())
    torchs = torch.optim.SGD([theirs], lr=0.05, momentum=0.9)
    framed = copy.deepcopy(opt)
    steps(opt, ours, 2, 1)
    moment = opt.state[ours[1]]["momentum_buffer"] - ours[1].grad  # 0.9 times what it was
    torchs.state[theirs] = {"momentum_buffer": moment / 0.9}
    theirs.grad = ours[1].grad.clone()
    torchs.step()
    torch.testing.assert_close(ours[1].detach(), theirs.detach(), rtol=0, atol=1e-12)
    assert not torch.allclose(framed.state[framed.param_groups[0]["params"][1]]["momentum_buffer"], moment / 0.9)


@pytest.mark.parametrize("rule", RULES)
def test_groups_of_another_optimizer_are_options_and_no_more(rule):
    params = parameters()
    opt = RULES[rule](params)
    steps(opt, params, 0)
    again = RULES[rule]([{**group, "params": params[2:3]} for group in opt.param_groups])
    again.add_param_group({**opt.param_groups[0], "params": [params[3]]})
    copy.deepcopy(again).state_dict()
    steps(again, params, 5)
    assert max(map(orthogonality_error, params[1:])) < 1e-12


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("stepped", [False, True])
def test_options_of_one_run_and_state_of_another(rule, stepped):
    """A state says itself how it is held, whatever the groups beside it say."""
    params, others = parameters(), parameters()
    opt, new = RULES[rule](params), RULES[rule](others)
    steps(opt, params, 0)
    steps(new, others, 0)
    new = new if stepped else RULES[rule](others)
    for group in (*new.param_groups, *opt.param_groups):
        group["lr"] = 0.01
    new.load_state_dict(copy.deepcopy(opt.state_dict()) | {"param_groups": new.state_dict()["param_groups"]})
    steps(opt, params, 2)
    steps(new, others, 2)
    assert_alike(others, params)


@pytest.mark.parametrize("rule", ["SGD", "Adam"])
def test_a_state_of_torchs_beside_groups_of_ours(rule):
    """Is taken as one beside torch's own groups, which say nothing."""
    free = [nn.Parameter(p.detach().clone()) for p in parameters()]
    torchs = getattr(torch.optim, rule)(free, **({"momentum": 0.9} if rule == "SGD" else {}))
    steps(torchs, free, 0)
    ends = []
    for mixed in (False, True):
        params = parameters()
        opt = RULES[rule](params)
        if mixed:
            steps(opt, params, 5, 1)
            with torch.no_grad():
                for p, q in zip(params, parameters(), strict=True):
                    p.copy_(q)
        groups = {"param_groups": opt.state_dict()["param_groups"]}
        opt.load_state_dict(copy.deepcopy(torchs.state_dict()) | groups)
        steps(opt, params, 2)
        ends.append(params)
    assert_alike(*ends)


@pytest.mark.parametrize("rule", ["SGD", "Adam"])
def test_a_state_of_torchs_waits_for_its_gradient(rule):
    """It is taken over once, though a step has gone by in which only the others had gradients."""
    free = [nn.Parameter(p.detach().clone()) for p in parameters()]
    torchs = getattr(torch.optim, rule)(free, **({"momentum": 0.9} if rule == "SGD" else {}))
    steps(torchs, free, 0)
    ends = []
    for waits in (False, True):
        params = parameters()
        opt = RULES[rule](params)
        opt.load_state_dict(copy.deepcopy(torchs.state_dict()))
        if waits:
            for k in (0, 2, 3):
                params[k].grad = gaussian(*params[k].shape, seed=7 + k)
            opt.step()
        params[1].grad = gaussian(4, 4, seed=5)
        opt.step()
        ends.append(params[1].detach())
    torch.testing.assert_close(*ends, rtol=0, atol=1e-12)


@pytest.mark.parametrize("earlier", [False, True])
def test_a_state_held_under_a_constraint_is_refused_where_there_is_no_mark(earlier):
    """Also one of a version that had the constraint in the groups, beside groups that do not name it."""
    params = parameters()
    opt = RULES["Adam"](params)
    steps(opt, params, 0)
    free = [nn.Parameter(p.detach().clone()) for p in params]
    new = RULES["Adam"](free)
    checkpoint = opt.state_dict() | {"param_groups": new.state_dict()["param_groups"]}
    if earlier:
        for state in checkpoint["state"].values():
            if "constrained" in state:
                state["constrained"] = torch.ones(())
    match = (
        "under a constraint, which the groups beside it do not name" if earlier else r"marked as Orthogonal\(blocks=1"
    )
    with pytest.raises(ValueError, match=match):
        new.load_state_dict(checkpoint)
    assert not new.state


def test_a_group_says_whether_its_decay_is_decoupled():
    ours, theirs = (nn.Parameter(torch.ones(3, dtype=torch.float64)) for _ in range(2))
    made = []
    for cls, p in ((AdamW, ours), (torch.optim.AdamW, theirs)):
        opt = cls([{"params": [p], "decoupled_weight_decay": False}], weight_decay=0.3, lr=0.1)
        p.grad = torch.tensor([1.0, -0.1, 0.0], dtype=torch.float64)
        opt.step()
        made.append(p.detach())
    assert torch.equal(*made)


def test_another_shape_of_as_many_entries_is_another_shape():
    weight = mark_orthogonal(nn.Parameter(gaussian(4, 9)))
    opt = SGD([weight], lr=0.1)
    weight.grad = gaussian(4, 9, seed=2)
    opt.step()
    weight.grad = None
    weight.data = mark_orthogonal(nn.Parameter(gaussian(12, 3)), blocks=1).detach()
    weight.grad = gaussian(12, 3, seed=3)
    opt.step()
    assert orthogonality_error(weight) < 1e-13


def test_what_is_no_group_is_refused_as_by_torch():
    weight = mark_orthogonal(nn.Parameter(torch.eye(3)))
    for cls in (Adam, torch.optim.Adam):
        with pytest.raises(TypeError, match="must be a dict"):
            cls([{"params": [weight]}, 5])


def test_groups_that_differ_in_an_option_of_an_added_retraction_are_stepped_apart(monkeypatch):
    """Such an option is in the groups, and not among the defaults of the optimizer."""
    for module in (grouping, plan):
        monkeypatch.setattr(module, "RETRACTION_OPTIONS", ("metric", "shear"))
    params = parameters(4)[1:]
    opt = Adam([{"params": [p], "shear": shear} for p, shear in zip(params, (0.0, 0.9, 0.9, 0.0), strict=True)])
    assert grouping.first_equal_groups(opt) == [0, 1, 1, 0]
    steps(opt, params, first=0)
    before = opt._engine.plan
    opt.param_groups[1]["shear"] = 0.0
    steps(opt, params, first=2, count=1)
    assert opt._engine.plan is not before
