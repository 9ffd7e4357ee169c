"""How many operations and calls a step takes: exact, unlike a time, and most of the time of a small step."""

import sys

import geoopt
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from manifold_opt import (
    RETRACTIONS,
    SGD,
    Adam,
    constraint_of,
    mark_manifold,
    mark_orthogonal,
    mark_positive,
    mark_spectral,
    mark_unit_norm,
)
from manifold_opt.constraints.tag import set_constraint
from manifold_opt.optim import base as step_module
from manifold_opt.stiefel.rotation import CORRECTION_INTERVAL

from ..helpers import gaussian, point

CORRECTION = 7  # operations more where the error of square blocks is measured


class Operations(TorchDispatchMode):
    """Counts the operations of torch, views included, and those that launch something on a device."""

    def __init__(self):
        super().__init__()
        self.count = self.launching = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        self.launching += not func.is_view and "profiler" not in str(func) and "empty" not in str(func)
        return func(*args, **(kwargs or {}))


def warm(shape, blocks=1, optimizer=Adam, marked=True, **options):
    """An optimizer of one parameter after some steps, and a function that gives it the next gradient."""
    rows, columns = shape
    weight = nn.Parameter(
        torch.cat([point(rows // blocks, columns, dtype=torch.float32, seed=k) for k in range(blocks)])
    )
    if marked:
        mark_orthogonal(weight, blocks=blocks)
    opt = optimizer([weight], **{"lr": 1e-3, **options})

    def give(step):
        weight.grad = gaussian(*shape, dtype=torch.float32, seed=step)

    for k in range(2 * CORRECTION_INTERVAL[torch.float32]):
        give(k)
        opt.step()
    give(100)
    return opt, give


def operations(opt):
    with Operations() as counted:
        opt.step()
    return counted


def calls(opt):
    """Calls of functions, those of Python and those of C."""
    count = 0

    def profile(frame, event, argument):  # noqa: ARG001
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(profile)
    try:
        opt.step()
    finally:
        sys.setprofile(None)
    return count


OTHER = not torch.__version__.startswith("2.13.")  # the bounds are for torch 2.13


def more_calls_of_torch():
    """By how many torch.optim.Adam makes more here than with the versions of Python and torch that bounds are for."""
    opt, _ = warm((16, 16), optimizer=torch.optim.Adam, marked=False)
    return max(0, calls(opt) - 111)


def momentum(params, **options):
    return SGD(params, momentum=0.9, **options)


CASES = {  # operations and calls, at most
    "square": (((16, 16),), {}, 22, 103),
    "square, polar": (((16, 16),), {"retraction": "polar"}, 24, 106),
    "square, qr": (((16, 16),), {"retraction": "qr"}, 29, 109),
    "square, cayley": (((16, 16),), {"retraction": "cayley"}, 24, 106),
    "square, exp": (((16, 16),), {"retraction": "exp"}, 24, 108),
    "square, momentum": (((16, 16),), {"optimizer": momentum}, 16, 87),
    "square, one second moment per block": (((16, 16),), {"second_moment": "block"}, 28, 108),
    "wide": (((16, 64),), {}, 37, 117),
    "tall": (((96, 24),), {}, 37, 117),
    "three gates": (((192, 64), 3), {}, 24, 105),
    "three gates, longer steps": (((192, 64), 3), {"lr": 1e-2}, 30, 111),
    "unmarked": (((16, 16),), {"marked": False}, 9, 108),
}


@pytest.mark.parametrize("case", CASES)
def test_a_common_step_takes_few_operations_and_calls(case):
    arguments, options, most_operations, most_calls = CASES[case]
    opt, give = warm(*arguments, **options)
    assert operations(opt).count <= most_operations
    give(101)
    assert calls(opt) <= most_calls + more_calls_of_torch() + 8 * OTHER


LAYERS = ["linalg", "stiefel", "manifolds", "constraints", "optim"]


def test_a_step_enters_ten_modules_and_calls_downwards():
    """docs/contributing.md lists them in order."""
    gru = nn.GRU(16, 16)
    mark_orthogonal(gru.weight_hh_l0, blocks=3)
    opt = Adam([gru.weight_hh_l0], lr=1e-3)
    entered, upwards = set(), []

    def layer(frame):
        name = frame.f_globals.get("__name__", "").split(".")
        return LAYERS.index(name[1]) if name[0] == "manifold_opt" and name[1] in LAYERS else None

    def profile(frame, event, argument):  # noqa: ARG001
        if event == "call" and layer(frame) is not None:
            entered.add(frame.f_globals["__name__"])
            if layer(frame.f_back) is not None and layer(frame) > layer(frame.f_back):
                upwards.append((frame.f_back.f_code.co_name, frame.f_code.co_name))

    for step in range(6):
        gru.weight_hh_l0.grad = gaussian(48, 16, dtype=torch.float32, seed=step)
        sys.setprofile(profile if step == 5 else None)
        try:
            opt.step()
        finally:
            sys.setprofile(None)
    assert len(entered) <= 10
    assert upwards == []


OTHERS = {  # operations, at most; views of geoopt's functions included
    "unit norm": (lambda x: mark_unit_norm(nn.Parameter(x)), 25),
    "unit norm of filters": (lambda x: mark_unit_norm(nn.Parameter(x.view(8, 4, 4))), 29),
    "positive": (lambda x: mark_positive(nn.Parameter(x.exp())), 18),
    "geoopt's sphere": (lambda x: mark_manifold(nn.Parameter(x), geoopt.Sphere()), 40),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_step_on_other_manifolds_takes_few_operations(name):
    make, most = OTHERS[name]
    p = make(gaussian(8, 16, dtype=torch.float32))
    opt = Adam([p], lr=1e-3)
    for step in range(3):
        p.grad = gaussian(*p.shape, dtype=torch.float32, seed=step)
        opt.step() if step < 2 else None
    assert operations(opt).count <= most + OTHER


@pytest.mark.parametrize(("lr", "usual", "mean"), [(1e-4, 13, 18), (1e-3, 28, 36)])
def test_steps_inside_the_spectral_ball_take_few_operations(lr, usual, mean):
    """Half of the way to the boundary. Longer steps are measured more closely, and the spectrum more often."""
    p = mark_spectral(nn.Parameter(gaussian(512, 512, dtype=torch.float32) / 45.2), 2.0)
    opt = Adam([p], lr=lr)
    counts = []
    for step in range(53):
        p.grad = gaussian(*p.shape, dtype=torch.float32, seed=step)
        counts.append(operations(opt).count)
    assert sorted(counts)[len(counts) // 2] <= usual + OTHER
    assert sum(counts[3:]) <= 50 * mean


def test_the_error_of_square_blocks_is_measured_in_every_fourth_step():
    opt, give = warm((16, 16))
    counts = []
    for step in range(8):
        give(200 + step)
        counts.append(operations(opt).count)
    usual = min(counts)
    assert counts == [usual, usual, usual, max(counts)] * 2
    assert max(counts) - usual <= CORRECTION


LAUNCHES = {  # of square and of rectangular blocks, as docs/benchmarks.md has them
    "orthographic": (49, 64),
    "polar": (51, 64),
    "cayley": (49, 89),
    "exp": (54, 91),
    "qr": (46, 62),
    "cayley_iterative": (106, 132),
    "orthogonalizer": (92, 101),
}


@pytest.mark.parametrize("square", [True, False])
@pytest.mark.parametrize("retraction", RETRACTIONS)
def test_a_step_that_reads_nothing_launches_few_kernels(retraction, square, monkeypatch):
    """On the meta device, as on an accelerator: steps are counted on the host, and in every fourth the error goes."""
    monkeypatch.setattr(
        step_module, "restore_overwritten", lambda *_: None
    )  # looks at weights written to from outside only
    weight = nn.Parameter(torch.eye(64).repeat(3, 1) if square else torch.eye(64)[:16])
    mark_orthogonal(weight, blocks=3 if square else 1)
    twin = nn.Parameter(weight.detach().to("meta"))
    set_constraint(twin, constraint_of(weight))
    opt = Adam([twin], retraction=retraction)
    counts = []
    for _ in range(8):
        twin.grad = torch.empty_like(twin)
        counts.append(operations(opt).launching)
    most = LAUNCHES[retraction][not square]
    more = CORRECTION + 2 if square and RETRACTIONS[retraction].rotation else 0
    assert counts[4:] == [most, most, most, most + more]


@pytest.mark.parametrize("retraction", RETRACTIONS)
def test_as_many_operations_for_a_thousand_blocks(retraction):
    counts = []
    for blocks in (2, 1000):
        opt, _ = warm((16 * blocks, 16), blocks, retraction=retraction)
        counts.append(operations(opt).count)
    assert counts[0] == counts[1]


@pytest.mark.parametrize("groups", [1, 30])
def test_groups_of_equal_options_are_stepped_together(groups):
    weights = [mark_orthogonal(nn.Parameter(point(8, 8, dtype=torch.float32, seed=k))) for k in range(30)]
    opt = Adam([{"params": weights[k::groups]} for k in range(groups)], lr=1e-3)
    counts = []
    for step in range(6):
        for group in opt.param_groups:
            group["lr"] = 1e-3 * (1 + step)  # as a schedule sets it in all of them
        for k, weight in enumerate(weights):
            weight.grad = gaussian(8, 8, dtype=torch.float32, seed=100 * step + k)
        counts.append(operations(opt).count)
    assert counts[1] < 2 * 28
    assert counts[1] == counts[2] == counts[4]
