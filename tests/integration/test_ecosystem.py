"""In loops that others wrote: GradScaler, autocast, precision settings, torch.distributed."""

import copy
import os
import warnings

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

import manifold_opt
from manifold_opt import RETRACTIONS, SGD, Adam, check, constraint_of, mark_orthogonal, orthogonality_error, unmark
from manifold_opt.linalg.precision import FullPrecision

from ..helpers import DTYPES, UNMOVED, each, gaussian, pairs, point

NEWER = hasattr(torch.backends, "fp32_precision")  # torch has a setting of each backend

RULES = {
    "SGD": lambda p, **o: SGD(p, lr=0.05, momentum=0.9, **o),
    "Adam": lambda p, **o: Adam(p, lr=0.01, **o),
    "Adam block": lambda p, **o: Adam(p, lr=0.01, second_moment="block", amsgrad=True, **o),
    "AdamW": lambda p, **o: manifold_opt.AdamW(p, lr=0.01, **o),
}


def net(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    model = nn.ModuleDict({"square": nn.Linear(8, 24), "wide": nn.Linear(12, 5), "free": nn.Linear(3, 3)}).to(dtype)
    mark_orthogonal(model["square"], "weight", 3)
    mark_orthogonal(model["wide"], "weight")
    return model


def give(model, seed, scale=1.0):
    for k, p in enumerate(model.parameters()):
        p.grad = scale * gaussian(*p.shape, dtype=p.dtype, seed=100 * seed + k)


def run(model, opt, steps, first=0):
    for step in range(first, first + steps):
        give(model, step)
        opt.step()
    return model


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


# Checkpoints.


@each(retraction=RETRACTIONS, rule=RULES, dtype=DTYPES, steps=[1, 3, 6])
def test_a_resumed_run_is_the_uninterrupted_one(retraction, rule, dtype, steps, tmp_path):
    """Bit for bit, from files that load with weights_only=True, wherever among its turns the run was cut."""
    model = net(dtype)
    opt = RULES[rule](model.parameters(), retraction=retraction)
    run(model, opt, steps)
    torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, tmp_path / "checkpoint.pt")
    loaded = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    other = net(dtype, seed=1)
    other.load_state_dict(loaded["model"])
    resumed = RULES[rule](other.parameters(), retraction=retraction)
    resumed.load_state_dict(loaded["opt"])
    assert same(run(other, resumed, 5, steps), run(model, opt, 5, steps))
    for mine, theirs in zip(resumed.state.values(), opt.state.values(), strict=True):
        assert all(torch.equal(mine[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("rule", RULES)
def test_loading_into_another_dtype_keeps_counters_and_state(rule):
    model = net(torch.float32)
    opt = RULES[rule](model.parameters())
    run(model, opt, 3)
    other = net(torch.float64, seed=1)
    other.load_state_dict(model.state_dict())
    resumed = RULES[rule](other.parameters())
    resumed.load_state_dict(copy.deepcopy(opt.state_dict()))
    for mine, theirs in zip(resumed.state.values(), opt.state.values(), strict=True):
        for key, value in theirs.items():
            assert torch.equal(mine[key].to(value.dtype), value)
            assert mine[key].dtype == (value.dtype if key in UNMOVED else torch.float64)
    run(other, resumed, 2, 3)
    assert max(orthogonality_error(other).values()) < 1e-13
    run(model, opt, 2, 3)
    for a, b in zip(other.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a.float(), b, rtol=0, atol=1e-5)


@pytest.mark.parametrize("rule", RULES)
def test_distributed_checkpoints(rule):
    """torch.distributed.checkpoint makes the state of a fresh optimizer by a step with zero gradients and lr = 0."""
    model = net()
    opt = RULES[rule](model.parameters())
    run(model, opt, 3)
    values, state = get_model_state_dict(model), get_optimizer_state_dict(model, opt)
    other = net(seed=1)
    resumed = RULES[rule](other.parameters())
    set_model_state_dict(other, copy.deepcopy(values))
    set_optimizer_state_dict(other, resumed, copy.deepcopy(state))
    assert check(other, resumed) == []
    assert same(run(other, resumed, 4, 3), run(model, opt, 4, 3))


# Mixed precision.


@each(rule=RULES, retraction=RETRACTIONS, dtype=[torch.bfloat16, torch.float16])
def test_autocast_around_a_step_changes_no_bit(rule, retraction, dtype):
    model, other = net(), net()
    opt, inside = (RULES[rule](m.parameters(), retraction=retraction) for m in (model, other))
    run(model, opt, 4)
    with torch.autocast("cpu", dtype=dtype):
        run(other, inside, 4)
    assert same(model, other)


def overall(precision):
    return lambda: torch.set_float32_matmul_precision(precision)


def each_backend(precision):
    def choose():
        torch.backends.mkldnn.matmul.fp32_precision = precision
        torch.backends.cuda.matmul.fp32_precision = "tf32"

    return choose


def set_all_backends(precision):
    """Torch's own test tools, which test_contract.py uses, forbid what a user may do: not in here."""
    with getattr(torch.backends, "__allow_nonbracketed_mutation")():  # no name of a class's own
        torch.backends.fp32_precision = precision


def all_backends():
    set_all_backends("tf32")


def tf32():
    torch.backends.cuda.matmul.allow_tf32 = True


def settings():
    """All of torch's settings of float32 products, as they can be asked for."""
    try:
        found = [torch.get_float32_matmul_precision()]
    except RuntimeError:  # those of the backends have been set apart
        found = []
    if NEWER:
        backends = (torch.backends, torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
        found += [backend.fp32_precision for backend in backends]
    return found


@pytest.fixture
def _settings_restored():
    yield
    if NEWER:
        set_all_backends("none")
        for backend in (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul):
            backend.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")


PRECISIONS = {
    "high": overall("high"),
    "medium": overall("medium"),
    "allow_tf32": tf32,
    **({"mkldnn": each_backend("bf16"), "overall": all_backends} if NEWER else {}),
}


@pytest.mark.usefixtures("_settings_restored")
@each(choose=PRECISIONS, rule=RULES)
def test_matmul_precision_changes_no_bit(choose, rule):
    """Of matrices large enough for a CPU that multiplies in bfloat16 to do so; and the settings stay."""
    weights = [mark_orthogonal(nn.Parameter(point(256, 256, dtype=torch.float32))) for _ in range(2)]
    for index, weight in enumerate(weights):
        opt = RULES[rule]([weight])
        if index == 1:
            PRECISIONS[choose]()
            before = settings()
        for step in range(4):
            weight.grad = gaussian(256, 256, dtype=torch.float32, seed=step)
            opt.step()
            if step == 1:  # its moments leave the frame of W, and enter it again
                unmark(weight)
                weight.grad = None
                opt.step()
                mark_orthogonal(weight)
    assert settings() == before
    assert torch.equal(*weights)


@pytest.mark.usefixtures("_settings_restored")
def test_a_setting_inherited_from_all_backends_still_is():
    if not NEWER:
        pytest.skip("torch has no setting of all backends")
    set_all_backends("tf32")
    with FullPrecision("cpu"):
        assert torch.backends.cuda.matmul.fp32_precision == "ieee"
    set_all_backends("ieee")
    assert torch.backends.cuda.matmul.fp32_precision == "ieee"


@pytest.mark.compiled
@pytest.mark.usefixtures("_settings_restored")
@pytest.mark.parametrize("precision", ["highest", "high"])
def test_a_compiled_step_says_what_it_cannot_change(precision):
    torch.set_float32_matmul_precision(precision)
    weight = mark_orthogonal(nn.Parameter(torch.eye(3)))
    weight.grad = torch.ones(3, 3)
    opt = Adam([weight])
    torch._dynamo.reset()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.compile(opt.step, backend="eager", fullgraph=True)()
    said = [str(w.message) for w in caught if "manifold_opt multiplies" in str(w.message)]
    assert len(said) == (precision != "highest")


@pairs(rule=RULES, fused=[False, True], unscaled=[False, True])
def test_a_gradient_scaler(rule, fused, unscaled):
    """Both ways of torch.amp: it unscales and skips the step itself, or leaves both to a fused one."""
    model, other = net(), net()
    marked = [p for p in model.parameters() if constraint_of(p) is not None]
    free = [p for p in model.parameters() if constraint_of(p) is None]
    opt = RULES[rule]([*marked, *free], fused=fused)
    plain = RULES[rule](
        [{"params": [p for p in other.parameters() if (constraint_of(p) is None) == k]} for k in (False, True)]
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1000)
    for step in range(6):
        give(other, step)
        give(model, step, scale=float(scaler.get_scale()))
        scaler.scale(torch.zeros(()))  # as a loss is, before its gradients come
        if step in (1, 3):  # in the very first, torch's fused SGD takes its momentum from memory nobody has written
            free[0].grad[0] = float("inf")
            before = [p.detach().clone() for p in model.parameters()]
        if unscaled:
            scaler.unscale_(opt)
        scaler.step(opt)
        scaler.update()
        if step in (1, 3):
            assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
        else:
            plain.step()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    for p in marked:
        assert float(opt.state[p]["step"]) == 4


# Processes.


def trained_by_two(rule, kind, rank):
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 4))
    torch.manual_seed(0)
    for layer in (model[0], model[2]):
        nn.init.normal_(layer.weight)
        mark_orthogonal(layer, "weight")
    wrapped = DistributedDataParallel(model)
    if kind == "zero":
        classes = {"SGD": (SGD, {"momentum": 0.9}), "Adam": (Adam, {})}
        cls, options = classes[rule]
        opt = ZeroRedundancyOptimizer(wrapped.parameters(), optimizer_class=cls, lr=0.01, **options)
    else:
        opt = RULES[rule](wrapped.parameters())
    for step in range(8):
        opt.zero_grad()
        wrapped(gaussian(5, 6, dtype=torch.float32, seed=2 * step + rank)).square().sum().backward()
        opt.step()
    return model.state_dict()


def worker(rank, path, rule):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}/rendezvous", rank=rank, world_size=2)
    torch.save({kind: trained_by_two(rule, kind, rank) for kind in ("ddp", "zero")}, f"{path}/{rank}.pt")
    torch.distributed.barrier()
    os._exit(0)  # taking gloo and DistributedDataParallel apart in order sometimes waits for ever


@pytest.mark.parametrize("rule", [pytest.param("SGD", marks=pytest.mark.slow), "Adam"])
def test_two_processes_end_with_the_same_bits(rule, tmp_path):
    """Under DistributedDataParallel, alone and with ZeroRedundancyOptimizer."""
    torch.multiprocessing.spawn(worker, (str(tmp_path), rule), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    for kind, values in first.items():
        assert all(torch.equal(values[key], second[kind][key]) for key in values)
        assert max(orthogonality_error(values[key]) for key in ("0.weight", "2.weight")) < 1e-5
        assert not torch.equal(values["0.weight"], point(6, 6, dtype=torch.float32))
