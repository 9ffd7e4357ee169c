"""A constraint is never lost in silence: whatever is done to a model, it is there afterwards, or ``check`` says so."""

import copy
import io
import pickle
import subprocess
import sys
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from manifold_opt import (
    SGD,
    Adam,
    Orthogonal,
    check,
    constraint_of,
    mark_orthogonal,
    mark_positive,
    mark_recurrent,
    mark_spectral,
    mark_unit_norm,
    orthogonal_average,
    orthogonality_error,
    project_to_manifold_,
    unmark,
)

from ..helpers import gaussian

CONSTRAINT = Orthogonal(blocks=3)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.GRU(3, 4, batch_first=True)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.rnn(x)[0][:, -1])


FORMS = {
    "parameter": lambda net: mark_orthogonal(net.rnn.weight_hh_l0, blocks=3),
    "module": lambda net: mark_orthogonal(net, "rnn.weight_hh_l0"),
    "recurrent": mark_recurrent,
}


def train(model, opt, steps=2):
    for step in range(steps):
        opt.zero_grad()
        x = gaussian(5, 6, 3, seed=step).to(next(model.parameters()))
        model(x).square().sum().backward()
        opt.step()


def start(form):
    torch.manual_seed(0)
    net = Net()
    FORMS[form](net)
    opt = Adam(net.parameters(), lr=0.01)
    train(net, opt)
    return net, opt


def weight_of(model):
    return next(p for name, p in model.named_parameters() if name.endswith("weight_hh_l0"))


def sent(net):
    return pickle.loads(bytes(ForkingPickler.dumps(net)))


def saved(net):
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


COPIES = {
    "deepcopy": copy.deepcopy,
    "deepcopy twice": lambda net: copy.deepcopy(copy.deepcopy(net)),
    "pickle": lambda net: pickle.loads(pickle.dumps(net)),
    "torch.save": saved,
    "torch.save, then deepcopy": lambda net: copy.deepcopy(saved(net)),
    "multiprocessing": sent,
    "AveragedModel": AveragedModel,
    "AveragedModel of a pickle": lambda net: AveragedModel(pickle.loads(pickle.dumps(net))),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("way", COPIES)
def test_a_copy_is_marked(form, way):
    net, _ = start(form)
    copied = COPIES[way](net)
    weight = weight_of(copied)
    assert weight is not weight_of(net)
    assert constraint_of(weight) == CONSTRAINT
    assert constraint_of(weight_of(net)) == CONSTRAINT
    opt = Adam(copied.parameters(), lr=0.01)
    train(copied, opt)
    assert orthogonality_error(weight) < 1e-5
    assert check(copied, opt) == []


def test_a_model_and_its_optimizer_are_copied_together():
    """And go on bit for bit as the originals."""
    net, opt = start("module")
    for copied, other in (copy.deepcopy((net, opt)), pickle.loads(pickle.dumps((net, opt)))):
        assert check(copied, other) == []
        expected, original = copy.deepcopy((net, opt))
        train(copied, other)
        train(expected, original)
        assert all(torch.equal(a, b) for a, b in zip(copied.parameters(), expected.parameters(), strict=True))


STAYS = {
    "to device": lambda net: net.to("cpu"),
    "double and back": lambda net: net.double().float(),
    "share_memory": lambda net: net.share_memory(),
    "requires_grad_": lambda net: net.requires_grad_(False).requires_grad_(True),
    "load_state_dict": lambda net: net.load_state_dict(copy.deepcopy(net.state_dict())),
    "train and eval": lambda net: net.eval().train(),
    "zero_grad": lambda net: net.zero_grad(),
    "flatten_parameters": lambda net: net.rnn.flatten_parameters(),
    "functional_call": lambda net: functional_call(net, dict(net.named_parameters()), (torch.ones(1, 2, 3),)),
    "initialize again": lambda net: nn.init.xavier_normal_(net.rnn.weight_hh_l0.data),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("operation", STAYS)
@pytest.mark.filterwarnings("ignore:A block of shape")
def test_the_same_parameter_stays_marked(form, operation):
    net, opt = start(form)
    STAYS[operation](net)
    assert constraint_of(weight_of(net)) == CONSTRAINT
    if operation == "initialize again":
        assert check(net, opt) == [
            "rnn.weight_hh_l0 is not orthogonal to rounding: project_to_manifold_(model) puts it back, and so does the "
            "next step."
        ]
        project_to_manifold_(net)
    train(net, opt)
    assert check(net, opt) == []
    assert orthogonality_error(weight_of(net)) < 1e-5


@pytest.mark.parametrize("form", FORMS)
def test_half_precision_goes_on_in_float32_and_comes_back(form):
    net, opt = start(form)
    opt.zero_grad()
    net.half()
    assert constraint_of(weight_of(net)) == CONSTRAINT
    weight_of(net).grad = torch.ones_like(weight_of(net))
    opt.step()
    state = opt.state[weight_of(net)]
    assert torch.equal(state["master"].half(), weight_of(net))
    assert check(net, opt) == []
    net.float()
    train(net, opt)
    assert "master" not in state
    assert check(net, opt) == []


def swapped(net, flag):
    setter = getattr(torch.__future__, flag)
    setter(True)
    try:
        return net.double()
    finally:
        setter(False)


def replaced(net):
    net.rnn.weight_hh_l0 = nn.Parameter(torch.randn(12, 4))
    return net


def emptied(net):
    net = net.to("meta").to_empty(device="cpu")
    for p in net.parameters():
        nn.init.normal_(p)
    return net


def assigned(net):
    net.load_state_dict(copy.deepcopy(net.state_dict()), assign=True)
    return net


REPLACES = {
    "setattr": replaced,
    "meta, then to_empty": emptied,
    "meta": lambda net: net.to("meta"),
    "load_state_dict(assign=True)": assigned,
    "overwrite on conversion": lambda net: swapped(net, "set_overwrite_module_params_on_conversion"),
    "swap on conversion": lambda net: swapped(net, "set_swap_module_params_on_conversion"),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("operation", REPLACES)
def test_where_the_parameter_becomes_another_it_is_marked_or_reported(form, operation):
    net, opt = start(form)
    if operation == "swap on conversion":
        opt.zero_grad()  # or torch refuses: the accumulated gradients hold on to the parameters
    net = REPLACES[operation](net)
    problems = check(net, opt)
    assert problems
    assert any("weight_hh_l0" in problem or "(12, 4)" in problem for problem in problems)
    if form != "parameter":
        kept = constraint_of(weight_of(net)) == CONSTRAINT
        assert kept == (operation in ("load_state_dict(assign=True)", "swap on conversion"))
        # The module remembers: another optimizer is told of it, and one of this package marks what stands there.
        stock = torch.optim.Adam(net.parameters())
        assert kept or any("has lost its constraint" in problem for problem in check(net, stock))
        Adam(net.parameters())
        assert constraint_of(weight_of(net)) == CONSTRAINT


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.usefixtures("process_group")
def test_distributed_wrappers(form):
    net, _ = start(form)
    wrapped = DistributedDataParallel(net)
    assert constraint_of(weight_of(wrapped)) == CONSTRAINT
    opt = ZeroRedundancyOptimizer(wrapped.parameters(), optimizer_class=Adam, lr=0.01)
    train(wrapped, opt)
    assert orthogonality_error(weight_of(net)) < 1e-5
    assert check(wrapped, opt.optim if hasattr(opt, "optim") else opt) == []


@pytest.mark.parametrize("rule", [SGD, Adam])
@pytest.mark.usefixtures("process_group")
def test_zero_resumes_bit_for_bit(rule):
    """Which hands over states one by one, behind the back of the optimizer that it wraps."""
    options = {"momentum": 0.9} if rule is SGD else {}

    def build():
        net, _ = start("module")
        return net, ZeroRedundancyOptimizer(net.parameters(), optimizer_class=rule, lr=0.01, **options)

    net, opt = build()
    train(net, opt)
    opt.consolidate_state_dict()
    saved = copy.deepcopy((net.state_dict(), opt.state_dict()))
    other, resumed = build()
    other.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    for model, optimizer in ((net, opt), (other, resumed)):
        train(model, optimizer)
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("form", FORMS)
def test_a_compiled_model(form):
    net, opt = start(form)
    compiled = torch.compile(net, backend="eager")
    assert check(compiled, opt) == []
    assert constraint_of(weight_of(compiled)) == CONSTRAINT


WITHOUT_THE_PACKAGE = """
import sys
import torch
torch.save(torch.load(sys.argv[1], weights_only=True), sys.argv[2])
assert "manifold_opt" not in sys.modules
"""


def test_a_parameter_saved_by_itself_loads_anywhere(tmp_path):
    """With weights_only=True and before this package is imported; and it brings its mark back."""
    layer = nn.GRU(3, 4)
    marked = {
        "gates": mark_orthogonal(layer, "weight_hh_l0", which=(0, 2), gain=0.5),
        "unequal": mark_orthogonal(nn.Parameter(gaussian(7, 3)), blocks=(3, 4)),
        "filters": mark_unit_norm(nn.Parameter(gaussian(3, 2, 2)), dim=1),
        "bounded": mark_spectral(nn.Parameter(gaussian(3, 3)), 0.5),
        "positive": mark_positive(nn.Parameter(torch.ones(3))),
    }
    torch.save(marked, tmp_path / "saved.pt")
    run = [sys.executable, "-c", WITHOUT_THE_PACKAGE, str(tmp_path / "saved.pt"), str(tmp_path / "again.pt")]
    subprocess.run(run, check=True, timeout=100)
    for file in ("saved.pt", "again.pt"):
        loaded = torch.load(tmp_path / file, weights_only=True)
        assert {name: constraint_of(p) for name, p in loaded.items()} == {
            name: constraint_of(p) for name, p in marked.items()
        }


def test_a_mark_of_a_newer_version_is_not_taken_for_none():
    weight = nn.Parameter(torch.eye(3))
    weight._manifold_opt_constraint = ("from the future", 1)
    with pytest.raises(
        ValueError, match=r"the mark \('from the future', 1\), which this version of manifold_opt does not have"
    ):
        Adam([weight])


def child(nets, queue):
    queue.put(
        [(constraint_of(weight_of(net)) == CONSTRAINT, orthogonality_error(weight_of(net)) < 1e-5) for net in nets]
    )


def test_another_process():
    """Of a parameter that was marked by itself and of one that was marked in its module."""
    nets = [start(form)[0] for form in ("parameter", "module")]
    context = torch.multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=child, args=(nets, queue))
    process.start()
    found = queue.get(timeout=100)  # of a process that has failed there is none
    process.join()
    assert found == [(True, True)] * 2


# check, project_to_manifold_ and averaging.


def test_check_says_what_is_wrong():
    net, opt = start("module")
    other = mark_orthogonal(nn.Parameter(torch.eye(3)))
    net.register_parameter("extra", other)
    assert check(net, opt) == ["extra is marked, but in no optimizer that check was given, so none of them updates it."]
    other.requires_grad_(False)
    assert check(net, opt) == []
    foreign = torch.optim.Adam(net.parameters())
    assert any("torch.optim.adam.Adam, which does not keep it" in problem for problem in check(net, foreign))
    opt.state[weight_of(net)]["exp_avg"] = opt.state[weight_of(net)]["exp_avg"].double()
    assert any("its exp_avg torch.float64" in problem for problem in check(net, opt))
    opt.state[weight_of(net)]["exp_avg"][0, 0] = torch.nan
    assert any("exp_avg of" in problem and "is not finite" in problem for problem in check(net, opt))


def test_what_unmark_has_freed_is_not_missed():
    net, opt = start("module")
    unmark(weight_of(net))
    assert check(net, opt) == []
    net.load_state_dict(copy.deepcopy(net.state_dict()), assign=True)
    assert constraint_of(weight_of(net)) is None


@pytest.mark.parametrize("decay", [None, 0.7])
@pytest.mark.parametrize("form", FORMS)
def test_averages_stay_on_the_manifold(form, decay):
    net, opt = start(form)
    plain = AveragedModel(net)
    averaged = AveragedModel(net, avg_fn=orthogonal_average(net, decay))
    for k in range(4):
        train(net, opt, 3)
        averaged.update_parameters(net)
        if k == 0:
            first = [p.detach().clone() for p in averaged.parameters()]
            assert all(torch.equal(a, b) for a, b in zip(first, net.parameters(), strict=True))
        plain.update_parameters(net)
    assert max(orthogonality_error(averaged).values()) < 1e-5
    assert max(orthogonality_error(plain).values()) > 1e-4
    if decay is None:  # biases are averaged as AveragedModel itself does
        torch.testing.assert_close(averaged.module.head.weight, plain.module.head.weight)
    project_to_manifold_(plain)
    assert max(orthogonality_error(plain).values()) < 1e-5
    with pytest.raises(ValueError, match="decay must lie in"):
        orthogonal_average(net, 1.0)


def test_projecting_writes_all_or_nothing():
    net, _ = start("module")
    net.add_module("extra", nn.Linear(3, 3))  # the last one
    mark_orthogonal(net.extra, "weight")
    with torch.no_grad():
        weight_of(net).mul_(1.5)
        net.extra.weight.zero_()
    before = weight_of(net).detach().clone()
    with pytest.raises(ValueError, match="rank-deficient"):
        project_to_manifold_(net)
    assert torch.equal(weight_of(net), before)


def test_the_state_of_an_optimizer_knows_its_constraint():
    """A checkpoint of one marking is not loaded under another in silence."""
    _, opt = start("module")
    state = copy.deepcopy(opt.state_dict())
    for blocks, found in ((1, "blocks=1"), (None, "not marked")):
        other = Net()
        if blocks:
            mark_orthogonal(other.rnn.weight_hh_l0, blocks=blocks)
        fresh = Adam(other.parameters(), lr=0.1)
        before = copy.deepcopy(fresh.state_dict())
        with pytest.raises(ValueError, match=rf"parameter 1 of group 0.*\(12, 4\).*blocks=3.*{found}.*before loading"):
            fresh.load_state_dict(copy.deepcopy(state))
        assert fresh.state_dict() == before
    mark_orthogonal(other.rnn.weight_hh_l0, blocks=3)
    fresh.load_state_dict(state)
    unmark(other.rnn.weight_hh_l0)
    train(other, fresh)


def test_an_average_with_buffers_counts_as_torchs():
    """A BatchNorm counts its batches in whole numbers."""
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    mark_orthogonal(net, "0.weight")
    ours, theirs = (
        AveragedModel(net, use_buffers=True, **options) for options in ({"avg_fn": orthogonal_average(net)}, {})
    )
    for _ in range(3):
        net(torch.randn(5, 4))
        ours.update_parameters(net)
        theirs.update_parameters(net)
    for key, value in theirs.state_dict().items():
        if key != "module.0.weight":
            torch.testing.assert_close(ours.state_dict()[key], value)
    assert orthogonality_error(ours)["module.0.weight"] < 1e-5


def test_an_average_sees_a_mark_through_a_buffer_in_the_same_memory():
    layer = nn.Linear(4, 4, bias=False)
    mark_orthogonal(layer, "weight")
    layer.register_buffer("view", layer.weight.detach())
    averaged = layer.weight.detach().clone().neg()
    assert orthogonality_error(orthogonal_average(layer, 0.9)(averaged, layer.weight.detach(), 1)) < 1e-5
