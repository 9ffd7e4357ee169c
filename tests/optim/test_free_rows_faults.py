"""What befalls rows that are in no block: faults, gradient scalers, compiled steps, memory."""

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from manifold_opt import mark_orthogonal

from ..helpers import Memory, gaussian, never_read, pairs
from .test_free_rows import OPTIONS, assert_same, build, free, give, pair


@pytest.mark.parametrize(("name", "options"), OPTIONS)
@pytest.mark.parametrize("fault", [float("nan"), float("inf")])
def test_a_fault_in_a_free_row_is_torchs_and_no_blocks(name, options, fault):
    """The entry goes as with torch; the blocks, and the other free entries, are those of a run without it."""
    runs = []
    for spoilt in (False, True):
        weight, stock = pair("in the middle")
        opt, own = build(name, [weight], **options), build(name, [stock], torch_own=True, **options)
        for step in range(4):
            for some in ([weight], [stock]):
                give(some, step)
                if spoilt and step == 2:
                    some[0].grad[10, 3] = fault
            opt.step()
            own.step()
        rows = free(weight, "in the middle")
        torch.testing.assert_close(rows, free(stock, "in the middle"), rtol=0, atol=0, equal_nan=True)
        runs.append(weight.detach())
        assert opt.metrics()["skipped_blocks"] == 0
    sound, spoilt = runs
    assert not torch.equal(sound, spoilt)
    spoilt[10, 3] = sound[10, 3]
    assert torch.equal(sound, spoilt)


@pytest.mark.parametrize(("name", "options"), OPTIONS)
def test_a_fault_in_a_block_leaves_the_free_rows_alone(name, options):
    weight, stock = pair("in the middle")
    opt, own = build(name, [weight], **options), build(name, [stock], torch_own=True, **options)
    for step in range(4):
        give([weight], step)
        give([stock], step)
        if step == 2:
            before = weight.detach()[:9].clone()
            weight.grad[3, 3] = torch.nan
        opt.step()
        own.step()
        if step == 2:
            assert torch.equal(weight.detach()[:9], before)
    assert_same(opt, weight, own, stock, "in the middle")
    assert opt.metrics()["skipped_blocks"] == 1


def test_a_fault_that_raises_has_moved_nothing():
    weight, _ = pair("in the middle")
    opt = build("Adam", [weight], nonfinite="raise")
    give([weight], 0)
    weight.grad[10, 3] = torch.nan  # a free row's is no block's
    opt.step()
    before = weight.detach().clone()
    weight.grad[25, 3] = torch.nan
    with pytest.raises(FloatingPointError, match="block 2 "):
        opt.step()
    torch.testing.assert_close(weight.detach(), before, rtol=0, atol=0, equal_nan=True)


@pairs({"name, options": OPTIONS}, reads=[True, False], skipped=[(0, 3), (2,)])
def test_beside_a_fused_optimizer_and_its_gradient_scaler(name, options, reads, skipped, monkeypatch):
    """What a GradScaler leaves to a fused step, free rows are spared: the scale, and steps with an overflow."""
    if not reads:
        never_read(monkeypatch)
        if 0 in skipped and options.get("dampening"):
            pytest.skip("nobody may know there that the first gradient is still to come")
    (weight, stock), other = pair("candidate"), nn.Parameter(torch.ones(3))
    opt = build(name, [weight, other], **options, fused=True)
    own = build(name, [stock], torch_own=True, **options)
    for step in range(6):
        overflow = step in skipped
        opt.grad_scale, opt.found_inf = torch.tensor(4.0), torch.tensor(float(overflow))
        give([stock], step)
        weight.grad, other.grad = 4 * stock.grad, torch.zeros(3)
        if overflow:
            weight.grad[1, 1] = torch.inf
        opt.step()
        if not overflow:
            own.step()
    assert torch.equal(free(weight, "candidate"), free(stock, "candidate"))
    assert float(opt.state[weight]["step"]) == 6 - len(skipped)


@pytest.mark.compiled
@pytest.mark.parametrize(("name", "options"), [OPTIONS[2], ("Adam", {"capturable": True})])
@pytest.mark.filterwarnings("ignore")  # of the compiler's own
def test_a_compiled_step_is_one_graph(name, options):
    torch._dynamo.reset()
    counters.clear()
    (weight, stock), again = pair("in the middle"), pair("in the middle")[0]
    opt = build(name, [weight], **options)
    eager = build(name, [again], **{key: value for key, value in options.items() if key != "capturable"})
    compiled = torch.compile(opt.step, backend="eager")
    for step in range(3):
        give([weight], step)
        give([again], step)
        compiled()
        eager.step()
    assert not counters["graph_break"]
    assert not torch.equal(free(weight, "in the middle"), free(stock, "in the middle"))
    # Blocks take the path of where nobody may look; free rows torch's own.
    torch.testing.assert_close(weight.detach(), again.detach(), rtol=0, atol=1e-5)


def peak(opt, weight):
    """Of a step beyond the first, which makes state and workspaces."""
    for step in range(3):
        give([weight], step)
        if step < 2:
            opt.step()
    with Memory() as memory:
        opt.step()
    return memory.peak


@pytest.mark.parametrize("which", [None, (0, 2)])
@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_a_step_takes_no_more_memory_than_for_its_parts_one_by_one(name, which):
    """Blocks of unequal size are steps of their own, free rows one of torch's."""
    weight = mark_orthogonal(nn.Parameter(gaussian(1200, 200, dtype=torch.float32)), (400, 200, 600), which=which)
    parts = [mark_orthogonal(nn.Parameter(part.clone()), 1) for part in weight.detach().split((400, 200, 600))]
    alone = [peak(build(name, [part], foreach=False), part) for part in parts]
    stock = nn.Parameter(parts[1].detach())
    alone.append(peak(build(name, [stock], torch_own=True, foreach=False), stock))
    assert peak(build(name, [weight], foreach=False), weight) <= 1.05 * max(alone)
