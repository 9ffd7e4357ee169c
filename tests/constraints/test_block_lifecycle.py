"""What happens to a model happens to blocks of unequal size, to batches and to free rows too: copies, checkpoints."""

import copy
import io
import json
import pickle
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim.swa_utils import AveragedModel

from manifold_opt import (
    SGD,
    Adam,
    check,
    constraint_of,
    init,
    mark_orthogonal,
    nearest_orthogonal,
    orthogonal_average,
    orthogonality_error,
    project_to_manifold_,
    unmark,
)

from ..helpers import gaussian, held_under, pairs

MARKS = {
    "uneven": {"blocks": (3, 4, 8)},
    "some": {"blocks": 3, "which": (0, 2)},
    "columns": {"blocks": (2, 3), "which": (1,), "dim": 1, "gain": 1.3},
}
RULES = {
    "SGD": lambda p: SGD(p, lr=0.05, momentum=0.9, dampening=0.5),
    "Adam": lambda p: Adam(p, lr=0.01, amsgrad=True, weight_decay=0.1),
}


def net(mark, seed=0):
    torch.manual_seed(seed)
    model = nn.ModuleDict({"linear": nn.Linear(5, 15), "batch": nn.Conv1d(4, 3, 2)})
    mark_orthogonal(model["linear"], "weight", **MARKS[mark])
    mark_orthogonal(model["batch"], "weight", flatten=False)
    return model


def train(model, opt, steps=3, first=0):
    for step in range(first, first + steps):
        for k, p in enumerate(model.parameters()):
            p.grad = gaussian(*p.shape, dtype=p.dtype, seed=100 * step + k)
        opt.step()
    return model


def start(mark, rule="Adam"):
    model = net(mark)
    opt = RULES[rule](model.parameters())
    return train(model, opt), opt


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": saved,
    "multiprocessing": lambda model: pickle.loads(bytes(ForkingPickler.dumps(model))),
    "AveragedModel": lambda model: AveragedModel(model).module,
}


@pairs(mark=MARKS, rule=RULES, way=COPIES)
def test_a_copy_is_marked_and_goes_on_as_the_original(mark, rule, way):
    model, opt = start(mark, rule)
    copied = COPIES[way](model)
    for name, p in copied.named_parameters():
        assert constraint_of(p) == constraint_of(model.get_parameter(name))
    other = RULES[rule](copied.parameters())
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert check(copied, other) == []
    assert same(train(copied, other, 4, 3), train(model, opt, 4, 3))
    assert max(orthogonality_error(copied).values()) < 1e-5


@pytest.mark.parametrize("mark", MARKS)
@pytest.mark.parametrize("rule", RULES)
def test_model_and_optimizer_copied_together_go_on(mark, rule):
    model, opt = start(mark, rule)
    copies = [copy.deepcopy((model, opt)), pickle.loads(pickle.dumps((model, opt)))]
    train(model, opt, 4, 3)
    for copied, other in copies:
        assert same(train(copied, other, 4, 3), model)


@pairs(mark=MARKS, rule=RULES, way=["torch.save", "distributed", "json"])
def test_a_checkpoint_knows_blocks_of_unequal_size_and_which(mark, rule, way, tmp_path):
    model, opt = start(mark, rule)
    other = net(mark, seed=1)
    resumed = RULES[rule](other.parameters())
    if way == "distributed":
        values, state = get_model_state_dict(model), get_optimizer_state_dict(model, opt)
        set_model_state_dict(other, copy.deepcopy(values))
        set_optimizer_state_dict(other, resumed, copy.deepcopy(state))
    else:
        torch.save([model.state_dict(), opt.state_dict()], tmp_path / "checkpoint.pt")
        values, state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
        if way == "json":  # which knows no tuples
            state["param_groups"] = json.loads(json.dumps(state["param_groups"]))
        other.load_state_dict(values)
        resumed.load_state_dict(state)
    assert check(other, resumed) == []
    assert same(train(other, resumed, 4, 3), train(model, opt, 4, 3))


@pytest.mark.parametrize("mark", MARKS)
def test_a_saved_parameter_loads_with_weights_only(mark, tmp_path):
    weight = start(mark)[0]["linear"].weight
    torch.save(weight, tmp_path / "weight.pt")
    loaded = torch.load(tmp_path / "weight.pt", weights_only=True)
    assert torch.equal(loaded, weight)
    assert constraint_of(loaded) == constraint_of(weight)


OTHERS = [
    ({"blocks": (3, 4, 8)}, {"blocks": (4, 3, 8)}, r"blocks=\(3, 4, 8\).*blocks=\(4, 3, 8\)"),
    ({"blocks": (5, 5, 5)}, {"blocks": 3}, r"blocks=\(5, 5, 5\).*blocks=3"),
    ({"blocks": 3, "which": (0, 2)}, {"blocks": 3, "which": (0, 1)}, r"which=\(0, 2\).*which=\(0, 1\)"),
    ({"blocks": 3, "which": (0, 2)}, {"blocks": 3}, r"which=\(0, 2\).*here it is Orthogonal\(blocks=3, dim=0"),
    ({"flatten": False}, {"blocks": 1}, r"flatten=False.*here it is Orthogonal\(blocks=1, dim=0, gain=1.0\)"),
]


@pytest.mark.parametrize(("then", "now", "match"), OTHERS)
@pytest.mark.parametrize("rule", RULES)
def test_a_checkpoint_under_another_mark_is_refused(then, now, match, rule):
    weights = [mark_orthogonal(nn.Parameter(gaussian(15, 5)), **mark) for mark in (then, now)]
    opt, other = (RULES[rule]([weight]) for weight in weights)
    weights[0].grad = gaussian(15, 5)
    opt.step()
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=match):
        other.load_state_dict(opt.state_dict())
    assert other.state_dict() == before


@pytest.mark.parametrize("mark", MARKS)
def test_load_state_dict_with_assign_marks_what_comes(mark):
    model, opt = start(mark)
    was = model["linear"].weight
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    assert model["linear"].weight is not was
    assert constraint_of(model["linear"].weight) == constraint_of(was)
    assert check(model, RULES["Adam"](model.parameters())) == []
    assert any("that the model no longer has" in problem for problem in check(model, opt))


def test_unmarked_and_marked_otherwise_is_what_counts():
    model, opt = start("some")
    weight = model["linear"].weight
    mark_orthogonal(unmark(weight), (10, 5), which=(1,))
    train(model, opt, 3, 3)
    assert check(model, opt) == []
    assert [held_under(opt, p) for p in model.parameters()] == [
        ("orthogonal", (10, 5), 0, 1.0, (1,), True),
        None,
        ("orthogonal", 1, 0, 1.0, None, False),
        None,
    ]


@pytest.mark.parametrize("mark", MARKS)
@pytest.mark.parametrize("decay", [None, 0.7])
def test_averages_of_free_rows_are_averages(mark, decay):
    model, opt = start(mark)
    averaged = AveragedModel(model, avg_fn=orthogonal_average(model, decay))
    plain = AveragedModel(model, avg_fn=None if decay is None else lambda a, b, _: a.lerp(b, 1 - decay))
    for k in range(3):
        averaged.update_parameters(train(model, opt, 2, 3 + 2 * k))
        plain.update_parameters(model)
    assert max(orthogonality_error(averaged).values()) < 1e-5
    assert max(orthogonality_error(plain).values()) > 1e-4
    weight = averaged.module["linear"].weight.detach()
    if mark == "some":
        torch.testing.assert_close(weight[5:10], plain.module["linear"].weight.detach()[5:10])
    if mark == "columns":
        torch.testing.assert_close(weight[:, :2], plain.module["linear"].weight.detach()[:, :2])
    before = plain.module["linear"].weight.detach().clone()
    project_to_manifold_(plain)
    assert max(orthogonality_error(plain).values()) < 1e-5
    if mark == "some":
        expected = torch.cat([nearest_orthogonal(before[:5]), before[5:10], nearest_orthogonal(before[10:])])
        torch.testing.assert_close(plain.module["linear"].weight.detach(), expected)


@pytest.mark.parametrize("mark", MARKS)
def test_check_and_a_step_find_a_block_that_is_off_and_no_free_row(mark):
    model, opt = start(mark)
    weight = model["linear"].weight
    with torch.no_grad():
        if mark == "some":
            weight[5:10] *= 3
        elif mark == "columns":
            weight[:, :2] *= 3
    assert check(model, opt) == []
    with torch.no_grad():
        weight[-4:, -3:] *= 1.5
    assert check(model, opt) == [
        "linear.weight is not orthogonal to rounding: project_to_manifold_(model) puts it back, and so does the next "
        "step."
    ]
    with pytest.warns(UserWarning, match="away from its manifold"):
        train(model, opt, 1, 3)
    assert check(model, opt) == []


@pytest.mark.parametrize("mark", MARKS)
@pytest.mark.parametrize("scheme", ["haar", "henaff", "cayley", "identity"])
def test_initialized_as_marked(mark, scheme):
    weight = net(mark)["linear"].weight
    before = weight.detach().clone()
    init.orthogonal_(weight, scheme=scheme, generator=torch.Generator().manual_seed(3))
    assert orthogonality_error(weight) < 1e-5
    if mark == "some":
        assert torch.equal(weight[5:10], before[5:10])
        if scheme == "identity":
            assert torch.equal(weight[:5], torch.eye(5))
    with pytest.raises(ValueError, match="contradict the mark"):
        init.orthogonal_(weight, blocks=5)
