"""A marked parameter that another optimizer moves off its manifold: one warning."""

import warnings

import geoopt
import pytest
import torch
from torch import nn

from manifold_opt import SGD, Adam, mark_manifold, mark_orthogonal, project_to_manifold_, unmark


def net_with_gradients():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    return net


def warnings_of(opt, steps=3):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(steps):
            opt.step()
    return [str(one.message) for one in caught]


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, geoopt.optim.RiemannianAdam])
def test_the_first_step_of_another_optimizer_warns_once(kind):
    net = net_with_gradients()
    mark_orthogonal(net, "0.weight")
    (said,) = warnings_of(kind(net.parameters(), lr=0.1))
    assert said.startswith(
        f"{kind.__module__}.{kind.__name__} has moved a marked parameter of shape (4, 4) (0.weight) off"
    )
    mark_orthogonal(net, "1.weight")
    (said,) = warnings_of(kind(net.parameters(), lr=0.1))
    assert "(0.weight) and 1 more off its manifold, Orthogonal(blocks=1" in said


def test_the_warning_points_to_the_step():
    net = net_with_gradients()
    mark_orthogonal(net, "0.weight")
    with pytest.warns(UserWarning, match="has moved a marked parameter") as caught:
        torch.optim.SGD(net.parameters(), lr=0.1).step()
    assert caught[0].filename == __file__


def test_a_parameter_that_is_marked_or_gets_a_gradient_later_is_seen():
    net = net_with_gradients()
    opt = torch.optim.SGD(net.parameters(), lr=0.1)
    assert warnings_of(opt) == []
    mark_orthogonal(net, "0.weight")
    net[0].weight.grad = None
    assert warnings_of(opt) == []
    net[0].weight.grad = torch.ones(4, 4)
    assert len(warnings_of(opt)) == 1  # step 4


def test_a_warm_up_that_begins_with_zero_warns_later():
    net = net_with_gradients()
    mark_orthogonal(net, "0.weight")
    opt = torch.optim.SGD(net.parameters(), lr=0.0)
    assert warnings_of(opt) == []
    opt.param_groups[0]["lr"] = 0.1
    assert len(warnings_of(opt, 9)) == 1


class Wrapper(torch.optim.Optimizer):
    """An optimizer that steps another one."""

    def __init__(self, inner):
        super().__init__([p for group in inner.param_groups for p in group["params"]], {})
        self.inner = inner

    def step(self):
        self.inner.step()


def test_what_keeps_its_parameters_does_not_warn():
    net = net_with_gradients()
    mark_orthogonal(net, "0.weight")
    for ours in (Adam(net.parameters(), lr=0.1), SGD(net.parameters(), lr=0.1)):
        assert warnings_of(ours) == warnings_of(Wrapper(ours)) == []
    assert len(warnings_of(Wrapper(torch.optim.SGD(net.parameters(), lr=0.1)))) == 1  # of the inner one
    point = geoopt.ManifoldParameter(torch.eye(4)[:1], manifold=geoopt.Sphere())
    point.grad = torch.ones(1, 4)
    assert warnings_of(geoopt.optim.RiemannianSGD([mark_manifold(point, geoopt.Sphere())], lr=0.1)) == []
    projecting = torch.optim.SGD(net.parameters(), lr=0.1)
    projecting.register_step_post_hook(lambda *_: project_to_manifold_(net))
    assert warnings_of(projecting) == []
    assert warnings_of(torch.optim.SGD(unmark(net).parameters(), lr=0.1)) == []


def test_a_diagnosis_does_not_end_a_training():
    class Odd(torch.optim.SGD):
        @property
        def optimizer(self):
            raise RuntimeError("not ready")

    net = net_with_gradients()
    mark_orthogonal(net, "0.weight")
    assert len(warnings_of(Odd(net.parameters(), lr=0.1))) == 1
    net = net_with_gradients()
    mark_orthogonal(net, "0.weight").grad.fill_(torch.nan)
    assert len(warnings_of(torch.optim.SGD(net.parameters(), lr=0.1))) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rounding_is_not_a_move(dtype):
    weight = mark_orthogonal(nn.Parameter(torch.randn(64, 64).to(dtype)))
    weight.grad = torch.ones_like(weight)
    assert warnings_of(torch.optim.SGD([weight], lr=0.0)) == []
    assert len(warnings_of(torch.optim.SGD([weight], lr=0.1))) == 1


def test_flat_parts_of_fsdp1_are_not_judged():
    weight = mark_orthogonal(nn.Parameter(torch.eye(4)))
    weight.data, weight.grad = torch.ones(6), torch.ones(6)
    weight._fsdp_flattened = True
    assert warnings_of(torch.optim.SGD([weight], lr=0.1)) == []


@pytest.mark.compiled
def test_the_hook_breaks_no_graph():
    """Of a compiled step of torch.optim, which has a break of its own."""
    breaks = []
    for marked in (False, True):
        net = net_with_gradients()
        if marked:
            mark_orthogonal(net, "0.weight")
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        torch.compile(torch.optim.SGD(net.parameters(), lr=0.1).step, backend="eager")()
        breaks.append(sum(torch._dynamo.utils.counters["graph_break"].values()))
    assert breaks[0] == breaks[1]
