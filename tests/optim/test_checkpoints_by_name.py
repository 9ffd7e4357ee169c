"""A state goes with the name of its parameter: torch.distributed.checkpoint, earlier formats, safetensors."""

import copy
import io
import itertools
from collections import defaultdict

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)

from manifold_opt import SGD, Adam, check, mark_orthogonal, mark_recurrent, mark_unit_norm, orthogonality_error
from manifold_opt.manifolds.records import record_from_tensor, record_to_tensor

from ..helpers import gaussian, held_under, pairs

pytestmark = pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")  # of torch.distributed in torch 2.6

RULES = {
    "SGD": lambda params, kind=SGD: kind(params, lr=0.01, momentum=0.9),
    "Adam": lambda params, kind=Adam: kind(params, lr=0.01),
    "AMSGrad": lambda params, kind=Adam: kind(params, lr=0.01, amsgrad=True),
}
ORDERS = {
    "the same": lambda params: params,
    "backwards": lambda params: params[::-1],
    "in groups": lambda params: [{"params": params[3:]}, {"params": params[:3]}],
}


def build(rule="Adam", order="the same", mark=True, **options):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), nn.GRU(4, 4), nn.Linear(4, 3)).double()
    if mark:
        mark_orthogonal(net, "0.weight")
        mark_recurrent(net)
        mark_unit_norm(net, "2.weight")
    return net, RULES[rule](ORDERS[order](list(net.parameters())), **options)


def run(net, opt, first=0, steps=3):
    for step in range(first, first + steps):
        for k, p in enumerate(net.parameters()):
            p.grad = gaussian(*p.shape, seed=100 * step + k)
        opt.step()


def assert_goes_on(net, opt, other, resumed, atol=0.0):
    run(net, opt, 3)
    run(other, resumed, 3)
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(q, p, rtol=0, atol=atol)
    assert check(other, resumed) == []


@pairs(flat=[False, True], order=ORDERS, rule=RULES)
def test_a_state_loaded_by_name_goes_on(rule, order, flat):
    """Bit for bit, or where blocks lie beside others in a batch to rounding: Adam divides by it."""
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    net, opt = build(rule)
    run(net, opt)
    saved = copy.deepcopy((net.state_dict(), get_optimizer_state_dict(net, opt, options=options)))
    other, resumed = build(rule, order)
    other.load_state_dict(saved[0])
    set_optimizer_state_dict(other, resumed, saved[1], options=options)
    assert [held_under(resumed, p) for p in other.parameters()] == [held_under(opt, p) for p in net.parameters()]
    assert_goes_on(net, opt, other, resumed, 0.0 if order == "the same" else 1e-10)


def test_a_name_marked_otherwise_is_refused_by_its_own_name():
    """Not the one that happens to be in its place."""
    net, opt = build()
    run(net, opt)
    saved = copy.deepcopy(get_optimizer_state_dict(net, opt))
    other, _ = build(mark=False)
    mark_orthogonal(other, "1.weight_hh_l0", which=(0, 1))
    mark_orthogonal(other, "0.weight")
    mark_unit_norm(other, "2.weight")
    resumed = Adam(reversed(list(other.named_parameters())))
    with pytest.raises(
        ValueError, match=r"\(1.weight_hh_l0\), shape \(12, 4\), marked as Orthogonal\(blocks=3, dim=0, "
    ):
        set_optimizer_state_dict(other, resumed, saved)


@pytest.fixture
def process_group():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def saved_by_dcp(net, opt, folder, without=()):
    values, state = get_state_dict(net, opt)
    for group in state["param_groups"]:
        for option in without:
            del group[option]
    dcp.save({"model": values, "opt": state}, checkpoint_id=folder)


@pytest.mark.parametrize("way", ["through a stock optimizer", "through a file"])
@pytest.mark.usefixtures("process_group")
def test_the_recipes_for_a_distributed_checkpoint_of_torchs_optimizer(way, tmp_path):
    """dcp.load wants every key of what it fills, and a stock checkpoint has neither our options nor our record."""
    free, stock = build(mark=False, kind=torch.optim.Adam)
    free.load_state_dict(build()[0].state_dict())
    run(free, stock)
    saved_by_dcp(free, stock, tmp_path / "stock")
    net, opt = build()
    if way == "through a stock optimizer":
        values, state = get_state_dict(net, torch.optim.Adam(net.parameters()))
        dcp.load({"model": values, "opt": state}, checkpoint_id=tmp_path / "stock")
    else:
        dcp_to_torch_save(tmp_path / "stock", tmp_path / "stock.pt")
        loaded = torch.load(tmp_path / "stock.pt", weights_only=True)
        values, state = loaded["model"], loaded["opt"]
    set_state_dict(net, opt, model_state_dict=values, optim_state_dict=state)
    other, resumed = build()
    other.load_state_dict(free.state_dict())
    resumed.load_state_dict(copy.deepcopy(stock.state_dict()))
    assert_goes_on(net, opt, other, resumed)
    assert max(orthogonality_error(net).values()) < 1e-14


@pytest.mark.usefixtures("process_group")
def test_a_distributed_checkpoint_from_before_an_option_existed(tmp_path):
    net, opt = build()
    run(net, opt)
    saved_by_dcp(net, opt, tmp_path / "old", without=["nonfinite", "metric"])
    dcp_to_torch_save(tmp_path / "old", tmp_path / "old.pt")
    loaded = torch.load(tmp_path / "old.pt", weights_only=True)
    other, resumed = build()
    set_state_dict(other, resumed, model_state_dict=loaded["model"], optim_state_dict=loaded["opt"])
    assert_goes_on(net, opt, other, resumed)


def test_a_stock_checkpoint_leaves_a_group_its_own_options():
    """Ours, which it does not know; torch's own it brings."""
    net, _ = build()
    groups = [{"params": [p], "retraction": name} for p, name in zip(net[0].parameters(), ("qr", "exp"), strict=True)]
    opt = Adam(groups, lr=0.5, nonfinite="raise")
    stock = torch.optim.Adam([{"params": [p]} for p in net[0].parameters()], lr=0.25)
    opt.load_state_dict(stock.state_dict())
    assert [(g["retraction"], g["nonfinite"], g["lr"]) for g in opt.param_groups] == [
        ("qr", "raise", 0.25),
        ("exp", "raise", 0.25),
    ]


def as_of_before(opt):
    """The state_dict that versions before wrote: a one in each state, the constraints by position in the groups."""
    older = copy.deepcopy(opt.state_dict())
    for group in older["param_groups"]:
        held = [(i, older["state"][i].get("constrained")) for i in group["params"] if i in older["state"]]
        group["constraints"] = tuple(
            (group["params"].index(i), *record_from_tensor(tag)) for i, tag in held if tag is not None
        )
    for state in older["state"].values():
        if "constrained" in state:
            state["constrained"] = torch.ones(())
    return older


@pytest.mark.parametrize("json", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_a_checkpoint_of_an_earlier_version_loads(rule, json):
    net, opt = build(rule)
    run(net, opt)
    older = as_of_before(opt)
    if json:  # which knows no tuples
        for group in older["param_groups"]:
            group["constraints"] = [list(record) for record in group["constraints"]]
    other, resumed = build(rule)
    other.load_state_dict(copy.deepcopy(net.state_dict()))
    resumed.load_state_dict(older)
    assert "constraints" not in resumed.param_groups[0]
    assert [held_under(resumed, p) for p in other.parameters()] == [held_under(opt, p) for p in net.parameters()]
    assert_goes_on(net, opt, other, resumed)


def test_a_checkpoint_of_an_earlier_version_under_another_mark_is_refused():
    net, opt = build()
    run(net, opt)
    other, _ = build(mark=False)
    mark_orthogonal(other, "1.weight_hh_l0", which=(0,))
    resumed = Adam(other.parameters())
    with pytest.raises(ValueError, match=r"parameter 0 of group 0, shape \(4, 4\), marked as Orthogonal\(blocks=1"):
        resumed.load_state_dict(as_of_before(opt))
    assert not resumed.state


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.complex64])
def test_a_record_survives_whatever_dtype_it_is_loaded_as(dtype):
    """torch casts every entry of a state to its parameter's dtype."""
    weight = mark_orthogonal(nn.Parameter(gaussian(11, 4).to(dtype)), blocks=(4, 3, 4), which=(0, 2), gain=0.1)
    opt = Adam([weight], lr=0.01)
    weight.grad = gaussian(11, 4, seed=2).to(dtype)
    opt.step()
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    resumed = Adam([weight])
    torch.optim.Optimizer.load_state_dict(resumed, torch.load(file, weights_only=True))  # as a subclass might
    assert held_under(resumed, weight) == ("orthogonal", (4, 3, 4), 0, 0.1, (0, 2), True)
    file.seek(0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert resumed.state[weight]["constrained"].dtype == torch.float32
    assert torch.equal(resumed.state[weight]["constrained"], opt.state[weight]["constrained"])


def test_a_tag_that_does_not_say_which_is_taken_for_that_of_today():
    """One of an earlier version, handed over state by state, as ZeroRedundancyOptimizer loads a checkpoint."""
    (net, opt), (other, resumed) = build(), build()
    run(net, opt)
    other.load_state_dict(copy.deepcopy(net.state_dict()))
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        resumed.state[q] = {key: value.clone() for key, value in opt.state[p].items()}
        if "constrained" in resumed.state[q]:
            resumed.state[q]["constrained"] = torch.ones(())
    assert_goes_on(net, opt, other, resumed)


def reset(state):
    for entries in state.values():
        for value in entries.values():
            value.zero_()


def replaced_by_zeros(state):
    for entries in state.values():
        for key in entries:
            entries[key] = torch.zeros_like(entries[key])


def averaged(state):
    for entries in state.values():
        for key, value in entries.items():
            entries[key] = (value + value + value) / 3


@pytest.mark.parametrize("way", [reset, replaced_by_zeros, averaged])
@pytest.mark.parametrize("rule", RULES)
def test_a_recipe_for_all_tensors_of_a_state_spoils_nothing(rule, way):
    """The record has been written to as well: it is taken for that of today's mark."""
    net, opt = build(rule)
    run(net, opt)
    way(opt.state)
    other, resumed = build(rule)
    other.load_state_dict(copy.deepcopy(net.state_dict()))
    resumed.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert_goes_on(net, opt, other, resumed)
    assert [held_under(resumed, p) for p in other.parameters() if "constrained" in resumed.state[p]] == [
        ("orthogonal", 1, 0, 1.0, None, True),
        ("orthogonal", 3, 0, 1.0, None, True),
        ("unit_norm", 0, None),
    ]


def test_no_two_entries_of_a_state_share_memory():
    """Which safetensors, among others, refuses to save."""
    net, opt = build()
    run(net, opt)
    spans = sorted(
        (t.data_ptr(), t.data_ptr() + t.nbytes) for state in opt.state.values() for t in state.values() if t.numel()
    )
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))


# What other code does to a state.


def test_part_of_a_state_can_be_set_as_with_torch():
    marked = mark_orthogonal(nn.Parameter(gaussian(4, 4)))
    for optimizer, weight in ((Adam, marked), (torch.optim.Adam, nn.Parameter(gaussian(4, 4)))):
        opt = optimizer([weight], lr=0.01)
        weight.grad = gaussian(4, 4, seed=2)
        opt.step()
        opt.__setstate__({"state": defaultdict(dict)})
        assert (len(opt.state), opt.param_groups[0]["lr"]) == (0, 0.01)
        opt.step()
        assert float(opt.state[weight]["step"]) == 1
        opt.__setstate__({"param_groups": opt.param_groups})
        opt.__setstate__({})
        opt.step()
        assert float(opt.state[weight]["step"]) == 2


def test_code_that_scales_or_averages_all_entries_of_a_state_can_do_so():
    weight = mark_orthogonal(nn.Parameter(gaussian(4, 4)))
    opt = Adam([weight], lr=0.01)
    weight.grad = gaussian(4, 4, seed=2)
    opt.step()
    average = {key: value.clone() for key, value in opt.state[weight].items()}
    for key, value in opt.state[weight].items():
        average[key].mul_(0.9).add_(value, alpha=0.1)
        value.untyped_storage().resize_(value.untyped_storage().nbytes())
    opt.state[weight].update(average)
    opt.step()
    assert held_under(opt, weight) == ("orthogonal", 1, 0, 1.0, None, True)
    for value in opt.state[weight].values():
        value.mul_(0.5)
    opt.step()
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert orthogonality_error(weight) < 1e-5


def test_a_record_that_is_a_number_is_that_of_a_checkpoint_of_before():
    weight = mark_orthogonal(nn.Parameter(gaussian(4, 4)))
    opt = Adam([weight], lr=0.01)
    weight.grad = gaussian(4, 4, seed=2)
    opt.step()
    saved = copy.deepcopy(opt.state_dict())
    saved["state"][0]["constrained"] = 1.0
    opt.load_state_dict(saved)
    opt.step()
    assert held_under(opt, weight) == ("orthogonal", 1, 0, 1.0, None, True)


def test_a_checkpoint_of_before_of_a_table_with_a_padding_row_loads():
    """Its record has no padding row; the moments lie as they do now."""
    table = nn.Embedding(5, 3, padding_idx=0)
    mark_unit_norm(table, "weight")
    opt = Adam(table.parameters(), lr=0.01)
    table.weight.grad = gaussian(5, 3, seed=2).float()
    opt.step()
    saved = copy.deepcopy(opt.state_dict())
    saved["state"][0]["constrained"] = record_to_tensor(("unit_norm", 0))
    opt.load_state_dict(saved)
    opt.step()
    assert held_under(opt, table.weight) == ("unit_norm", 0, 0)


@pytest.mark.filterwarnings("ignore:torch.optim.adam.Adam has moved a marked parameter")
def test_an_entry_of_others_named_master_is_no_master_of_a_float32_parameter():
    weight = mark_orthogonal(nn.Parameter(gaussian(4, 4).float()))
    opt = torch.optim.Adam([weight], lr=0.01)
    weight.grad = gaussian(4, 4, seed=2).float()
    opt.step()
    ours = Adam([weight], lr=0.01)
    ours.load_state_dict(copy.deepcopy(opt.state_dict()))
    ours.state[weight]["master"] = torch.zeros(3)
    ours.step()
    assert orthogonality_error(weight) < 1e-5


def test_a_checkpoint_from_before_nonfinite_was_named_so_loads():
    weight = mark_orthogonal(nn.Parameter(torch.eye(4)))
    saved = Adam([weight], nonfinite="raise").state_dict()
    for group in saved["param_groups"]:
        group["on_fault"] = group.pop("nonfinite")
    opt = Adam([weight])
    opt.load_state_dict(saved)
    assert opt.param_groups[0]["nonfinite"] == "raise"
    assert "on_fault" not in opt.param_groups[0]
