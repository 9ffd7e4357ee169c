"""Whatever shapes, strides, blocks, dtypes, gradients and rates come: the invariants hold."""

import copy

import pytest
import torch
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st
from torch import nn

from manifold_opt import RETRACTIONS, SGD, Adam, Muon, mark_orthogonal, orthogonality_error
from manifold_opt.linalg import matrices
from manifold_opt.stiefel import geometry

from ..helpers import DTYPES, EXACT, blocks_of, gaussian

RULES = {
    "SGD": (SGD, {}),
    "momentum": (SGD, {"momentum": 0.9, "dampening": 0.1}),
    "nesterov": (SGD, {"momentum": 0.9, "nesterov": True}),
    "Adam": (Adam, {}),
    "amsgrad": (Adam, {"amsgrad": True, "maximize": True}),
    "block": (Adam, {"second_moment": "block"}),
    "Muon": (lambda params, retraction="", metric="", **options: Muon(params, **options), {}),  # noqa: ARG005
}
if not hasattr(torch.optim, "Muon"):  # before torch 2.9
    del RULES["Muon"]
examples = settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


@st.composite
def marked(draw):
    """A marked parameter: blocks along either dimension, any strides, of several dtypes and gains."""
    p, n = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    blocks = draw(st.integers(1, 5)) if draw(st.booleans()) else draw(st.sampled_from([1, 300]))
    dim, dtype = draw(st.sampled_from([0, 0, 1])), draw(st.sampled_from(DTYPES))
    gain = draw(st.sampled_from([1.0, 1.0, 0.3, 2.0350263118743896]))
    shape = (blocks * p, n) if dim == 0 else (p, blocks * n)
    value = gaussian(*shape, dtype=dtype, seed=draw(st.integers(0, 99)))
    strides = draw(st.sampled_from(["contiguous", "transposed", "sliced"]))
    if strides == "transposed" and dim == 0 and blocks == 1:
        value = value.t().contiguous().t()
    elif strides == "sliced":
        wide = torch.zeros(shape[0], 2 * shape[1], dtype=dtype)
        wide[:, : shape[1]] = value
        value = wide[:, : shape[1]]
    try:
        return mark_orthogonal(nn.Parameter(value), blocks=blocks, dim=dim, gain=gain)
    except ValueError as refusal:  # by chance, one block in many may be of deficient rank
        if "rank-deficient" not in str(refusal):
            raise
        return reject()


@st.composite
def runs(draw):
    parameters = [draw(marked()) for _ in range(draw(st.integers(1, 4)))]
    if draw(st.booleans()):  # some alike, to be gathered
        parameters += [copy.deepcopy(parameters[0]) for _ in range(3)]
    rule = draw(st.sampled_from(sorted(RULES)))
    options = {
        "lr": 10.0 ** draw(st.floats(-12, 6)),
        "retraction": draw(st.sampled_from(sorted(RETRACTIONS))),
        "metric": draw(st.sampled_from(["euclidean", "canonical"])),
        "orthogonal_lr_scale": draw(st.sampled_from([1.0, 0.1])),
    }
    scales = draw(st.lists(st.sampled_from([1.0, 1e-38, 1e-6, 1e4, 1e12, 0.0]), min_size=2, max_size=5))
    return parameters, rule, options, scales


@examples
@given(runs(), st.data())
def test_the_invariants_hold(run, data):
    parameters, rule, options, scales = run
    cls, extra = RULES[rule]
    opt = cls(parameters, **extra, **options)
    facts = [(p.data_ptr(), p.stride(), p.dtype) for p in parameters]
    for step, scale in enumerate(scales):
        before = [p.detach().clone() for p in parameters]
        for k, p in enumerate(parameters):
            gradient = (scale * gaussian(*p.shape, seed=10 * step + k)).to(p.dtype)
            poison = data.draw(st.sampled_from([None, None, float("nan"), float("inf"), 1e30, "none"]))
            if isinstance(poison, float):
                gradient[0, 0] = poison
            p.grad = None if poison == "none" else gradient
        given_gradients = [None if p.grad is None else p.grad.clone() for p in parameters]
        opt.step()
        for p, g, then, fact in zip(parameters, given_gradients, before, facts, strict=True):
            assert (p.data_ptr(), p.stride(), p.dtype) == fact
            assert g is None or torch.equal(p.grad.nan_to_num(), g.nan_to_num())
            assert bool(p.isfinite().all())
            if g is None or (rule == "SGD" and not bool(g.any())):
                assert torch.equal(p, then)
            q, n = blocks_of(p).shape[-2:]
            if options["retraction"] in EXACT:
                assert orthogonality_error(p) <= matrices.error_at_rounding(q, n, p.dtype)
            else:
                assert orthogonality_error(p) <= 1.05 * q**0.5
    assert all(bool(v.isfinite().all()) for state in opt.state.values() for v in state.values())


@examples
@given(runs())
def test_a_cut_run_is_a_whole_one(run):
    """Saved, loaded into equal parameters, and gone on with: bit for bit."""
    parameters, rule, options, scales = run
    cls, extra = RULES[rule]

    def go(params, opt, steps):
        for step in steps:
            for k, p in enumerate(params):
                p.grad = (scales[step] * gaussian(*p.shape, seed=10 * step + k)).to(p.dtype)
            opt.step()

    opt = cls(parameters, **extra, **options)
    half = len(scales) // 2
    go(parameters, opt, range(half))
    others = copy.deepcopy(parameters)
    resumed = cls(others, **extra, **options)
    resumed.load_state_dict(copy.deepcopy(opt.state_dict()))
    go(parameters, opt, range(half, len(scales)))
    go(others, resumed, range(half, len(scales)))
    same_layout = all(a.stride() == b.stride() for a, b in zip(parameters, others, strict=True))  # and so bits
    if options["retraction"] in EXACT and same_layout:  # the others may be put back where they are found
        for a, b in zip(parameters, others, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("rule", RULES)
@examples
@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 4), st.floats(1e-6, 0.3))
def test_blocks_are_parameters_of_their_own(rule, p, n, blocks, lr):
    cls, extra = RULES[rule]
    value = torch.cat([geometry.random(p, n, dtype=torch.float64) for _ in range(blocks)])
    stack = mark_orthogonal(nn.Parameter(value.clone()), blocks=blocks)
    apart = [mark_orthogonal(nn.Parameter(part.clone()), blocks=1) for part in value.split(p)]
    together, single = cls([stack], lr=lr, **extra), cls(apart, lr=lr, **extra)
    for step in range(3):
        stack.grad = gaussian(blocks * p, n, seed=step)
        for weight, part in zip(apart, stack.grad.split(p), strict=True):
            weight.grad = part.clone()
        together.step()
        single.step()
    torch.testing.assert_close(stack.detach(), torch.cat([w.detach() for w in apart]), rtol=0, atol=1e-10)
