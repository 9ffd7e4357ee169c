"""What goes wrong is survived, counted, and where asked for raised, with nothing changed."""

import copy
import math

import pytest
import torch
from torch import nn

import manifold_opt
from manifold_opt import RETRACTIONS, SGD, Adam, mark_orthogonal, orthogonality_error
from manifold_opt.linalg import matrices, products
from manifold_opt.stiefel import geometry

from ..helpers import DTYPES, EXACT, Memory, each, gaussian, never_read, pairs, point
from ..reference import loop as reference

RULES = {
    "SGD": lambda p, **o: SGD(p, **{"lr": 0.01, **o}),
    "momentum": lambda p, **o: SGD(p, momentum=0.9, **{"lr": 0.01, **o}),
    "Adam": lambda p, **o: Adam(p, **{"lr": 0.01, **o}),
    "Adam block": lambda p, **o: Adam(p, second_moment="block", **{"lr": 0.01, **o}),
}


def net(dtype=torch.float32):
    """Two groups: a marked parameter of three blocks and a bias; another marked one, wide, and a matrix."""
    stack = nn.Parameter(torch.cat([point(5, 5, dtype=dtype, seed=k) for k in range(3)]))
    wide = nn.Parameter(point(3, 7, dtype=dtype))
    mark_orthogonal(stack, blocks=3)
    mark_orthogonal(wide)
    return [[stack, nn.Parameter(torch.zeros(4, dtype=dtype))], [wide, nn.Parameter(torch.ones(2, 2, dtype=dtype))]]


def give(groups, seed):
    for k, p in enumerate(p for group in groups for p in group):
        p.grad = gaussian(*p.shape, dtype=p.dtype, seed=10 * seed + k)


def everything(opt):
    """All that a step may change, as it is now."""
    values = [p.detach().clone() for group in opt.param_groups for p in group["params"]]
    return values, copy.deepcopy(opt.state_dict())


def assert_unchanged(opt, before):
    values, state = everything(opt)
    assert all(torch.equal(a, b) for a, b in zip(values, before[0], strict=True))
    assert state["param_groups"] == before[1]["param_groups"]
    assert state["state"].keys() == before[1]["state"].keys()
    for index, entries in before[1]["state"].items():
        for key, value in entries.items():
            now = state["state"][index][key]
            assert torch.equal(now, value) if isinstance(value, torch.Tensor) else now == value


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("fault", [float("nan"), float("inf"), 1e30])
def test_skipped_blocks_are_counted(rule, fault):
    groups = net()
    opt = RULES[rule]([{"params": group} for group in groups])
    for step in range(4):
        give(groups, step)
        if step >= 2:
            groups[0][0].grad[7, 2] = fault
        if step == 3:
            groups[1][0].grad[0, 0] = fault
        opt.step()
    metrics = opt.metrics()
    assert metrics["skipped_blocks"] == 3
    assert metrics["clamped_steps"] == 0
    assert metrics["orthogonality_error"] < 1e-5


def test_metrics_by_hand():
    """W = I, G = [[0, 1], [0, 0]]: the tangent is its skew part, of norm 1/sqrt(2)."""
    weight = mark_orthogonal(nn.Parameter(torch.eye(2)))
    opt = SGD([weight], lr=0.1)
    counts = {"skipped_blocks": 0.0, "clamped_steps": 0.0}
    nan = pytest.approx(math.nan, nan_ok=True)
    nothing = {"manifold_error": nan, "tangent_norm": nan, **counts}  # no other manifold, and no gradient yet
    assert opt.metrics() == {"marked_parameters": 1.0, "orthogonality_error": 0.0, **nothing}
    weight.grad = torch.tensor([[0.0, 1.0], [0.0, 0.0]])
    assert opt.metrics()["tangent_norm"] == pytest.approx(0.5**0.5)
    weight.grad[0, 0] = torch.nan
    assert math.isnan(opt.metrics()["tangent_norm"])
    with torch.no_grad():
        weight.mul_(2.0)
    assert opt.metrics()["orthogonality_error"] == pytest.approx(3 * 2**0.5)
    opt.zero_grad()
    assert math.isnan(opt.metrics()["tangent_norm"])
    unmarked = SGD([nn.Parameter(torch.eye(2))], lr=0.1).metrics()
    assert unmarked == {"marked_parameters": 0.0, "orthogonality_error": nan, **nothing}
    assert not unmarked["orthogonality_error"] < 1e-5


@each(rule=RULES, retraction=RETRACTIONS)
def test_weights_that_are_not_finite_spoil_no_others(rule, retraction):
    """A NaN written through ``.data``, where nobody is told: one entry stays one, its block stays and is counted."""
    runs = []
    for spoilt in (False, True):
        weight = mark_orthogonal(
            nn.Parameter(torch.cat([point(5, 5, dtype=torch.float32, seed=k) for k in range(3)])), blocks=3
        )
        opt = RULES[rule]([weight], retraction=retraction)
        for step in range(4):
            if spoilt and step == 2:
                weight.data[7, 3] = torch.nan
                before = weight.detach().clone()
            give([[weight]], step)
            opt.step()
        runs.append(weight.detach())
    sound, spoilt = runs
    for rows in (slice(5), slice(10, None)):  # products of another batch may be summed in another order
        torch.testing.assert_close(sound[rows], spoilt[rows], rtol=0, atol=1e-6)
    torch.testing.assert_close(spoilt[5:10], before[5:10], rtol=0, atol=0, equal_nan=True)
    assert opt.metrics()["skipped_blocks"] == 2


@pytest.mark.parametrize("rule", RULES)
def test_weights_that_cannot_be_put_back_are_an_error_that_changes_nothing(rule):
    groups = net()
    opt = RULES[rule]([{"params": group} for group in groups])
    with torch.no_grad():
        groups[1][0][0, 0] = torch.nan
    give(groups, 0)
    before = everything(opt)
    with pytest.raises(ValueError, match="entries that are not finite"):
        opt.step()
    groups[1][0].data[0, 0] = before[0][2][0, 0] = 0  # a NaN equals nothing
    assert_unchanged(opt, before)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("late", [False, True])
def test_a_fault_can_be_made_an_error_that_changes_nothing(rule, late):
    groups = net()
    opt = RULES[rule]([{"params": group} for group in groups], nonfinite="raise")
    for step in range(3 if late else 0):
        give(groups, step)
        opt.step()
    give(groups, 5)
    groups[1][0].grad[1, 1] = float("nan")
    before = everything(opt)
    with pytest.raises(
        FloatingPointError, match=r"block 0 of a marked parameter of shape \(3, 7\).*Nothing was changed"
    ):
        opt.step()
    assert_unchanged(opt, before)
    give(groups, 5)
    opt.step()


def test_an_unknown_answer_to_faults_is_refused():
    with pytest.raises(ValueError, match="nonfinite must be one of skip, raise, got 'ignore'"):
        Adam(net()[0], nonfinite="ignore")


def sparse(p):
    p.grad = torch.sparse_coo_tensor(torch.tensor([[0], [1]]), torch.ones(1, dtype=p.dtype), p.shape)


def of_another_dtype(p):
    value, p.grad = p.data, None
    p.data = value.double()
    p.grad = torch.zeros_like(p)
    p.data = value


@pairs(
    {"spoil, message": [(sparse, "must be dense"), (of_another_dtype, "its gradient")]}, rule=RULES, late=[False, True]
)
@pytest.mark.filterwarnings("ignore:Sparse invariant")
def test_a_gradient_that_is_refused_changes_nothing(rule, late, spoil, message):
    """In the second group: the first has not been touched either."""
    groups = net()
    opt = RULES[rule]([{"params": group} for group in groups])
    for step in range(3 if late else 0):
        give(groups, step)
        opt.step()
    give(groups, 5)
    spoil(groups[1][0])
    before = everything(opt)
    with pytest.raises(RuntimeError, match=message):
        opt.step()
    assert_unchanged(opt, before)


@pytest.mark.filterwarnings("ignore:Sparse invariant")
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("lone", [False, True])
def test_what_torch_refuses_changes_nothing_either(late, lone):
    groups = net()
    opt = RULES["Adam"](groups[0] + groups[1] if lone else [{"params": group} for group in groups])
    for step in range(3 if late else 0):
        give(groups, step)
        opt.step()
    give(groups, 5)
    sparse(groups[1][1])
    before = everything(opt)
    with pytest.raises(RuntimeError, match="sparse"):
        opt.step()
    assert_unchanged(opt, before)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("where", ["workspaces", "moments"])
def test_running_out_of_memory_changes_nothing(rule, where, monkeypatch):
    groups, others = net(), net()
    opt, fresh = (RULES[rule]([{"params": group} for group in g]) for g in (groups, others))

    def no_memory(*_, **__):
        raise RuntimeError("out of memory")

    give(groups, 0)
    give(others, 0)
    before = everything(opt)
    with monkeypatch.context() as patch:
        if where == "moments":
            patch.setattr(manifold_opt.optim.engine.state.torch, "zeros_like", no_memory)
        else:
            patch.setattr(products.torch, "empty", no_memory)
        if where == "moments" and rule == "SGD":
            pytest.skip("has none")
        with pytest.raises(RuntimeError, match="out of memory"):
            opt.step()
    assert_unchanged(opt, before)
    opt.step()
    fresh.step()
    for mine, other in zip(groups[0] + groups[1], others[0] + others[1], strict=True):
        assert torch.equal(mine, other)


@each(retraction=RETRACTIONS, rule=RULES, late=[False, True])
def test_a_step_that_runs_out_of_memory_happens_whole_or_not_at_all(rule, retraction, late, monkeypatch):
    """Whatever there is of it, on an accelerator, whose allocator keeps what a step has asked for."""
    never_read(monkeypatch)

    def build():
        marked = mark_orthogonal(nn.Parameter(torch.cat([point(40, 40, dtype=torch.float32)] * 3)), blocks=3)
        others = [mark_orthogonal(nn.Parameter(point(8, 60, dtype=torch.float32, seed=k))) for k in range(5)]
        opt = RULES[rule]([marked, *others], retraction=retraction)
        for step in range(3 if late else 1):
            if step:
                opt.step()
            give([[marked, *others]], step)
        return opt

    opt = build()
    with Memory() as memory:
        opt.step()
    after = everything(opt)
    refused = 0
    for share in (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 1.5):
        opt = build()
        before = everything(opt)
        try:
            with Memory(memory.peak * share):
                opt.step()
        except torch.OutOfMemoryError:
            assert_unchanged(opt, before)
            refused += 1
            opt.step()
        assert_unchanged(opt, after)
    assert 5 <= refused <= 10


@pairs(retraction=RETRACTIONS, rule=RULES, dtype=DTYPES, exponent=[-12, -3, 0, 2, 4, 6])
def test_any_learning_rate_is_survived(retraction, rule, dtype, exponent):
    groups = net(dtype)
    groups[0][0].grad = None
    marked = [group[0] for group in groups]
    opt = RULES[rule](marked, lr=10.0**exponent, retraction=retraction)
    for step in range(8):
        for k, p in enumerate(marked):
            p.grad = gaussian(*p.shape, dtype=dtype, seed=10 * step + k)
        opt.step()
    metrics = opt.metrics()
    assert all(bool(p.isfinite().all()) for p in marked)
    assert all(bool(v.isfinite().all()) for state in opt.state.values() for v in state.values())
    assert metrics["skipped_blocks"] == 0
    if RETRACTIONS[retraction].exact:
        for p, shape in zip(marked, [(5, 5), (3, 7)], strict=True):
            assert orthogonality_error(p) <= matrices.error_at_rounding(*shape, dtype)
        assert (metrics["clamped_steps"] > 0) == (exponent == 6)
    else:
        # Inside of the basin, where singular values stay in (0, sqrt 2), and every long step counted.
        assert metrics["orthogonality_error"] < 1.05 * 5**0.5
        if exponent != -1:  # where momentum makes the difference
            assert (metrics["clamped_steps"] > 0) == (10.0**exponent > 0.9 * RETRACTIONS[retraction].step_limit())


@pairs(retraction=RETRACTIONS, scale=[1e-38, 1e-20, 1e-8, 1e12], rank=[0, 1, 4])
def test_small_large_and_degenerate_gradients_give_the_right_step(retraction, scale, rank):
    w = point(4, 4, dtype=torch.float32)
    weight = mark_orthogonal(nn.Parameter(w.clone()))
    rule = reference.Momentum(0.0, 0.0, False)
    g = (scale * (gaussian(4, rank) @ gaussian(rank, 4, seed=7))).float()
    lr = 0.05 / scale if scale > 1e-30 else 1e30
    weight.grad = g
    SGD([weight], lr=lr, retraction=retraction).step()
    expected = reference.retract(w.double(), -lr * rule.direction(w.double(), g.double()), retraction)
    if RETRACTIONS[retraction].exact:
        torch.testing.assert_close(weight.detach().double(), expected, rtol=0, atol=2e-6)
    assert orthogonality_error(weight) < 1


@each(retraction=RETRACTIONS, rule=RULES, shape=[(6, 6), (4, 9), (9, 4)])
def test_a_point_far_off_its_manifold_is_back_within_ten_steps(retraction, rule, shape):
    """Written through ``.data``, where nobody is told."""
    weight = mark_orthogonal(nn.Parameter(point(*shape, dtype=torch.float32)))
    opt = RULES[rule]([weight], lr=1e-5, retraction=retraction)
    for step in range(11):
        if step == 1:
            weight.data += 0.1 * point(*shape, dtype=torch.float32, seed=5)
            assert orthogonality_error(weight) > 0.1
        weight.grad = gaussian(*shape, dtype=torch.float32, seed=step)
        opt.step()
    assert orthogonality_error(weight) <= matrices.error_at_rounding(*shape, torch.float32)


@pytest.mark.parametrize("retraction", EXACT)
@pytest.mark.parametrize(
    ("shape", "dtype"), [((6, 6), torch.float64), ((3, 5), torch.float32), ((9, 6), torch.complex128)]
)
def test_long_steps_one_after_the_other_leave_rounding_where_nothing_can_be_read(retraction, shape, dtype, monkeypatch):
    """Every step is clipped. An error that is carried along instead of removed grows with each of them."""
    never_read(monkeypatch)
    weight = mark_orthogonal(nn.Parameter(point(*shape, dtype=dtype)))
    opt = Adam([weight], lr=100.0, retraction=retraction, metric="canonical")
    for step in range(30):
        weight.grad = gaussian(*shape, dtype=dtype, seed=step)
        opt.step()
        assert orthogonality_error(weight) <= matrices.error_at_rounding(*shape, dtype)
    assert opt.metrics()["clamped_steps"] == 30


@pytest.mark.slow  # test_retractions.py looks for factorizations by LU at a small size
@pytest.mark.parametrize("method", RETRACTIONS)
def test_the_batched_lu_of_the_cpu_cannot_reach_anybody(method):
    """At 4 x 512 x 512 with threads set, torch's batched solve raises or is wrong in silence."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        w = point(4, 512, 512, dtype=torch.float32)
        v = geometry.riemannian_gradient(w, gaussian(4, 512, 512, dtype=torch.float32))
        v = 0.3 * v / torch.linalg.matrix_norm(v, 2, keepdim=True)
        moved = manifold_opt.retract(w, v, method)
        assert float(geometry.error(moved).max()) < (1e-4 if method in EXACT else 0.2)
        expected = reference.retract(w[0].double(), v[0].double(), method)
        torch.testing.assert_close(moved[0].double(), expected, rtol=0, atol=1e-5 if method in EXACT else 1e-3)
    finally:
        torch.set_num_threads(threads)
