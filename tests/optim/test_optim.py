"""The optimizers as torch.optim's users know them: what is unmarked, what is marked, and what is refused."""

import copy
import itertools

import pytest
import torch
from torch import nn

import manifold_opt
from manifold_opt import RETRACTIONS, mark_orthogonal, mark_recurrent, orthogonality_error, unmark

from ..helpers import DTYPES, EXACT, UNMOVED, blocks_of, each, gaussian, pairs, point, seeded
from ..reference import loop as reference

NAMES = ["SGD", "Adam", "AdamW"]


def make(name: str, params, torch_own: bool = False, **options):
    return getattr(torch.optim if torch_own else manifold_opt, name)(params, **options)


# Unmarked parameters: torch's own, bit for bit.

SGD_OPTIONS = [
    {"lr": 0.1, **options, "weight_decay": decay, "maximize": maximize}
    for options in (
        {},
        {"momentum": 0.9},
        {"momentum": 0.9, "dampening": 0.3},
        {"momentum": 0.9, "nesterov": True},
    )
    for decay, maximize in itertools.product((0, 0.1), (False, True))
]
ADAM_OPTIONS = [
    {"lr": 0.01, "amsgrad": amsgrad, "weight_decay": decay, "maximize": maximize}
    for amsgrad, decay, maximize in itertools.product((False, True), (0, 0.1), (False, True))
]
CASES = [("SGD", o) for o in SGD_OPTIONS] + [(name, o) for name in ("Adam", "AdamW") for o in ADAM_OPTIONS]


class Net(nn.Module):
    """A marked weight in the midst of unmarked ones of several shapes and dtypes."""

    def __init__(self) -> None:
        super().__init__()
        generator = seeded(5)
        self.before = nn.Parameter(torch.randn(7, 3, generator=generator))
        self.marked = nn.Parameter(torch.randn(12, 4, generator=generator))
        self.after = nn.Parameter(torch.randn(11, generator=generator))
        self.other_dtype = nn.Parameter(torch.randn(4, 4, generator=generator).double())
        self.unused = nn.Parameter(torch.randn(2, generator=generator))

    def set_gradients(self, step: int) -> None:
        generator = seeded(step)
        for parameter in self.parameters():
            if parameter is not self.unused:
                parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter)


@each({"foreach, steps": [(None, 100), (True, 20), (False, 20)], "name, options": CASES})
def test_unmarked_parameters_train_as_with_torch(name, options, foreach, steps):
    """0 ulp over 100 steps, weights and state, beside a marked neighbour that moves; no gradient is written to."""
    ours, theirs = Net(), Net()
    mark_orthogonal(ours.marked, blocks=3)
    start = ours.marked.detach().clone()
    opt = make(name, ours.parameters(), foreach=foreach, **options)
    own = make(
        name, [p for key, p in theirs.named_parameters() if key != "marked"], torch_own=True, foreach=foreach, **options
    )
    for step in range(steps):
        ours.set_gradients(step)
        theirs.set_gradients(step)
        gradients = [None if p.grad is None else p.grad.clone() for p in ours.parameters()]
        opt.step()
        own.step()
        for parameter, gradient in zip(ours.parameters(), gradients, strict=True):
            assert parameter.grad is gradient is None or torch.equal(parameter.grad, gradient)
    for key in ("before", "after", "other_dtype", "unused"):
        mine, other = getattr(ours, key), getattr(theirs, key)
        assert torch.equal(mine, other), key
        state, expected = opt.state.get(mine, {}), own.state.get(other, {})
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[k], expected[k]) for k in expected)
    assert orthogonality_error(ours.marked) < 1e-5
    assert not torch.equal(ours.marked, start)


@pytest.mark.parametrize("name", NAMES)
def test_they_are_torchs_own_classes_with_torchs_defaults(name):
    ours, theirs = make(name, [torch.zeros(1)]), make(name, [torch.zeros(1)], torch_own=True)
    assert isinstance(ours, getattr(torch.optim, name))
    for key, value in theirs.defaults.items():
        assert ours.defaults[key] == value, key
        assert ours.param_groups[0][key] == value or key == "params"


@pytest.mark.parametrize("name", NAMES)
def test_positional_arguments_mean_what_they_mean_in_torch(name):
    arguments = {"SGD": (0.2, 0.5, 0.1, 0.3), "Adam": (0.2, (0.5, 0.6), 1e-3, 0.1, True)}
    given = arguments.get(name, arguments["Adam"])
    ours = getattr(manifold_opt, name)([torch.zeros(1)], *given)
    theirs = getattr(torch.optim, name)([torch.zeros(1)], *given)
    assert {k: ours.defaults[k] for k in theirs.defaults} == theirs.defaults


@pytest.mark.parametrize("name", NAMES)
def test_step_hooks_fire_once_whatever_else_was_built(name):
    torch.optim.SGD([torch.zeros(1)])
    torch.optim.Adam([torch.zeros(1)])
    weight = mark_orthogonal(nn.Parameter(torch.eye(3)))
    opt = make(name, [weight, nn.Parameter(torch.zeros(2))])
    fired = []
    opt.register_step_pre_hook(lambda *_: fired.append("before"))
    opt.register_step_post_hook(lambda *_: fired.append("after"))
    weight.grad = torch.ones(3, 3)
    opt.step()
    assert fired == ["before", "after"]


@pytest.mark.parametrize("name", NAMES)
def test_a_closure_runs_once_with_gradients_and_its_loss_comes_back(name):
    layer = nn.Linear(4, 4)
    mark_orthogonal(layer, "weight")
    opt = make(name, layer.parameters(), lr=0.1)
    calls = []

    def closure():
        calls.append(torch.is_grad_enabled())
        opt.zero_grad()
        loss = layer(torch.ones(2, 4)).square().sum()
        loss.backward()
        return loss

    with torch.no_grad():
        loss = opt.step(closure)
    assert calls == [True]
    assert loss.item() > 0
    assert opt.step() is None


# Marked parameters.


def expected_step(name, weight, gradients, blocks, retraction, metric, options):
    """The float64 loop over the blocks of one parameter."""
    parts = [gradient.double().chunk(blocks) for gradient in gradients]
    return torch.cat(
        [
            reference.train(block, [part[k] for part in parts], name, options, retraction, metric)
            for k, block in enumerate(weight.double().chunk(blocks))
        ]
    )


STEPS = [
    ("SGD", {"lr": 0.1}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.2}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True, "maximize": True}),
    ("Adam", {"lr": 0.05}),
    ("Adam", {"lr": 0.05, "amsgrad": True, "second_moment": "block"}),
    ("AdamW", {"lr": 0.05, "maximize": True}),
]


@pairs(
    {"name, options": STEPS, "shape, blocks": [((12, 4), 3), ((4, 7), 1), ((12, 3), 2)]},
    retraction=RETRACTIONS,
    metric=["euclidean", "canonical"],
)
def test_a_marked_parameter_steps_as_the_reference(retraction, name, options, shape, blocks, metric):
    weight = nn.Parameter(torch.cat([point(shape[0] // blocks, shape[1], seed=k) for k in range(blocks)]))
    mark_orthogonal(weight, blocks=blocks)
    start = weight.detach().clone()
    # Off the manifold, where the inexact schemes end, formulas that agree on it part: by the fourth power of the step.
    options = {**options, "lr": options["lr"] * (1 if RETRACTIONS[retraction].exact else 1e-2)}
    opt = make(name, [weight], retraction=retraction, metric=metric, **options)
    gradients = [gaussian(*shape, seed=k) for k in range(4)]
    for gradient in gradients:
        weight.grad = gradient
        opt.step()
    expected = expected_step(name, start, gradients, blocks, retraction, metric, options)
    torch.testing.assert_close(weight.detach(), expected, rtol=0, atol=1e-9)


@pairs(retraction=RETRACTIONS, name=NAMES, dtype=DTYPES, shape=[(4, 4), (3, 7), (7, 3)])
def test_three_blocks_step_as_three_parameters(retraction, name, dtype, shape):
    options = {"momentum": 0.9} if name == "SGD" else {}
    p, n = shape
    stacked = nn.Parameter(torch.cat([point(p, n, dtype=dtype, seed=k) for k in range(3)]))
    single = [nn.Parameter(block.clone()) for block in stacked.detach().chunk(3)]
    mark_orthogonal(stacked, blocks=3)
    for block in single:
        mark_orthogonal(block)
    together = make(name, [stacked], lr=0.03, retraction=retraction, **options)
    apart = make(name, single, lr=0.03, retraction=retraction, **options)
    for k in range(10):
        stacked.grad = gaussian(3 * p, n, dtype=dtype, seed=k)
        for block, gradient in zip(single, stacked.grad.chunk(3), strict=True):
            block.grad = gradient.clone()
        together.step()
        apart.step()
    # The same arithmetic in the same order. Products of another batch size may be summed in another order.
    torch.testing.assert_close(stacked.detach(), torch.cat(single).detach(), rtol=0, atol=100 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("retraction", EXACT)
@pytest.mark.parametrize("gain", [0.5, 2.0, 1.7])
def test_a_gain_scales_the_manifold_not_the_step(retraction, gain):
    """W = gain Q moves by -lr times the tangent gradient, to first order, whatever the gain."""
    weight = mark_orthogonal(nn.Parameter(gain * point(6, 6)), gain=gain)
    start, gradient = weight.detach().clone(), gaussian(6, 6)
    weight.grad = gradient
    make("SGD", [weight], lr=1e-6, retraction=retraction).step()
    moved = (weight.detach() - start) / -1e-6
    torch.testing.assert_close(moved, manifold_opt.riemannian_gradient(start / gain, gradient), rtol=0, atol=1e-4)
    assert orthogonality_error(weight) < 1e-13


@each(retraction=RETRACTIONS, name=NAMES)
def test_zero_updates_keep_the_bits(retraction, name):
    weight = mark_orthogonal(nn.Parameter(gaussian(12, 4, dtype=torch.float32)), blocks=3)
    start = weight.detach().clone()
    opt = make(name, [weight], lr=0.1, retraction=retraction)
    weight.grad = torch.zeros_like(weight)
    opt.step()
    assert torch.equal(weight, start)
    still = make(name, [weight], lr=0.0, retraction=retraction)
    weight.grad = torch.ones_like(weight)
    still.step()
    assert torch.equal(weight, start)
    weight.grad = None
    opt.step()
    assert torch.equal(weight, start)


@pytest.mark.parametrize("gain", [2.0350263118743896, 0.7])
@pytest.mark.parametrize(("lr", "gradient"), [(0.1, 0.0), (0.0, 1.0), (0.1, float("nan"))])
def test_zero_updates_keep_the_bits_under_a_gain(gain, lr, gradient):
    """Where dividing by the gain and multiplying by it does not give back every bit."""
    weights = [mark_orthogonal(nn.Parameter(gain * point(40, 40, dtype=torch.float32)), gain=gain)]
    weights += [
        mark_orthogonal(nn.Parameter(gain * point(9, 9, dtype=torch.float32, seed=k)), gain=gain) for k in (1, 2)
    ]
    starts = [weight.detach().clone() for weight in weights]
    opt = make("SGD", weights, lr=lr)
    for weight in weights:
        weight.grad = torch.full_like(weight, gradient)
    opt.step()
    assert all(torch.equal(weight, start) for weight, start in zip(weights, starts, strict=True))


def test_a_slice_of_more_than_two_dimensions_moves_in_place():
    base = torch.zeros(4, 4, 3)
    weight = nn.Parameter(base[:, :2])  # strides (12, 3, 1): cannot be made contiguous without a copy
    with torch.no_grad():
        weight.copy_(point(4, 6, dtype=torch.float32).view(4, 2, 3))
    start = weight.detach().clone()
    mark_orthogonal(weight)
    weight.grad = gaussian(4, 2, 3, dtype=torch.float32)
    make("SGD", [weight], lr=0.1).step()
    assert not torch.equal(weight, start)
    assert torch.equal(base[:, :2], weight)
    assert orthogonality_error(weight) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_one_block_without_a_gradient_keeps_its_bits(name):
    weight = mark_orthogonal(nn.Parameter(gaussian(12, 4, dtype=torch.float32)), blocks=3)
    start = weight.detach().clone()
    weight.grad = gaussian(12, 4, dtype=torch.float32, seed=3)
    weight.grad[4:8] = 0
    make(name, [weight], lr=0.1).step()
    assert torch.equal(weight[4:8], start[4:8])
    assert not torch.equal(weight[:4], start[:4])


POISONED = [
    ("SGD", {"momentum": 0.9}),
    ("SGD", {"momentum": 0.9, "nesterov": True}),
    ("Adam", {"amsgrad": True}),
    ("Adam", {"second_moment": "block"}),
    ("AdamW", {}),
]


@pairs(
    {"name, options": POISONED, "shape, gathered": [((12, 4), False), ((4, 7), True), ((4, 4), True)]},
    retraction=RETRACTIONS,
    poison=[float("nan"), float("inf"), 1e30],
)
def test_a_poisoned_block_stays_and_its_neighbours_do_not_notice(retraction, name, options, poison, shape, gathered):
    """From the third step on, when there is momentum; one block of a parameter, or one parameter of a bucket."""

    def run(poisoned: bool):
        if gathered:
            weights = [mark_orthogonal(nn.Parameter(gaussian(*shape, dtype=torch.float32, seed=k))) for k in range(3)]
        else:
            weights = [mark_orthogonal(nn.Parameter(gaussian(*shape, dtype=torch.float32)), blocks=3)]
        opt = make(name, weights, lr=0.1, retraction=retraction, **options)
        held = None
        for k in range(4):
            for i, weight in enumerate(weights):
                weight.grad = gaussian(*shape, dtype=torch.float32, seed=10 * k + i)
            if poisoned and k >= 2:
                (weights[1].grad[1] if gathered else weights[0].grad[5])[2] = poison
            opt.step()
            held = held if k > 1 else [x.clone() for x in picture(opt, weights)]
        return picture(opt, weights), held

    def picture(opt, weights):
        moments = [
            torch.stack([opt.state[w][key] for w in weights])
            for key in opt.state[weights[0]]
            if key not in UNMOVED and opt.state[weights[0]][key] is not None
        ]
        blocks = [torch.stack([w.detach() for w in weights]), *moments]
        return blocks if gathered else [x[0].view(3, -1, x.shape[-1]) for x in blocks]

    clean, _ = run(False)
    dirty, before = run(True)
    for now, then, expected in zip(dirty, before, clean, strict=True):
        assert torch.equal(now[1], then[1])
        for neighbour in (0, 2):  # products of another batch may be summed in another order
            torch.testing.assert_close(now[neighbour], expected[neighbour], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_weight_decay_does_not_act_on_marked_parameters(name):
    results = []
    for decay in (0.0, 0.5):
        weight = mark_orthogonal(nn.Parameter(gaussian(6, 6, dtype=torch.float32)))
        opt = make(name, [weight], lr=0.1, weight_decay=decay)
        for k in range(5):
            weight.grad = gaussian(6, 6, dtype=torch.float32, seed=k)
            opt.step()
        results.append(weight.detach())
    assert torch.equal(*results)


@pytest.mark.parametrize("name", NAMES)
def test_orthogonal_lr_scale_scales_marked_parameters_only(name):
    def run(lr, scale):
        weight = mark_orthogonal(nn.Parameter(gaussian(6, 6)))
        bias = nn.Parameter(gaussian(3))
        opt = make(name, [weight, bias], lr=lr, orthogonal_lr_scale=scale, weight_decay=0.0)
        weight.grad, bias.grad = gaussian(6, 6, seed=2), gaussian(3, seed=3)
        opt.step()
        return weight.detach(), bias.detach()

    tenth, bias = run(0.1, 0.1)
    whole, small_bias = run(0.01, 1.0)
    torch.testing.assert_close(tenth, whole, rtol=0, atol=1e-15)
    assert not torch.equal(bias, small_bias)


@pytest.mark.parametrize("name", NAMES)
def test_groups_have_their_own_retraction_and_rate(name):
    weights = [mark_orthogonal(nn.Parameter(gaussian(5, 5, seed=k))) for k in range(3)]
    starts = [w.detach().clone() for w in weights]
    opt = make(name, [{"params": [weights[0]], "retraction": "qr"}, {"params": [weights[1]], "lr": 0.0}], lr=0.2)
    opt.add_param_group({"params": weights[2], "retraction": "cayley", "orthogonal_lr_scale": 0.5})
    assert [g["retraction"] for g in opt.param_groups] == ["qr", "orthographic", "cayley"]
    assert [g["orthogonal_lr_scale"] for g in opt.param_groups] == [1.0, 1.0, 0.5]
    for weight in weights:
        weight.grad = gaussian(5, 5, seed=9)
    opt.step()
    options = {"lr": 0.2}
    for k, (retraction, lr) in enumerate([("qr", 0.2), ("orthographic", 0.0), ("cayley", 0.1)]):
        expected = expected_step(
            name, starts[k], [gaussian(5, 5, seed=9)], 1, retraction, "euclidean", {**options, "lr": lr}
        )
        torch.testing.assert_close(weights[k].detach(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_parameters_may_come_named_or_as_generators(name):
    layer = nn.Linear(4, 4)
    mark_orthogonal(layer, "weight")
    for params in (
        layer.parameters(),
        layer.named_parameters(),
        [{"params": layer.parameters()}],
        [{"params": (p for p in layer.parameters())}],
    ):
        opt = make(name, params, lr=0.1)
        assert sum(len(g["params"]) for g in opt.param_groups) == 2
        layer(torch.ones(1, 4)).sum().backward()
        opt.step()
        assert orthogonality_error(layer.weight) < 1e-6


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("lr", [torch.tensor(0.1), torch.tensor([0.1]), torch.tensor([[0.1]], dtype=torch.float64)])
def test_tensor_learning_rates(name, lr):
    def run(rate):
        weight = mark_orthogonal(nn.Parameter(gaussian(5, 5, dtype=torch.float32)))
        weight.grad = gaussian(5, 5, dtype=torch.float32, seed=2)
        make(name, [weight], lr=rate, foreach=False).step()
        return weight.detach()

    moved = run(lr)
    assert moved.dtype == torch.float32
    torch.testing.assert_close(moved, run(0.1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_a_marked_parameter_may_be_strided(name):
    """Views of a larger buffer, as the flat weights of cuDNN, and transposed storage."""
    flat = gaussian(100, dtype=torch.float32)
    base = flat.clone()
    parameters = [nn.Parameter(flat[10:46].view(9, 4)), nn.Parameter(gaussian(4, 9, dtype=torch.float32).mT)]
    for parameter in parameters:
        blocks = 3
        before = (parameter.data_ptr(), parameter.stride())
        mark_orthogonal(parameter, blocks=blocks)
        opt = make(name, [parameter], lr=0.1)
        for k in range(3):
            parameter.grad = gaussian(9, 4, dtype=torch.float32, seed=k)
            opt.step()
        assert (parameter.data_ptr(), parameter.stride()) == before
        assert orthogonality_error(parameter) < 1e-6
    assert torch.equal(flat[:10], base[:10])
    assert torch.equal(flat[46:], base[46:])


@pytest.mark.parametrize("name", NAMES)
def test_autocast_around_the_step_changes_nothing(name):
    def run(autocast: bool):
        weight = mark_orthogonal(nn.Parameter(gaussian(64, 64, dtype=torch.float32)))
        opt = make(name, [weight], lr=0.1)
        for k in range(3):
            weight.grad = gaussian(64, 64, dtype=torch.float32, seed=k)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                opt.step()
        return weight.detach()

    assert torch.equal(run(True), run(False))


@each(retraction=RETRACTIONS, name=NAMES)
def test_state_has_torchs_keys_and_a_resumed_run_is_the_same_bit_for_bit(name, retraction):
    def fresh():
        net = Net()
        mark_orthogonal(net.marked, blocks=3)
        options = {"momentum": 0.9} if name == "SGD" else {}
        options |= {"beta": 0.05} if retraction == "orthogonalizer" else {}
        return net, make(name, net.parameters(), lr=0.05, retraction=retraction, **options)

    net, opt = fresh()
    for step in range(3):
        net.set_gradients(step)
        opt.step()
    keys = {"momentum_buffer"} if name == "SGD" else {"exp_avg", "exp_avg_sq"}
    assert opt.state[net.marked].keys() == keys | {"step", "constrained"}
    other, resumed = fresh()
    other.load_state_dict(copy.deepcopy(net.state_dict()))
    resumed.load_state_dict(copy.deepcopy(opt.state_dict()))
    for step in range(3, 6):
        for model, optimizer in ((net, opt), (other, resumed)):
            model.set_gradients(step)
            optimizer.step()
        assert torch.equal(net.marked, other.marked)


@pytest.mark.parametrize("name", NAMES)
def test_a_stock_checkpoint_loads_and_keeps_our_options(name):
    layer, stock_layer = nn.Linear(4, 4), nn.Linear(4, 4)
    mark_orthogonal(layer, "weight")
    stock = make(name, stock_layer.parameters(), torch_own=True, lr=0.5)
    stock_layer(torch.ones(1, 4)).sum().backward()
    stock.step()
    opt = make(name, layer.parameters(), lr=0.1, retraction="qr")
    opt.load_state_dict(stock.state_dict())
    assert opt.param_groups[0]["retraction"] == "qr"
    assert opt.param_groups[0]["lr"] == 0.5
    layer(torch.ones(1, 4)).sum().backward()
    opt.step()
    assert orthogonality_error(layer.weight) < 1e-6


@pytest.mark.parametrize(("before", "after"), [("element", "block"), ("block", "element")])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_a_checkpoint_can_change_its_second_moment(before, after, amsgrad):
    """One number a block becomes that number everywhere, and elements become their mean."""
    weight = mark_orthogonal(nn.Parameter(gaussian(12, 4)), blocks=3)
    first = make("Adam", [weight], lr=0.01, second_moment=before, amsgrad=amsgrad)
    weight.grad = gaussian(12, 4, seed=2)
    first.step()
    state = first.state_dict()
    state["param_groups"][0]["second_moment"] = after
    second = make("Adam", [weight], lr=0.01, second_moment=after, amsgrad=amsgrad)
    second.load_state_dict(state)
    old = first.state[weight]["exp_avg_sq"].clone()
    weight.grad = torch.zeros_like(weight)
    second.step()
    new = second.state[weight]["exp_avg_sq"] / 0.999
    expected = old.view(3, 4, 4).mean((1, 2), keepdim=True) if after == "block" else old.expand(3, 4, 4).reshape(12, 4)
    torch.testing.assert_close(new, expected)
    assert orthogonality_error(weight) < 1e-13


def test_amsgrad_can_be_switched_on_later():
    weight = mark_orthogonal(nn.Parameter(gaussian(4, 4)))
    opt = make("Adam", [weight], lr=0.01)
    weight.grad = gaussian(4, 4, seed=2)
    opt.step()
    opt.param_groups[0]["amsgrad"] = True
    opt.step()
    assert "max_exp_avg_sq" in opt.state[weight]


@pytest.mark.parametrize("name", NAMES)
def test_schedulers_that_cycle_momentum(name):
    weight = mark_orthogonal(nn.Parameter(gaussian(4, 4)))
    opt = make(name, [weight], lr=0.01)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=0.1, total_steps=20, cycle_momentum=name != "SGD")
    for k in range(19):
        weight.grad = gaussian(4, 4, seed=k)
        if name == "SGD":
            opt.param_groups[0]["momentum"] = 0.0 if k < 5 else 0.9  # switched on late
        opt.step()
        scheduler.step()
    assert orthogonality_error(weight) < 1e-13


def test_unmarking_hands_a_parameter_back_to_torch():
    weight = mark_orthogonal(nn.Parameter(gaussian(4, 4)))
    opt = make("SGD", [weight], lr=0.1)
    unmark(weight)
    before = weight.detach().clone()
    weight.grad = gaussian(4, 4, seed=2)
    opt.step()
    assert torch.equal(weight.detach(), before.sub(weight.grad, alpha=0.1))


def test_unmarking_after_block_moments_hands_torch_moments_it_can_use():
    weight = mark_orthogonal(nn.Parameter(gaussian(12, 4)), blocks=3)
    opt = make("Adam", [weight], lr=0.1, second_moment="block", amsgrad=True)
    weight.grad = gaussian(12, 4, seed=2)
    opt.step()
    held = opt.state[weight]["exp_avg_sq"].clone()
    unmark(weight)
    opt.step()
    assert opt.state[weight]["exp_avg_sq"].shape == (12, 4)
    expected = 0.999 * held.expand(3, 4, 4).reshape(12, 4) + 0.001 * weight.grad**2
    torch.testing.assert_close(opt.state[weight]["exp_avg_sq"], expected)
    mark_orthogonal(weight, blocks=1)
    opt.step()
    assert orthogonality_error(weight) < 1e-13


@each(retraction=RETRACTIONS, name=NAMES, scale=[3.0, 1e3])
def test_a_value_loaded_from_outside_is_put_back_with_a_warning(retraction, name, scale):
    layer, stock = nn.Linear(6, 6), nn.Linear(6, 6)
    mark_orthogonal(layer, "weight")
    opt = make(name, layer.parameters(), lr=0.01, retraction=retraction)
    for k in range(4):
        if k == 2:
            with torch.no_grad():
                stock.weight.copy_(scale * torch.eye(6) + gaussian(6, 6))
            layer.load_state_dict(stock.state_dict())
        layer.weight.grad = gaussian(6, 6, dtype=torch.float32, seed=k)
        if k == 2:
            with pytest.warns(UserWarning, match=r"away from its manifold.*nearest") as caught:
                opt.step()
            assert caught[0].filename == __file__
        else:
            opt.step()
        assert orthogonality_error(layer.weight) < 1e-5


def test_messages_name_a_parameter_that_came_with_its_name():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    for k in range(2):
        mark_orthogonal(net, f"{k}.weight")
    opt = manifold_opt.SGD(net.named_parameters(), lr=0.1, nonfinite="raise")
    if "param_names" not in opt.param_groups[0]:
        pytest.skip("torch 2.6 keeps no names")
    net(torch.ones(1, 4)).sum().backward()
    with torch.no_grad():
        net[1].weight.mul_(2)
    with pytest.warns(UserWarning, match=r"of shape \(4, 4\) \(1\.weight\) was"):
        opt.step()
    net[0].weight.grad[2, 2] = torch.nan
    with pytest.raises(FloatingPointError, match=r"of shape \(4, 4\) \(0\.weight\) is not finite"):
        opt.step()
    net[0].weight.grad = net[0].weight.grad.to_sparse()
    with pytest.raises(RuntimeError, match=r"of shape \(4, 4\) \(0\.weight\) has a sparse gradient"):
        opt.step()


@pytest.mark.parametrize("name", NAMES)
def test_a_value_that_cannot_be_put_back_is_refused_before_anything_is_written(name):
    layer = nn.Linear(4, 4)
    mark_orthogonal(layer, "weight")
    opt = make(name, layer.parameters(), lr=0.1)
    layer(torch.ones(1, 4)).sum().backward()
    with torch.no_grad():
        layer.weight.zero_()
    before = layer.bias.detach().clone()
    with pytest.raises(ValueError, match=r"rank-deficient.*init\.orthogonal_"):
        opt.step()
    assert torch.equal(layer.bias, before)


def test_data_written_behind_the_version_counter_never_explodes():
    for retraction in RETRACTIONS:
        weight = mark_orthogonal(nn.Parameter(gaussian(6, 6, dtype=torch.float32)))
        opt = make("Adam", [weight], lr=0.01, retraction=retraction)
        for k in range(30):
            weight.grad = gaussian(6, 6, dtype=torch.float32, seed=k)
            opt.step()
            if k == 3:
                weight.data.mul_(3)
        assert weight.isfinite().all()
        assert weight.abs().max() < 10


@pytest.mark.parametrize("name", NAMES)
def test_convolutions_with_gradients_of_another_memory_format(name):
    def run(memory_format):
        conv = nn.Conv2d(4, 8, 3)
        with torch.no_grad():
            conv.weight.copy_(gaussian(8, 4, 3, 3))
        mark_orthogonal(conv, "weight")
        opt = make(name, [conv.weight], lr=0.1)
        conv.weight.grad = gaussian(8, 4, 3, 3, dtype=torch.float32, seed=2).contiguous(memory_format=memory_format)
        opt.step()
        return conv.weight.detach()

    assert torch.equal(run(torch.contiguous_format), run(torch.channels_last))


@pytest.mark.skipif(
    "decoupled_weight_decay" not in torch.optim.Adam([torch.zeros(1)]).defaults,
    reason="torch 2.6 has no decoupled_weight_decay in Adam",
)
def test_adam_with_decoupled_weight_decay():
    ours, theirs = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    options = {"lr": 0.1, "weight_decay": 0.5, "decoupled_weight_decay": True}
    for parameter, opt in ((ours, make("Adam", [ours], **options)), (theirs, make("Adam", [theirs], True, **options))):
        parameter.grad = torch.ones(3)
        opt.step()
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("found_inf", [0.0, 1.0])
def test_a_fused_optimizer_gets_what_the_gradient_scaler_sets(name, found_inf):
    ours, theirs = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    pairs = [(ours, make(name, [ours], lr=0.1, fused=True)), (theirs, make(name, [theirs], True, lr=0.1, fused=True))]
    for parameter, opt in pairs:
        parameter.grad = torch.full((3,), 8.0)
        opt.grad_scale, opt.found_inf = torch.tensor(4.0), torch.tensor(found_inf)
        opt.step()
    assert torch.equal(ours, theirs)


# Refusals.


@each(
    {
        "change, match": [
            ({"retraction": "foo"}, "qr, cayley"),
            ({"beta": 0.1}, "orthogonalizer"),
            ({"differentiable": True}, "differentiable"),
        ]
    },
    name=NAMES,
)
def test_options_changed_later_are_checked_before_anything_is_written(name, change, match):
    layer = nn.Linear(4, 4)
    mark_orthogonal(layer, "weight")
    opt = make(name, layer.parameters(), lr=0.1)
    opt.param_groups[0].update(change)
    layer(torch.ones(1, 4)).sum().backward()
    before = [p.detach().clone() for p in layer.parameters()]
    with pytest.raises(ValueError, match=rf"^{name}: .*{match}"):
        opt.step()
    assert all(torch.equal(a, b) for a, b in zip(layer.parameters(), before, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_a_memory_format_that_hides_some_blocks_is_refused(name):
    conv = nn.Conv2d(4, 8, 3)
    mark_orthogonal(conv, "weight", (3, 5))
    opt = make(name, conv.parameters(), lr=0.1)
    conv.to(memory_format=torch.channels_last)
    conv(torch.ones(1, 4, 5, 5)).sum().backward()
    before = conv.bias.detach().clone()
    with pytest.raises(ValueError, match=rf"^{name}: .*contiguous"):
        opt.step()
    assert torch.equal(conv.bias, before)


@pairs(
    name=NAMES,
    shape=[(8, 4, 3, 3), (36, 4, 3, 3), (64, 16, 3, 3), (2 * 64, 16, 3, 3)],
    when=["before it is marked", "after", "after a step"],
)
def test_a_memory_format_changes_nothing(name, shape, when):
    """A model in channels_last trains as one that is contiguous, and keeps its strides."""
    blocks = 2 if shape[0] == 128 else 1
    value, ends = gaussian(*shape, dtype=torch.float32), []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        conv = nn.Conv2d(*shape[1::-1], 3)
        conv.weight.data.copy_(value)
        if when.startswith("before"):
            conv.to(memory_format=memory_format)
        mark_orthogonal(conv, "weight", blocks)
        opt = make(name, conv.parameters(), lr=0.1)
        for step in range(3):
            if (when, step) in (("after", 0), ("after a step", 1)):
                conv.to(memory_format=memory_format)
            conv.bias.grad = torch.ones_like(conv.bias)
            conv.weight.grad = gaussian(*shape, dtype=torch.float32, seed=step).contiguous(memory_format=memory_format)
            opt.step()
        assert conv.weight.is_contiguous(memory_format=memory_format)
        ends.append(conv.weight.detach())
    torch.testing.assert_close(*ends, rtol=0, atol=1e-6)
    assert orthogonality_error(conv.weight) < 1e-5


@each(
    {
        "options, match": [
            ({"retraction": "caley"}, "qr, cayley"),
            ({"metric": "flat"}, "euclidean, canonical"),
            ({"orthogonal_lr_scale": -1.0}, "orthogonal_lr_scale"),
            ({"orthogonal_lr_scale": float("nan")}, "orthogonal_lr_scale"),
            ({"orthogonal_lr_scale": float("inf")}, "orthogonal_lr_scale"),
            ({"retraction": "orthogonalizer", "beta": 1.5}, "beta"),
            ({"beta": 0.1}, "orthogonalizer"),
            ({"correction_steps": 2}, "orthogonalizer"),
            ({"second_moment": "rows"}, "element, block"),
        ]
    },
    name=NAMES,
)
def test_options_out_of_range_are_refused(name, options, match):
    if name == "SGD" and "second_moment" in options:
        pytest.skip("SGD has no second moment")
    parameter = nn.Parameter(torch.eye(2))
    with pytest.raises(ValueError, match=match):
        make(name, [parameter], **options)
    with pytest.raises(ValueError, match=match):
        make(name, [nn.Parameter(torch.eye(2))]).add_param_group({"params": [parameter], **options})


@pytest.mark.parametrize("name", NAMES)
def test_what_a_marked_parameter_cannot_honour_raises_at_construction(name):
    option = "differentiable"
    weight, bias = nn.Parameter(torch.eye(3)), nn.Parameter(torch.zeros(3))
    make(name, [weight, bias], **{option: True})  # nothing marked, nothing to refuse
    mark_orthogonal(weight)
    with pytest.raises(ValueError, match=rf"{option}=True.*group of their own"):
        make(name, [weight, bias], **{option: True})
    make(name, [{"params": [weight], option: False}, {"params": [bias]}], **{option: True})


@pytest.mark.parametrize("name", NAMES)
def test_a_step_that_is_refused_changes_nothing(name):
    layer = nn.Linear(4, 4)
    mark_orthogonal(layer, "weight")
    opt = make(name, layer.parameters(), lr=0.1)
    layer.weight.data = layer.weight.data.to(torch.float8_e5m2)
    before = [p.detach().float() for p in layer.parameters()]
    layer.weight.grad, layer.bias.grad = torch.ones_like(layer.weight), torch.ones_like(layer.bias)
    with pytest.raises(ValueError, match=r"float8.*bfloat16"):
        opt.step()
    assert all(torch.equal(a.float(), b) for a, b in zip(layer.parameters(), before, strict=True))
    assert not opt.state


@pytest.mark.parametrize("name", NAMES)
def test_a_sparse_gradient_is_refused(name):
    table = nn.Embedding(6, 4, sparse=True)
    mark_orthogonal(table, "weight")
    opt = make(name, table.parameters())
    table(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse gradient"):
        opt.step()


@pytest.mark.parametrize("name", NAMES)
def test_torchs_own_refusals_are_torchs(name):
    for bad in ([], torch.zeros(2)):
        with pytest.raises((ValueError, TypeError)) as theirs:
            make(name, bad, torch_own=True)
        with pytest.raises(type(theirs.value)) as ours:
            make(name, bad)
        assert str(ours.value) == str(theirs.value)
    with pytest.raises(TypeError, match="ordered"):
        make(name, [{"params": {torch.zeros(1)}}])


# A recurrent net, trained for real.

RECURRENT = [
    (nn.RNN, {}),
    (nn.GRU, {}),
    (nn.LSTM, {}),
    (nn.LSTM, {"proj_size": 5}),
]


def train(kind, options, name, retraction, dtype, steps, hidden=16):
    """Two layers, both directions, on batches that never repeat; the worst error of any block after training."""
    torch.manual_seed(0)
    net = kind(4, hidden, num_layers=2, bidirectional=True, dtype=dtype, **options)
    names = mark_recurrent(net)
    assert len(names) == 4
    facts = {n: (p, p.data_ptr(), p.stride(), type(p)) for n, p in net.named_parameters()}
    opt = make(name, net.parameters(), lr=1e-2, retraction=retraction)
    generator = seeded()
    for _ in range(steps):
        x = torch.randn(5, 4, 4, dtype=dtype, generator=generator)
        opt.zero_grad()
        (net(x)[0] - x.sum(-1, keepdim=True)).square().mean().backward()
        opt.step()
    for n, p in net.named_parameters():
        parameter, pointer, stride, kind_of = facts[n]
        assert p is parameter
        assert (p.data_ptr(), p.stride(), type(p)) == (pointer, stride, kind_of)
    widest = max(blocks_of(net.get_parameter(n)).shape[-1] for n in names)
    return max(orthogonality_error(net).values()) / widest**0.5


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pairs({"kind, options": RECURRENT}, retraction=EXACT, name=["SGD", "Adam"], dtype=DTYPES)
def test_every_gate_of_a_recurrent_net_stays_orthogonal(retraction, name, kind, options, dtype):
    assert train(kind, options, name, retraction, dtype, 15) <= (1e-6 if dtype == torch.float32 else 1e-14)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("retraction", EXACT)
@pytest.mark.parametrize("name", ["SGD", "Adam"])
@pytest.mark.parametrize(("kind", "options"), RECURRENT)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_gate_is_still_orthogonal_after_a_thousand_steps(retraction, name, kind, options, dtype):
    assert train(kind, options, name, retraction, dtype, 1000) <= (1e-6 if dtype == torch.float32 else 1e-14)
