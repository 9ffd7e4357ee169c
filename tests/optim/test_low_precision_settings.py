"""Around a step of parameters in bfloat16 and float16: memory, settings, gradient scalers, compilers."""

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from manifold_opt import mark_orthogonal

from ..helpers import UNMOVED, Memory, gaussian, point
from .test_low_precision import LOW, RULES, assert_within, give, parameter, run, twin_of


@pytest.mark.parametrize("dtype", LOW)
def test_memory_is_one_float32_copy_and_the_moments(dtype):
    """Twelve bytes an entry beside its own two; and a step of a large parameter takes no more than in float32."""
    weight = mark_orthogonal(nn.Parameter(gaussian(600, 200, dtype=torch.float32).to(dtype)), 3)
    twin = twin_of(weight)
    peaks = []
    for p in (weight, twin):
        opt = RULES["Adam"]([p])
        run([p], opt, 2)
        with Memory() as memory:
            opt.step()
        peaks.append(memory.peak)
        held = sum(value.nbytes for key, value in opt.state[p].items() if key not in UNMOVED)
        assert held == p.numel() * (12 if p is weight else 8)
    assert peaks[0] <= peaks[1] + 600 * 200 * 4  # the gradient in float32


@pytest.mark.compiled
@pytest.mark.filterwarnings("ignore")  # of the compiler's own
def test_a_compiled_step_is_one_graph():
    torch._dynamo.reset()
    counters.clear()
    marks = ("gates", "wide", "uneven", "filters")
    weights, again = ([parameter(mark, torch.bfloat16) for mark in marks] for _ in range(2))
    opt, eager = RULES["Adam"](weights, lr=1e-3), RULES["Adam"](again, lr=1e-3)
    compiled = torch.compile(opt.step, backend="eager")
    for step in range(3):
        give(weights, step)
        give(again, step)
        compiled()
        eager.step()
    assert not counters["graph_break"]
    for p, other in zip(weights, again, strict=True):
        assert_within(opt.state[p]["master"], eager.state[other]["master"], 1e-5)


def test_gradients_are_unscaled_in_float32():
    """Of a scale that float16 does not know."""
    weight, other = parameter("gates", torch.float16), parameter("gates", torch.float16)
    opt, plain = RULES["Adam"]([weight]), RULES["Adam"]([other])
    opt.grad_scale, opt.found_inf = torch.tensor(2.0**20), torch.tensor(0.0)
    for step in range(3):
        give([weight], step)
        other.grad = weight.grad.clone()
        opt.step()
        plain.step()
    torch.testing.assert_close(
        opt.state[weight]["exp_avg"] * 2**20, plain.state[other]["exp_avg"], rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize("rule", ["momentum", "Adam", "Adam block"])
@pytest.mark.parametrize("setting", ["autocast", "medium"])
def test_settings_around_a_step_change_no_bit(rule, setting):
    results = []
    for changed in (False, True):
        weight = mark_orthogonal(nn.Parameter(point(256, 256).bfloat16()))
        opt = RULES[rule]([weight])
        try:
            if changed and setting == "medium":
                torch.set_float32_matmul_precision("medium")
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=changed and setting == "autocast"):
                for step in range(3):
                    weight.grad = gaussian(256, 256, seed=step).bfloat16()
                    opt.step()
        finally:
            torch.set_float32_matmul_precision("highest")
        results.append((weight.detach(), opt.state[weight]["master"]))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
