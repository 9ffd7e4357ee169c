"""Many small parameters cut in unequal blocks, in some only, or along columns: they move together, as each alone."""

import io

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import manifold_opt
from manifold_opt import constraint_of, mark_orthogonal, orthogonality_error
from manifold_opt.manifolds.layout import get_points

from ..helpers import UNMOVED, buckets_of, each, gaussian, never_read

LAYOUTS = {
    "uneven": ((16, 5), {"blocks": (4, 4, 8)}),
    "wide, square and tall": ((14, 5), {"blocks": (2, 5, 7)}),
    "one of three": ((12, 4), {"blocks": 3, "which": (1,)}),
    "columns": ((5, 15), {"blocks": 3, "dim": 1}),
    "tall columns": ((9, 8), {"blocks": 2, "dim": 1}),
    "uneven columns": ((5, 16), {"blocks": (4, 5, 7), "dim": 1}),
    "some columns": ((4, 12), {"blocks": 3, "which": (0, 2), "dim": 1}),
    "filters, uneven": ((6, 2, 2, 3), {"blocks": (1, 5)}),
}
RULES = [
    ("SGD", {}),
    ("SGD", {"momentum": 0.9, "dampening": 0.2}),
    ("Adam", {"amsgrad": True}),
    ("Adam", {"second_moment": "block"}),
    *([("Muon", {})] if hasattr(torch.optim, "Muon") else []),  # since torch 2.9
]
COUNT = 4


def whole(layout, rule):
    """A number a block has none for rows in no block: refused."""
    return not ("which" in LAYOUTS[layout][1] and rule[1].get("second_moment") == "block")


def marked(layout, dtype):
    shape, options = LAYOUTS[layout]
    exact = torch.float32 if dtype == torch.bfloat16 else dtype
    return [
        mark_orthogonal(nn.Parameter(gaussian(*shape, dtype=exact, seed=k).to(dtype)), **options) for k in range(COUNT)
    ]


def build(rule, parameters, **more):
    name, options = rule
    return getattr(manifold_opt, name)(parameters, lr=0.05, **options, **more)


def give(parameters, step):
    """Gradients; after a while one is missing."""
    for k, p in enumerate(parameters):
        p.grad = gaussian(
            *p.shape, dtype=torch.complex64 if p.is_complex() else torch.float32, seed=1000 + 100 * step + k
        ).to(p.dtype)
    if step == 2:
        parameters[1].grad = None


def state_of(opt, p):
    return {key: value.detach().clone() for key, value in opt.state[p].items() if value is not None}


CASES = [(layout, rule) for layout in LAYOUTS for rule in RULES if whole(layout, rule)]
FEW = [(layout, rule) for layout, rule in CASES if rule[0] == "Adam"]  # those with most moments


@each(
    {
        "layout, rule": CASES,
        "dtype, reads": [
            (torch.float32, True),
            (torch.float32, False),
            (torch.complex64, True),
            (torch.bfloat16, True),
        ],
    }
)
def test_gathered_parts_step_as_each_alone(layout, rule, dtype, reads, monkeypatch):
    if not reads:
        never_read(monkeypatch)
    together, alone = marked(layout, dtype), marked(layout, dtype)
    opt, each = build(rule, together), [build(rule, [p]) for p in alone]
    addresses = [p.data_ptr() for p in together]
    for k in range(5):
        give(together, k)
        give(alone, k)
        for optimizer in (opt, *each):
            optimizer.step()
    # One of them has had its first gradient later: its steps are counted apart.
    assert {len(bucket.parameters) for bucket in buckets_of(opt)} == ({1, COUNT - 1} if reads else {COUNT})
    assert addresses == [p.data_ptr() for p in together]
    eps = torch.finfo(torch.float32).eps  # products of a batch are added up in another order
    for p, q, other in zip(together, alone, each, strict=True):
        one, two = state_of(opt, p), state_of(other, q)
        values = (one["master"], two["master"]) if dtype == torch.bfloat16 else (p.data, q.data)
        torch.testing.assert_close(*values, rtol=0, atol=300 * eps)
        assert one.keys() == two.keys()
        for key, value in one.items():
            torch.testing.assert_close(value, two[key], rtol=1e-4, atol=300 * eps)
        assert orthogonality_error(p) < (0.1 if dtype == torch.bfloat16 else 40 * eps)


@each({"layout, rule": FEW}, dtype=[torch.float32, torch.bfloat16])
def test_a_resumed_run_is_the_uninterrupted_one(layout, rule, dtype):
    through = marked(layout, dtype)
    opt = build(rule, through)
    for k in range(2):
        give(through, k)
        opt.step()
    resumed = [nn.Parameter(p.detach().clone()) for p in through]
    for p, q in zip(through, resumed, strict=True):
        mark_orthogonal(q, **LAYOUTS[layout][1])
        q.data.copy_(p.data)
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    again = build(rule, resumed)
    again.load_state_dict(torch.load(file, weights_only=True))
    for k in range(2, 6):
        for parameters, optimizer in ((through, opt), (resumed, again)):
            give(parameters, k)
            optimizer.step()
    for p, q in zip(through, resumed, strict=True):
        assert torch.equal(p, q)
        one, two = state_of(opt, p), state_of(again, q)
        assert one.keys() == two.keys()
        assert all(torch.equal(value, two[key]) for key, value in one.items())


@each({"layout, rule": FEW, "dtype, reads": [(torch.float32, True), (torch.float32, False), (torch.bfloat16, True)]})
def test_a_fault_stays_in_its_block(layout, rule, dtype, reads, monkeypatch):
    """The last block of one member, or its last rows that are in none, which are torch's to spoil."""
    if not reads:
        never_read(monkeypatch)
    hurt, sane = marked(layout, dtype), marked(layout, dtype)
    optimizers = build(rule, hurt), build(rule, sane)
    for k in range(2):
        for parameters, opt in zip((hurt, sane), optimizers, strict=True):
            give(parameters, k)
            opt.step()
    before, held = hurt[3].detach().clone(), state_of(optimizers[0], hurt[3])
    for parameters, opt in zip((hurt, sane), optimizers, strict=True):
        give(parameters, 4)
        if parameters is hurt:
            hit = constraint_of(hurt[3]).layouts(hurt[3].shape)[-1]
            get_points(hit, hurt[3].grad)[-1, -1, -1] = torch.nan
        opt.step()
    for k, (p, q) in enumerate(zip(hurt, sane, strict=True)):
        if k != 3:  # products of another batch may be summed in another order
            close = {"rtol": 0.0, "atol": 16 * torch.finfo(dtype).eps}
            torch.testing.assert_close(p.detach(), q.detach(), **close)
            two = state_of(optimizers[1], q)
            for key, value in state_of(optimizers[0], p).items():
                torch.testing.assert_close(value, two[key], **close)
    assert torch.equal(get_points(hit, hurt[3].data)[-1], get_points(hit, before)[-1])
    assert not torch.equal(hurt[3], before) or get_points(hit, before).numel() == before.numel()
    for key, value in state_of(optimizers[0], hurt[3]).items():
        if value.shape == before.shape:
            assert torch.equal(get_points(hit, value)[-1], get_points(hit, held[key])[-1]), key
        elif key not in UNMOVED:
            assert torch.equal(value[-1], held[key][-1]), key
    assert optimizers[0].metrics()["skipped_blocks"] == 1


@pytest.mark.compiled
@pytest.mark.filterwarnings("ignore")  # of the compiler's own
def test_a_compiled_step_is_one_graph():
    torch._dynamo.reset()
    counters.clear()
    layouts = ["uneven", "one of three", "uneven columns"]
    together, eager = ([p for layout in layouts for p in marked(layout, torch.float32)] for _ in range(2))
    opt, other = build(RULES[2], together, capturable=True), build(RULES[2], eager)
    compiled = torch.compile(opt.step, backend="eager")
    for k in (0, 1, 3):
        give(together, k)
        give(eager, k)
        compiled()
        other.step()
    assert not counters["graph_break"]
    for p, q in zip(together, eager, strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=0, atol=1e-5)


def test_large_blocks_are_not_gathered():
    """A copy would cost more than it saves."""
    large = [mark_orthogonal(nn.Parameter(gaussian(264, 256, seed=k)), blocks=(8, 256)) for k in range(8)]
    opt = build(RULES[2], large)
    give(large, 0)
    opt.step()
    assert [len(bucket.parameters) for bucket in buckets_of(opt)] == [1] * 16
