"""Entries that other code keeps in an optimizer's state are its own, whatever their shape."""

import copy

import pytest
import torch
from torch import nn

from manifold_opt import SGD, Adam, AdamW, check, mark_orthogonal, mark_unit_norm, orthogonality_error, unmark

from ..helpers import gaussian, pairs

RULES = {
    "SGD": lambda params: SGD(params, lr=0.01, momentum=0.9),
    "Adam": lambda params: Adam(params, lr=0.01),
    "AdamW block": lambda params: AdamW(params, lr=0.01, second_moment="block"),
}
ENTRIES = {
    "z": lambda p: p.detach().clone(),  # of ScheduleFree, a point that the weight is interpolated from
    "old_p": lambda p: p.detach().clone().double(),  # of SAM
    "of another shape": lambda _: torch.arange(5.0),
    "of another dtype": lambda p: torch.zeros(p.shape, dtype=torch.int64),
    "not finite": lambda p: torch.full_like(p, torch.nan),
    "no tensor": lambda _: {"name": "weight"},
}


def step(opt, params, seed=0):
    for k, p in enumerate(params):
        p.grad = gaussian(*p.shape, seed=seed + k).to(p.dtype)
    opt.step()


def entries(opt, params):
    return [{key: opt.state[p][key] for key in ENTRIES} for p in params]


def assert_untouched(opt, params, before, copies):
    for now, then, copied in zip(entries(opt, params), before, copies, strict=True):
        for key in ENTRIES:
            assert now[key] is then[key]
            if isinstance(now[key], torch.Tensor):
                assert torch.equal(now[key].nan_to_num(), copied[key].nan_to_num())


@pairs(dtype=[torch.float32, torch.bfloat16], mark=[mark_orthogonal, mark_unit_norm], rule=RULES)
def test_other_entries_are_left_alone(rule, mark, dtype):
    """While the weight waits for a gradient, when it is marked, when it steps, when it is unmarked."""
    params = [nn.Parameter(gaussian(4, 4, seed=k).to(dtype)) for k in range(2)]
    opt = RULES[rule](params)
    step(opt, params[1:])  # by torch's own step; the first parameter has no gradient yet
    for p in params:
        opt.state[p].update({key: make(p) for key, make in ENTRIES.items()})
    before = entries(opt, params)
    copies = copy.deepcopy(before)
    for p in params:
        mark(p)
    for seed in (1, 2):
        step(opt, params, seed)
        assert_untouched(opt, params, before, copies)
    assert check(nn.ParameterList(params), opt) == []
    for p in params:
        unmark(p)
    step(opt, params, 3)
    assert_untouched(opt, params, before, copies)


@pytest.mark.parametrize("rule", RULES)
def test_other_entries_are_loaded_as_torch_loads_them(rule):
    """In the dtype of the parameter, while our own moments of a bfloat16 one stay float32."""
    weight = mark_orthogonal(nn.Parameter(gaussian(4, 4).bfloat16()))
    opt = RULES[rule]([weight])
    step(opt, [weight])
    opt.state[weight]["z"] = weight.detach().clone()
    resumed = RULES[rule]([weight])
    resumed.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert resumed.state[weight]["z"].dtype == torch.bfloat16
    assert {resumed.state[weight][key].dtype for key in opt._algorithm.state_keys if key in opt.state[weight]} == {
        torch.float32
    }


def test_a_point_kept_by_a_wrapper_is_no_moment():
    """As ScheduleFreeWrapper keeps one: taken for a moment it was turned, and moved the weight by 0.8 at lr 1e-9."""
    weight = mark_orthogonal(nn.Parameter(gaussian(6, 6)))
    start = weight.detach().clone()
    opt = SGD([weight], lr=1e-9)
    opt.state[weight]["z"] = weight.detach().clone()
    for k in range(3):
        if k:
            weight.grad = gaussian(6, 6, seed=k)
        opt.step()
        weight.data.copy_(weight.detach().lerp(opt.state[weight]["z"], 0.5))
    torch.testing.assert_close(weight.detach(), start, rtol=0, atol=1e-7)
    assert orthogonality_error(weight) < 1e-6
