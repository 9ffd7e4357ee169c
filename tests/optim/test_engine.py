"""Buckets, what a step costs, and what it must not do: wait for a device, branch on a value, break a graph."""

import copy
import itertools

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.utils.flop_counter import FlopCounterMode

from manifold_opt import RETRACTIONS, SGD, Adam, AdamW, Orthogonal, mark_orthogonal, orthogonality_error, unmark
from manifold_opt.constraints.tag import constraint_of, set_constraint
from manifold_opt.optim import base as step_module
from manifold_opt.optim.engine import bucket as buckets
from manifold_opt.optim.engine.bucket import Bucket
from manifold_opt.stiefel.rotation import CORRECTION_INTERVAL

from ..helpers import UNMOVED, Memory, blocks_of, buckets_of, each, gaussian, held_under, never_read, pairs, point

RULES = {
    "adam": lambda p, **o: Adam(p, lr=1e-3, **o),
    "adam block": lambda p, **o: Adam(p, lr=1e-3, second_moment="block", **o),
    "sgd": lambda p, **o: SGD(p, lr=1e-3, **o),
    "momentum": lambda p, **o: SGD(p, lr=1e-3, momentum=0.9, **o),
    "nesterov": lambda p, **o: SGD(p, lr=1e-3, momentum=0.9, nesterov=True, **o),
}


def parameter(*shape, blocks=1, dim=0, gain=1.0, seed=0, dtype=torch.float32):
    """A marked parameter, every block a random point."""
    rows, columns = shape[0], shape[1] if len(shape) == 2 else torch.Size(shape[1:]).numel()
    block = (rows // blocks, columns) if dim == 0 else (rows, columns // blocks)
    value = torch.cat([gain * point(*block, dtype=dtype, seed=seed + k) for k in range(blocks)], dim)
    return mark_orthogonal(nn.Parameter(value.reshape(shape)), blocks=blocks, dim=dim, gain=gain)


def set_gradients(parameters, seed, scale=1.0):
    for k, p in enumerate(parameters):
        p.grad = scale * gaussian(*p.shape, dtype=p.dtype, seed=100 * seed + k)


# Products of a whole step, in T = one p x n by n x p product.

PRODUCTS = {  # square, wide 16 x 128; and square where steps are too long for a polynomial of degree 1
    "orthographic": {
        "adam": (3.25, 6, 4.25),
        "adam block": (3.25, 6, 4.25),
        "sgd": (3.25, 4, 4.25),
        "momentum": (3.25, 4, 4.25),
        "nesterov": (3.25, 6, 4.25),
    },
    "polar": {
        "adam": (4.25, 6, 5.25),
        "adam block": (4.25, 6, 5.25),
        "sgd": (4.25, 4, 5.25),
        "momentum": (4.25, 4, 5.25),
        "nesterov": (4.25, 6, 5.25),
    },
}


def products(opt, weight, scale=1.0):
    """Of a step, in T, on average over INTERVAL steps: in each of them other blocks are looked at."""
    p = blocks_of(weight).shape[-2]
    set_gradients([weight], 1, 0.0)
    opt.step()  # the first looks at the weights too, whether they are on their manifold
    with FlopCounterMode(display=False) as counter:
        for step in range(CORRECTION_INTERVAL[torch.float32]):
            set_gradients([weight], step, scale)
            opt.step()
    return counter.get_total_flops() / (CORRECTION_INTERVAL[torch.float32] * 2 * p * weight.numel())


@pytest.mark.parametrize("retraction", PRODUCTS)
@pytest.mark.parametrize("rule", RULES)
def test_products_of_a_whole_step(rule, retraction):
    """What the docstrings of direction.py state, and of the retraction."""
    square, wide, long = PRODUCTS[retraction][rule]
    for shape, blocks, expected in (((3 * 24, 24), 3, square), ((2 * 24, 24), 2, square), ((16, 128), 1, wide)):
        weight = parameter(*shape, blocks=blocks)
        assert products(RULES[rule]([weight], retraction=retraction), weight, scale=1e-2) == expected
    weight = parameter(24, 24)
    opt = RULES[rule]([weight], retraction=retraction)
    opt.param_groups[0]["lr"] = 0.01 if "adam" in rule else 0.08 / float(torch.linalg.matrix_norm(gaussian(24, 24), 2))
    if rule in ("momentum", "nesterov"):
        opt.param_groups[0]["momentum"] = 0.1
    assert products(opt, weight) == long


def test_products_of_large_square_blocks():
    """From 384 rows on, of a Gram matrix only one triangle and the diagonal blocks: 5/8 T."""
    for retraction, expected in (("orthographic", 2), ("polar", 3)):
        expected += 5 / 8 * (1 + 1 / 4)
        weight = parameter(2 * 400, 400, blocks=2)
        assert products(Adam([weight], lr=1e-5, retraction=retraction), weight) == expected


@pytest.mark.parametrize(
    ("retraction", "square"),
    [("qr", 3.25), ("cayley", 4.25), ("exp", 4.25), ("orthogonalizer", 4), ("cayley_iterative", 7)],
)
def test_products_of_a_step_with_other_retractions(retraction, square):
    """Factorizations and triangular solves are not counted."""
    weight = parameter(24, 24)
    assert products(RULES["adam"]([weight], retraction=retraction), weight, scale=1e-2) == square


# Buckets.


def run(parameters, opt, steps=4, seed=0):
    for step in range(steps):
        set_gradients(parameters, seed + step)
        opt.step()
    return [p.detach().clone() for p in parameters]


def a_zoo():
    """Parameters of several shapes, tall, wide, stacked, with gains, of more than two dimensions and dtypes."""
    return [
        *(parameter(6, 6, seed=k) for k in range(5)),
        *(parameter(9, 3, blocks=3, seed=k) for k in range(3)),
        *(parameter(8, 3, seed=k) for k in range(3)),
        *(parameter(3, 8, seed=k, gain=1.7) for k in range(3)),
        *(parameter(4, 2, 3, seed=k) for k in range(2)),
        *(parameter(6, 6, seed=k, dtype=torch.float64) for k in range(2)),
        parameter(4, 12, blocks=3, dim=1),
        parameter(5, 5),
    ]


@each(rule=RULES, retraction=RETRACTIONS)
def test_bucketed_step_equals_individual_steps(rule, retraction):
    together, apart = a_zoo(), a_zoo()
    run(together, opt := RULES[rule](together, retraction=retraction))
    for weight, alone, seed in zip(together, apart, itertools.count(), strict=False):
        single = RULES[rule]([alone], retraction=retraction)
        for step in range(4):
            alone.grad = gaussian(*alone.shape, dtype=alone.dtype, seed=100 * step + seed)
            single.step()
        # Products of another batch size may be summed in another order.
        eps = torch.finfo(weight.dtype).eps
        torch.testing.assert_close(weight.detach(), alone.detach(), rtol=0, atol=100 * eps)
        for key, value in single.state[alone].items():
            assert opt.state[weight][key].shape == value.shape, key
            torch.testing.assert_close(opt.state[weight][key], value, rtol=1e-3, atol=1e-5)
    assert len(buckets_of(opt)) < len(together)


def test_a_bucket_of_one_views_and_a_bucket_of_many_shares_its_state():
    large, small = parameter(3 * 160, 160, blocks=3), [parameter(6, 6, seed=k) for k in range(4)]
    opt = Adam([large, *small])
    run([large, *small], opt, 2)
    lone, shared = sorted(buckets_of(opt), key=lambda bucket: bucket.gathered)
    assert lone.moments["exp_avg"].data_ptr() == opt.state[large]["exp_avg"].data_ptr()
    assert lone.gather(opt._engine.plan.pool).values.data_ptr() == large.data_ptr()
    storages = {opt.state[p]["exp_avg"].untyped_storage().data_ptr() for p in small}
    assert storages == {shared.moments["exp_avg"].untyped_storage().data_ptr()}
    assert opt.state[small[2]]["exp_avg"].shape == (6, 6)


def test_many_small_parameters_are_moved_in_portions():
    many = [parameter(16, 32, seed=k % 7) for k in range(300)]
    opt = Adam(many)
    run(many, opt, 2)
    assert 2 <= len(buckets_of(opt)) <= 4
    assert max(orthogonality_error(p) for p in many) < 1e-5


def test_blocks_of_one_large_parameter_are_worked_on_in_pieces(monkeypatch):
    def result():
        weight = parameter(40 * 4, 4, blocks=40)
        return run([weight], Adam([weight], lr=0.01))[0]

    whole = result()
    monkeypatch.setattr(buckets, "BATCH_BYTES", 7 * 4 * 4 * 4)  # seven blocks at a time
    torch.testing.assert_close(result(), whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("rule", RULES)
def test_gradients_that_come_and_go(rule):
    """What a parameter without a gradient has is left; the others move as if it were not there."""
    together, apart = [[parameter(5, 5, seed=k) for k in range(4)] for _ in range(2)]
    opt, singles = RULES[rule](together), [RULES[rule]([p]) for p in apart]
    active = [(0, 1, 2, 3), (0, 2), (1, 2, 3), (), (3,), (0, 1, 2, 3)]
    for step, members in enumerate(active):
        for k in range(4):
            gradient = gaussian(5, 5, dtype=torch.float32, seed=10 * step + k) if k in members else None
            together[k].grad, apart[k].grad = gradient, gradient
        before = [p.detach().clone() for p in together]
        opt.step()
        for k, single in enumerate(singles):
            single.step()
            assert k in members or torch.equal(together[k], before[k])
    for mine, alone in zip(together, apart, strict=True):
        torch.testing.assert_close(mine.detach(), alone.detach(), rtol=0, atol=2e-5)
    if "adam" in rule:
        assert [float(opt.state[p]["step"]) for p in together] == [3, 3, 4, 4]


def test_parameters_added_frozen_and_unfrozen_later():
    first, second = parameter(5, 5), parameter(5, 5, seed=1)
    frozen = parameter(5, 5, seed=2).requires_grad_(False)
    opt = Adam([first, frozen], lr=0.01)
    run([first], opt, 2)
    held = opt.state[first]["exp_avg"].clone()
    opt.add_param_group({"params": [second]})
    frozen.requires_grad_(True)
    assert torch.equal(opt.state[first]["exp_avg"], held)
    before = frozen.detach().clone()
    run([first, second, frozen], opt, 2)
    assert not torch.equal(frozen, before)
    assert [float(opt.state[p]["step"]) for p in (first, second, frozen)] == [4, 2, 2]
    assert max(orthogonality_error(p) for p in (first, second, frozen)) < 1e-5


@pytest.mark.parametrize("rule", ["adam", "adam block", "momentum"])
def test_a_changed_dtype_takes_its_state_along(rule):
    model = nn.ModuleList(nn.Linear(6, 6, bias=False) for _ in range(3))
    for layer in model:
        mark_orthogonal(layer, "weight")
    weights = list(model.parameters())
    opt = RULES[rule](weights)
    run(weights, opt, 2)
    model.double()
    run(weights, opt, 2)
    assert max(orthogonality_error(p) for p in weights) < 1e-13
    for weight in weights:
        assert all(v.dtype == torch.float64 for k, v in opt.state[weight].items() if k not in UNMOVED)


def test_a_state_put_in_by_hand_is_what_the_next_step_uses():
    weights = [parameter(4, 4, seed=k) for k in range(3)]
    opt = Adam(weights, lr=0.01)
    run(weights, opt, 2)
    opt.state[weights[1]] = {}
    run(weights, opt, 1)
    assert [float(opt.state[p]["step"]) for p in weights] == [3, 1, 3]


@pytest.mark.parametrize(("optimizer", "gain"), [(Adam, 1.0), (AdamW, 1.0), (SGD, 1.0), (SGD, 2.0)])
def test_moments_of_torch_are_brought_into_the_frame_and_back(optimizer, gain):
    """A stock checkpoint, held as the gradient comes; then unmarked again, and handed back to torch as it was."""
    options = {"momentum": 0.9} if optimizer is SGD else {}
    key = "momentum_buffer" if optimizer is SGD else "exp_avg"
    stock = nn.Parameter(gain * point(4, 4, dtype=torch.float64).repeat(3, 1))
    theirs = getattr(torch.optim, optimizer.__name__)([stock], lr=0.0, **options)
    stock.grad = gaussian(12, 4)
    theirs.step()
    weight = mark_orthogonal(nn.Parameter(stock.detach().clone()), blocks=3, gain=gain)
    ours = optimizer([weight], lr=0.0, **options)
    checkpoint = copy.deepcopy(theirs.state_dict())
    ours.load_state_dict(checkpoint)
    weight.grad = torch.zeros_like(weight)
    ours.step()
    w, moment = weight.detach().view(3, 4, 4) / gain, theirs.state[stock][key].view(3, 4, 4)
    torch.testing.assert_close(ours.state[weight][key].view(3, 4, 4), 0.9 * moment @ w.mT)
    assert held_under(ours, weight) == ("orthogonal", 3, 0, gain, None, True)
    unmark(weight)
    weight.grad = None
    ours.step()
    torch.testing.assert_close(ours.state[weight][key].view(3, 4, 4), 0.9 * moment)
    assert held_under(ours, weight) is None


def test_the_frame_follows_a_parameter_wherever_it_goes():
    """Unmarked while it has no gradient, at another position, in another group, in a checkpoint."""
    options = {"lr": 0.0, "momentum": 0.9}
    zero = torch.zeros(6, 6)

    def started():
        weights = [nn.Parameter(gaussian(6, 6, dtype=torch.float32)), parameter(6, 6), parameter(6, 6, seed=1)]
        opt = SGD(weights, **options)
        run(weights, opt, 1)
        return weights, opt, opt.state[weights[2]]["momentum_buffer"].clone()

    (_, first, second), opt, held = started()
    second.grad = None
    opt.step()
    unmark(second)
    second.grad = zero
    opt.step()
    torch.testing.assert_close(opt.state[second]["momentum_buffer"], 0.9 * held @ second.detach())
    assert held_under(opt, first) == ("orthogonal", 1, 0, 1.0, None, True)
    assert held_under(opt, second) is None

    (plain, first, second), opt, held = started()
    del opt.param_groups[0]["params"][0], opt.state[plain]  # torch cannot save a state that no group knows
    first.grad = second.grad = zero
    opt.step()
    torch.testing.assert_close(opt.state[second]["momentum_buffer"], 0.9 * held)
    resumed = SGD([first, second], **options)
    checkpoint = copy.deepcopy(opt.state_dict())
    resumed.load_state_dict(checkpoint)
    resumed.step()
    torch.testing.assert_close(resumed.state[second]["momentum_buffer"], 0.81 * held)

    (_, _, second), opt, held = started()
    opt.param_groups[0]["params"].pop()
    opt.add_param_group({"params": [second]})
    second.grad = zero
    opt.step()
    torch.testing.assert_close(opt.state[second]["momentum_buffer"], 0.9 * held)
    del opt.param_groups[0]
    opt.step()
    torch.testing.assert_close(opt.state[second]["momentum_buffer"], 0.81 * held)


def test_gradients_that_come_and_go_leave_nothing_behind(monkeypatch):
    """No storage of buckets that are no more, and nobody looks again at weights that only this optimizer wrote to."""
    weights = [parameter(16, 16, seed=k % 5) for k in range(40)]
    opt = Adam(weights, lr=1e-3)
    run(weights, opt, 1)
    looked = []
    monkeypatch.setattr(Orthogonal, "find_off_manifold", lambda *_: looked.append(1))
    for step in range(10):
        set_gradients(weights, step)
        for k, weight in enumerate(weights):
            if (k * 7 + step) % 3 == 0:
                weight.grad = None
        opt.step()
    storages = {s.data_ptr(): s.nbytes() for w in weights for s in [opt.state[w]["exp_avg"].untyped_storage()]}
    assert sum(storages.values()) <= 2 * sum(w.nbytes for w in weights)
    assert not looked


def test_a_saved_state_is_small_and_safe_to_load(tmp_path):
    weights = [parameter(6, 6, seed=k) for k in range(50)]
    opt = Adam(weights, lr=0.01)
    run(weights, opt, 2)
    torch.save(opt.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    fresh = Adam(weights, lr=0.01)
    fresh.load_state_dict(state)
    assert fresh.state_dict()["param_groups"] == opt.state_dict()["param_groups"]
    for weight in weights:
        assert torch.equal(fresh.state[weight]["exp_avg"], opt.state[weight]["exp_avg"])


# Memory.


def transient_bytes(opt, weights, scale=1.0):
    run(weights, opt, 2)
    set_gradients(weights, 9, scale)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        opt.step()
    events = sorted(
        (e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()
    )
    return opt._engine.plan.pool.nbytes() + max(itertools.accumulate((e.nbytes() for e in events), initial=0))


@each(
    {"shape, blocks, count": [((3 * 160, 160), 3, 1), ((300, 300), 1, 1), ((24, 960), 1, 1), ((16, 32), 1, 400)]},
    rule=RULES,
    retraction=["orthographic", "polar"],
    lr=[1e-3, 1e-2],
)
def test_transient_memory(rule, retraction, lr, shape, blocks, count):
    """At most 3 times the bytes of a bucket's weights, whatever is kept from step to step included.

    Square blocks take up to three more for steps that are not short, and one for another retraction than orthographic.
    """
    weights = [parameter(*shape, blocks=blocks, seed=k % 5) for k in range(count)]
    opt = RULES[rule](weights, retraction=retraction)
    opt.param_groups[0]["lr"] = lr
    times = 3 if shape[0] // blocks != shape[1] else 3 + (retraction == "polar") + 3 * (lr > 1e-3)
    assert transient_bytes(opt, weights) <= times * sum(w.nbytes for w in weights) + 2**10


@pytest.mark.parametrize("rule", ["adam", "adam block", "nesterov"])
def test_transient_memory_of_many_blocks(rule):
    """That of a batch of 2 MiB, whatever there is of them."""
    value = point(400_000, 3, 3, dtype=torch.float32).reshape(-1, 3)
    weight = mark_orthogonal(nn.Parameter(value), blocks=400_000)
    assert transient_bytes(RULES[rule]([weight]), [weight]) <= 3 * 2**21 + 2**20


@pairs(
    {"shape, blocks, count": [((3 * 40, 40), 3, 1), ((40, 60), 1, 1), ((8, 80), 1, 30)]},
    rule=RULES,
    retraction=RETRACTIONS,
    metric=["euclidean", "canonical"],
)
def test_temporaries_are_what_a_retraction_claims(rule, retraction, shape, blocks, count, metric, monkeypatch):
    never_read(monkeypatch)
    weights = [parameter(*shape, blocks=blocks, seed=k % 5) for k in range(count)]
    opt = RULES[rule](weights, retraction=retraction, metric=metric)
    run(weights, opt, 2)
    set_gradients(weights, 9)
    monkeypatch.setattr(Bucket, "probe_memory", lambda *_: None)
    with Memory() as memory:
        opt.step()
    pieces = [next(bucket.chunks()).stop * bucket.p * bucket.n * 4 for bucket in buckets_of(opt)]
    assert 0 < memory.peak <= RETRACTIONS[retraction].temp_blocks * max(pieces)


# No waiting, no branching.


def on_meta(weights):
    for weight in weights:
        twin = nn.Parameter(weight.detach().to("meta"))
        set_constraint(twin, constraint_of(weight))
        yield twin


@each(
    {
        "rule, options": [
            *((rule, {}) for rule in RULES),
            ("nesterov", {"metric": "canonical"}),
            ("adam", {"capturable": True}),
        ]
    },
    retraction=RETRACTIONS,
)
def test_nothing_off_the_cpu_is_read(rule, retraction, options, monkeypatch):
    """Tensors without values: whoever asks for one is told off."""
    monkeypatch.setattr(
        step_module, "restore_overwritten", lambda *_: None
    )  # looks at weights written to from outside only
    weights = list(on_meta([*a_zoo()[:12], parameter(40, 40), parameter(33, 70)]))
    opt = RULES[rule](weights, retraction=retraction, **options)
    for _ in range(2):
        for weight in weights:
            weight.grad = torch.empty_like(weight)
        opt.step()


def test_the_mode_would_raise_if_a_value_were_read():
    with pytest.raises(Exception, match="meta"):
        float(torch.ones(1, device="meta"))


@pytest.mark.parametrize(
    ("rule", "rate"),
    [
        ("adam", 1e-3),
        pytest.param("adam block", torch.tensor(1e-3), marks=pytest.mark.compiled),
        pytest.param("momentum", torch.tensor(1e-3), marks=pytest.mark.compiled),
    ],
)
@pytest.mark.filterwarnings("ignore")  # of the compiler's own
def test_a_compiled_step_is_one_graph(rule, rate):
    """With every retraction, a group each; square blocks and rectangular ones, alone and gathered."""

    def build():
        kinds = [*RETRACTIONS] if rule == "adam" else ["orthographic", "polar"]
        groups = [
            {"params": [parameter(9, 3, blocks=3, seed=k), parameter(3, 5, seed=k)], "retraction": kind}
            for k, kind in enumerate(kinds)
        ]
        groups[0]["params"] += [
            *(parameter(6, 6, seed=k) for k in range(3)),
            parameter(40, 40),
            nn.Parameter(torch.ones(3)),
        ]
        opt = RULES[rule](groups)
        for group in opt.param_groups:
            group["lr"] = rate
        return [p for group in opt.param_groups for p in group["params"]], opt

    torch._dynamo.reset()
    counters.clear()
    (params, opt), (expected, eager) = build(), build()
    compiled = torch.compile(opt.step, backend="eager")
    for k in range(3):
        set_gradients(params, k)
        set_gradients(expected, k)
        compiled()
        eager.step()
    assert not counters["graph_break"]
    if rule != "momentum" and not torch.__version__.startswith("2.6."):  # it traces a step anew once states exist, as
        assert counters["stats"]["unique_graphs"] == 1  # every version does for torch's own SGD and its buffers
    for ours, theirs in zip(params, expected, strict=True):
        torch.testing.assert_close(ours.detach(), theirs.detach(), rtol=0, atol=1e-5)


@pairs(rate=[1e-5, 1e-3, 1e-1, 1.0], dtype=[torch.float32, torch.float64], rule=["adam", "sgd"])
def test_a_fixed_number_of_products_is_exact_at_any_rate(rule, rate, dtype, monkeypatch):
    """As where the host may not look: steps too long for it are shortened, and none leaves the manifold."""
    never_read(monkeypatch)
    weights = [parameter(40, 40, dtype=dtype), parameter(12, 30, dtype=dtype)]
    opt = RULES[rule](weights)
    opt.param_groups[0]["lr"] = rate
    run(weights, opt, 5)
    for weight in weights:
        assert orthogonality_error(weight) < 8 * torch.finfo(dtype).eps * weight.shape[0] ** 0.5


def test_a_captured_step_counts_on_the_device(monkeypatch):
    """From when it is asked for: another device than the host's, here one without values."""
    monkeypatch.setattr(step_module, "restore_overwritten", lambda *_: None)
    (weight,) = on_meta([parameter(4, 4)])
    weight.grad = torch.empty_like(weight)
    opt = Adam([weight], lr=torch.tensor(0.01))
    opt.step()
    assert opt.state[weight]["step"].device.type == "cpu"
    opt.param_groups[0]["capturable"] = True
    opt.step()
    assert opt.state[weight]["step"].device.type == "meta"
