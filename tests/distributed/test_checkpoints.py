"""Checkpoints of sharded weights: onto the same ranks bit for bit, onto others to rounding."""

import copy
import math

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor

from manifold_opt import SGD, Adam, check, constraint_of, orthogonality_error, unmark

from .layouts import LAYOUTS, OPTIMIZERS, build, optimizer, train, whole
from .workers import run

RULES = {
    "SGD": ("SGD", torch.float32, {}),
    "Adam": ("Adam", torch.float32, {"amsgrad": True}),
    "AdamW": ("AdamW", torch.bfloat16, {}),
    "by block": ("Adam", torch.float32, {"second_moment": "block"}),
    "Muon": ("Muon", torch.float32, {}),
}
SHARDED = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "master")


def model(layout, world, dtype=torch.float32, mark=True):
    """Marked weights that fit any layout, and an unmarked one; whole without a layout."""
    net = build("Shard(1)", dtype, mark=mark)
    net.append(nn.Linear(8, 8, bias=False, dtype=dtype))
    nn.init.normal_(net[-1].weight, generator=torch.Generator().manual_seed(9))
    if layout is not None:
        LAYOUTS[layout].shard(net, world)
        assert all(isinstance(p, DTensor) for p in net.parameters())
    return net


def begun(layout, world, name):
    rule, dtype, options = RULES[name]
    net = model(layout, world, dtype)
    return net, optimizer(rule, net.parameters(), **options)


def values(net):
    return [whole(p) for p in net.parameters()]


def agree(one, other, *, exact):
    for a, b in zip(one, other, strict=True):
        # Rounding of products of matrices in batches of other sizes, over three steps.
        atol = 0 if exact else 8 * torch.finfo(a.dtype).eps * math.sqrt(max(a.shape))
        torch.testing.assert_close(a, b, rtol=0, atol=atol)


def saved(layout, world, name, path):
    """Train, save, and train on."""
    net, opt = begun(layout, world, name)
    train(net.parameters(), opt, 3)
    dcp.save({"model": get_model_state_dict(net), "optimizer": get_optimizer_state_dict(net, opt)}, checkpoint_id=path)
    train(net.parameters(), opt, 3, first=3)
    return values(net)


def resumed(layout, world, name, path):
    net, opt = begun(layout, world, name)
    before = values(net)
    state = {"model": get_model_state_dict(net), "optimizer": get_optimizer_state_dict(net, opt)}
    agree(before, values(net), exact=True)
    dcp.load(state, checkpoint_id=path)
    set_model_state_dict(net, state["model"])
    set_optimizer_state_dict(net, opt, state["optimizer"])
    train(net.parameters(), opt, 3, first=3)
    assert check(net, opt) == [], check(net, opt)
    assert max(orthogonality_error(net).values()) < (0.1 if RULES[name][1] == torch.bfloat16 else 1e-5)
    return values(net)


def more(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("name", "saver", "loader"),
    [
        ("Adam", ("hybrid", 4), ("hybrid", 4)),
        ("AdamW", ("aligned", 2), ("aligned", 2)),
        ("SGD", ("Shard(1)", 2), ("Shard(1)", 2)),
        ("Adam", ("aligned", 4), ("aligned", 2)),
        ("AdamW", ("aligned", 4), ("aligned", 1)),
        ("SGD", ("aligned", 4), (None, 1)),
        ("Adam", (None, 1), ("aligned", 4)),
        ("Muon", ("rowwise", 2), ("rows, colwise", 4)),
        ("by block", ("aligned", 2), ("Shard(1)", 2)),
        more("AdamW", ("hybrid", 4), ("hybrid", 4)),
        more("Adam", ("rows, colwise", 4), ("rows, colwise", 4)),
        more("Muon", ("aligned", 2), ("aligned", 2)),
        more("by block", ("aligned", 4), ("aligned", 4)),
        more("AdamW", (None, 1), ("colwise", 2)),
        more("SGD", ("colwise", 2), ("rows, rowwise", 4)),
    ],
)
def test_a_run_goes_on_from_a_checkpoint(name, saver, loader, tmp_path):
    path = str(tmp_path)
    expected = run(saver[1], saved, *saver, name, path)
    for found in run(loader[1], resumed, *loader, name, path):
        exact = saver == loader
        marked = slice(None if exact or name != "Muon" else -1)  # torch's Muon multiplies in bfloat16
        agree(expected[0][marked], found[marked], exact=exact)


def through_rank_zero(name):
    """Whole tensors on rank 0, broadcast to a new model."""
    net, opt = begun("aligned", 4, name)
    train(net.parameters(), opt, 3)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(net, options=options), get_optimizer_state_dict(net, opt, options=options)
    tensors = [value for entry in state[1].get("state", {}).values() for value in entry.values()]
    assert not any(isinstance(value, DTensor) for value in tensors)
    state = copy.deepcopy(state)  # whole tensors, like counts of steps, are those of the optimizer
    train(net.parameters(), opt, 3, first=3)
    again, other = begun("aligned", 4, name)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(again, state[0], options=options)
    set_optimizer_state_dict(again, other, state[1], options=options)
    train(again.parameters(), other, 3, first=3)
    return values(net), values(again)


@pytest.mark.parametrize("name", ["Adam", "SGD", "AdamW"])
def test_a_full_state_dict_is_broadcast(name):
    for expected, found in run(4, through_rank_zero, name):
        agree(expected, found, exact=True)


def entries(name, layout, steps):
    """What the state holds, and what state_dict does."""
    net, opt = begun(layout, 4, name)
    train(net.parameters(), opt, steps)
    parameters, state, held = list(net.parameters()), opt.state_dict()["state"], []
    for k, p in enumerate(parameters[:-1]):
        keys = sorted(state.get(k, {}))
        held.append(keys)
        for key in keys:
            assert isinstance(state[k][key], DTensor) == (key in SHARDED), key
            if key in SHARDED:
                assert state[k][key].placements == p.placements
                assert state[k][key].device_mesh == p.device_mesh
                assert state[k][key].shape == p.shape
        if steps:
            assert sorted(opt.state[p].keys()) == ["constrained", "step"]
            with pytest.raises(KeyError, match="state_dict"):
                opt.state[p]["exp_avg"]
    return held


@pytest.mark.parametrize(
    ("name", "layout"), [("SGD", "hybrid"), ("Adam", "aligned"), ("AdamW", "Shard(1)"), ("Muon", "rows, colwise")]
)
def test_the_state_is_with_the_owners_and_state_dict_gathers_it(name, layout):
    """The same keys on every rank, and those of a whole weight."""
    net, opt = begun(None, 1, name)
    train(net.parameters(), opt, 2)
    expected = [sorted(opt.state[p]) for p in list(net.parameters())[:-1]]
    assert all(held == expected for held in run(4, entries, name, layout, 2))
    assert len({str(held) for held in run(4, entries, name, layout, 0)}) == 1


def cloned(state):
    """A state of its own: torch.optim saves and loads without a copy."""
    entries = {k: {key: value.clone() for key, value in entry.items()} for k, entry in state["state"].items()}
    return {**state, "state": entries}


def loaded(name, form):
    """Loading into an optimizer that has stepped, and again."""
    net, opt = begun("aligned", 4, name)
    train(net.parameters(), opt, 3)
    state = opt.state_dict()
    if form == "whole":
        for k in range(len(net) - 1):  # torch takes no whole moments of an unmarked DTensor
            state["state"][k] = {key: whole(value) for key, value in state["state"][k].items()}
    weights = {key: value.clone() for key, value in net.state_dict().items()}
    state = cloned(state)
    train(net.parameters(), opt, 3, first=3)
    found = [values(net)]
    for _ in range(2):
        net.load_state_dict(weights)
        opt.load_state_dict(cloned(state))
        train(net.parameters(), opt, 3, first=3)
        found.append(values(net))
    return found


@pytest.mark.parametrize(
    ("name", "form"), [("Adam", "DTensors"), ("SGD", "whole"), ("AdamW", "whole"), ("AdamW", "DTensors")]
)
def test_an_optimizer_that_has_stepped_goes_back(name, form):
    for expected, *found in run(4, loaded, name, form):
        for one in found:
            agree(expected, one, exact=True)


def flattened(name):
    """A checkpoint with one entry per parameter and key, as a stage of a pipeline saves it."""
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    net, opt = begun("aligned", 2, name)
    train(net.parameters(), opt, 3)
    state = copy.deepcopy((get_model_state_dict(net), get_optimizer_state_dict(net, opt, options=options)))
    train(net.parameters(), opt, 3, first=3)
    other, second = begun("aligned", 2, name)
    set_model_state_dict(other, state[0])
    set_optimizer_state_dict(other, second, state[1], options=options)
    train(other.parameters(), second, 3, first=3)
    return values(net), values(other)


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_a_flattened_state(name):
    for expected, found in run(2, flattened, name):
        agree(expected, found, exact=True)


def loaded_without_momentum():
    """A checkpoint of SGD without momentum, loaded into an optimizer that has some: it starts anew."""
    plain = SGD(model("aligned", 2).parameters(), lr=0.05)
    train(plain.param_groups[0]["params"], plain, 1)
    net = model("aligned", 2)
    opt = SGD(net.parameters(), lr=0.05, momentum=0.9)
    train(net.parameters(), opt, 2)
    state = plain.state_dict()
    state["param_groups"][0]["momentum"] = 0.9
    opt.load_state_dict(state)
    entries = list(opt.state_dict()["state"].values())[:-1]
    assert not any("momentum_buffer" in entry for entry in entries)
    train(net.parameters(), opt, 1)
    return [float(opt.state[p]["step"]) for p in list(net.parameters())[:-1]]


def test_a_state_without_momentum_replaces_the_momentum():
    assert all(set(counts) == {2.0} for counts in run(2, loaded_without_momentum))


def unsaved(layout, world):
    """Loaded, and saved again before any step."""
    net, opt = begun(layout, world, "Adam")
    train(net.parameters(), opt, 3)
    state = opt.state_dict()
    other = OPTIMIZERS["Adam"](net.parameters(), lr=0.5, amsgrad=True)
    other.load_state_dict(state)
    found = other.state_dict()
    for k, entry in state["state"].items():
        assert entry.keys() == found["state"][k].keys()
        for key, value in entry.items():
            assert torch.equal(whole(value), whole(found["state"][k][key])), key
    assert found["param_groups"] == state["param_groups"]


def test_what_was_loaded_is_saved_again():
    run(4, unsaved, "aligned", 4)


def converted(layout, world):
    """Moments of torch.optim.Adam, then ours, then torch's again after unmarking."""
    net = model(layout, world, mark=False)
    plain = torch.optim.Adam(net.parameters(), lr=0.01, amsgrad=True)
    train(net.parameters(), plain, 3)
    ours = model(layout, world)
    opt = Adam(ours.parameters(), lr=0.01, amsgrad=True)
    opt.load_state_dict(plain.state_dict())
    train(ours.parameters(), opt, 3, first=3)
    found = values(ours)
    unmark(ours)
    train(ours.parameters(), opt, 3, first=6)
    assert constraint_of(ours) == {}
    assert all("constrained" not in state for state in opt.state.values())
    moments = [
        whole(opt.state[p][key]) for p in ours.parameters() for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    ]
    return found, values(ours), moments


@pytest.mark.parametrize(("layout", "world"), [("aligned", 4), ("Shard(1)", 2), ("rows, colwise", 4)])
def test_moments_are_converted_from_and_to_those_of_torch(layout, world):
    marked, free, moments = converted(None, 1)
    for found, found_free, found_moments in run(world, converted, layout, world):
        agree(marked, found, exact=False)
        # Entries of unmarked weights are of size one and more, and Adam divides small moments by small ones.
        torch.testing.assert_close(found_free, free, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found_moments, moments, rtol=1e-4, atol=1e-5)
