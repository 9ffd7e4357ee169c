import copy
import io
import warnings

import numpy
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import manifold_opt
from manifold_opt import (
    Adam,
    Orthogonal,
    check,
    constraint_of,
    init,
    mark_attention,
    mark_orthogonal,
    mark_recurrent,
    nearest_orthogonal,
    orthogonality_error,
    orthogonalize_,
    unmark,
)
from manifold_opt.stiefel.geometry import error

from ..helpers import DTYPES, gaussian, pairs, point, rounding

GATES = [(nn.RNN, 1), (nn.GRU, 3), (nn.LSTM, 4), (nn.RNNCell, 1), (nn.GRUCell, 3), (nn.LSTMCell, 4)]


def parameter(*shape: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(gaussian(*shape, dtype=dtype))


# What marking does to a value.


@pairs(
    {"shape, blocks": [((12, 4), 3), ((5, 5), 1), ((4, 9), 1), ((16, 2), 4), ((6, 5), 2)]},
    dtype=DTYPES,
    gain=[1.0, 1.7],
)
def test_every_block_becomes_its_polar_factor_times_the_gain(shape, blocks, dtype, gain):
    weight = parameter(*shape, dtype=dtype)
    before = weight.detach().clone()
    assert mark_orthogonal(weight, blocks=blocks, gain=gain) is weight
    for block, old in zip(weight.detach().chunk(blocks), before.chunk(blocks), strict=True):
        torch.testing.assert_close(block, gain * nearest_orthogonal(old), rtol=0, atol=4 * torch.finfo(dtype).eps)
        assert error(block / gain) < rounding(block)
        singular_values = torch.linalg.svdvals(block.double())
        torch.testing.assert_close(
            singular_values, torch.full_like(singular_values, gain), rtol=0, atol=8 * torch.finfo(dtype).eps
        )


def test_by_hand():
    weight = mark_orthogonal(nn.Parameter(torch.tensor([[0.0, 2.0], [3.0, 0.0], [5.0, 0.0], [0.0, -7.0]])), blocks=2)
    expected = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 0.0], [0.0, -1.0]])
    torch.testing.assert_close(weight.detach(), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("start", ["torch", "henaff", "qr"])
def test_an_orthogonal_value_keeps_its_bits(dtype, start):
    weight = parameter(96, 32, dtype=dtype)
    with torch.no_grad():
        for block in weight.chunk(3):
            if start == "torch":
                nn.init.orthogonal_(block)
            elif start == "henaff":
                init.orthogonal_(block, scheme="henaff")
            else:
                block.copy_(torch.linalg.qr(gaussian(32, 32, dtype=dtype))[0])
    before = weight.detach().clone()
    mark_orthogonal(weight, blocks=3)
    assert torch.equal(weight, before)


@pytest.mark.parametrize("n", [8, 64, 256])
def test_a_value_that_is_off_by_more_than_rounding_is_projected(n):
    """Off by 1e-6 sqrt(n), what is promised after every step, is off; a rounded orthogonal matrix is not."""
    exact = point(n, n).float()
    weight = nn.Parameter(exact * (1 + 0.6e-6))  # the error is 2 * 0.6e-6 * sqrt(n)
    before = weight.detach().clone()
    mark_orthogonal(weight)
    assert orthogonality_error(weight) < 1e-6 * n**0.5
    assert not torch.equal(weight, before)
    assert torch.equal(mark_orthogonal(nn.Parameter(exact.clone())).detach(), exact)


def test_only_the_blocks_that_are_off_are_touched():
    weight = parameter(12, 4)
    with torch.no_grad():
        weight[4:8] = point(4, 4, dtype=torch.float32)
    before = weight.detach().clone()
    mark_orthogonal(weight, blocks=3)
    assert torch.equal(weight[4:8], before[4:8])
    assert not torch.equal(weight[:4], before[:4])


def test_blocks_along_dim_one():
    weight = mark_orthogonal(parameter(4, 12), blocks=3, dim=1)
    assert max(float(error(block)) for block in weight.detach().chunk(3, dim=1)) < 1e-6


def test_convolutions_are_flattened_as_torch_init_does():
    conv = nn.Conv2d(4, 8, 3)
    mark_orthogonal(conv, "weight")
    assert float(error(conv.weight.detach().flatten(1))) < 1e-6


def test_the_parameter_stays_what_it_was():
    gru = nn.GRU(3, 8)
    weight = gru.weight_hh_l0
    before = (id(weight), weight.data_ptr(), weight.stride(), type(weight), weight.requires_grad, weight.is_leaf)
    keys = list(gru.state_dict())
    mark_orthogonal(weight, blocks=3)
    after = (id(weight), weight.data_ptr(), weight.stride(), type(weight), weight.requires_grad, weight.is_leaf)
    assert after == before
    assert gru.weight_hh_l0 is weight
    assert list(gru.state_dict()) == keys


def test_a_frozen_or_plain_leaf_tensor_can_be_marked():
    assert constraint_of(mark_orthogonal(nn.Parameter(torch.eye(3), requires_grad=False))) == Orthogonal()
    assert constraint_of(mark_orthogonal(torch.eye(3, requires_grad=True))) == Orthogonal()


# The forms of the call.


@pytest.mark.parametrize(("kind", "gates"), GATES)
def test_a_recurrent_module_knows_its_gates(kind, gates):
    module = kind(3, 6)
    name = "weight_hh" if "Cell" in kind.__name__ else "weight_hh_l0"
    weight = mark_orthogonal(module, name)
    assert weight is getattr(module, name)
    assert constraint_of(weight) == Orthogonal(blocks=gates)


def test_blocks_given_on_a_recurrent_module_win():
    gru = nn.GRU(3, 6)
    assert constraint_of(mark_orthogonal(gru, "weight_hh_l0", 1)) == Orthogonal(blocks=1)


def test_positional_and_dotted_forms():
    net = nn.Sequential(nn.GRU(3, 6))
    assert constraint_of(mark_orthogonal(net, "0.weight_hh_l0")) == Orthogonal(blocks=3)
    assert constraint_of(mark_orthogonal(parameter(12, 4), 3)) == Orthogonal(blocks=3)
    assert constraint_of(mark_orthogonal(parameter(12, 4), blocks=numpy.int64(3))) == Orthogonal(blocks=3)
    assert constraint_of(mark_orthogonal(nn.Linear(4, 4), name="weight", gain=2.0)) == Orthogonal(gain=2.0)


@pytest.mark.parametrize(("shape", "gates", "name"), [((12, 4), 3, "nn.GRU"), ((16, 4), 4, "nn.LSTM")])
def test_stacked_gates_without_blocks_are_marked_with_a_warning(shape, gates, name):
    weight = parameter(*shape)
    with pytest.warns(UserWarning, match=rf"{name}.*blocks={gates}.*blocks=1") as caught:
        mark_orthogonal(weight)
    assert caught[0].filename == __file__
    assert constraint_of(weight) == Orthogonal(blocks=1)
    assert orthogonality_error(weight) < 1e-6


def test_blocks_one_given_explicitly_is_silent():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mark_orthogonal(parameter(12, 4), blocks=1)
        mark_orthogonal(parameter(8, 4))


def test_of_a_linear_layer_only_fused_projections_are_suspected():
    for rows in (16, 32):
        mark_orthogonal(nn.Linear(8, rows), "weight")
    with pytest.warns(UserWarning, match="like fused projections of queries, keys and values.* pass blocks=3"):
        mark_orthogonal(nn.Linear(8, 24), "weight")


@pytest.mark.parametrize("rows", [3, 4])
def test_a_column_is_taken_for_no_stack(rows):
    """nn.Linear(1, 3) has a weight of (3, 1)."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mark_orthogonal(nn.Linear(1, rows), "weight")
        mark_orthogonal(parameter(rows, 1))


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
def test_mark_recurrent_finds_all_layers_and_directions(kind, bidirectional):
    net = nn.ModuleDict({"rnn": kind(3, 6, num_layers=2, bidirectional=bidirectional), "head": nn.Linear(6, 2)})
    names = mark_recurrent(net)
    assert names == sorted(name for name, _ in net.named_parameters() if "weight_hh" in name)
    assert len(names) == 4 if bidirectional else 2
    marked = {name for name, weight in net.named_parameters() if constraint_of(weight)}
    assert marked == set(names)
    assert max(orthogonality_error(net).values()) < 1e-5


def test_mark_recurrent_takes_cells_and_projections():
    net = nn.ModuleList([nn.GRUCell(3, 6), nn.LSTM(3, 6, proj_size=2)])
    assert mark_recurrent(net) == ["0.weight_hh", "1.weight_hh_l0"]
    assert net[1].weight_hh_l0.shape == (24, 2)  # four tall gates
    assert constraint_of(net[1].weight_hh_l0) == Orthogonal(blocks=4)


def test_mark_recurrent_marks_all_or_nothing():
    net = nn.ModuleList([nn.GRU(3, 6), nn.GRU(3, 6)])
    with torch.no_grad():
        net[1].weight_hh_l0[0, 0] = float("nan")
    before = net[0].weight_hh_l0.detach().clone()
    with pytest.raises(ValueError, match=r"1\.weight_hh_l0.*not finite"):
        mark_recurrent(net)
    assert torch.equal(net[0].weight_hh_l0, before)
    assert constraint_of(net[0].weight_hh_l0) is None


def test_mark_recurrent_with_nothing_to_mark():
    with pytest.raises(ValueError, match=r"found no parameter weight_hh of an nn\.RNN"):
        mark_recurrent(nn.Linear(3, 3))


def test_marking_again_alike_is_fine_and_otherwise_refused():
    weight = mark_orthogonal(parameter(12, 4), blocks=3)
    before = weight.detach().clone()
    mark_orthogonal(weight, blocks=3)
    with pytest.raises(ValueError, match=r"already marked as Orthogonal\(blocks=3.*unmark"):
        mark_orthogonal(weight, blocks=1)
    assert torch.equal(weight, before)
    assert constraint_of(unmark(weight)) is None
    assert unmark(weight) is weight
    mark_orthogonal(weight, blocks=1)


# What is refused, before anything is written.


def parametrized_linear() -> nn.Module:
    return parametrizations.orthogonal(nn.Linear(4, 4))


REFUSED = {
    "blocks that do not divide": (
        lambda: (parameter(100, 32), {"blocks": 3}),
        r"\(100, 32\): blocks=3 must divide.*3 gate",
    ),
    "no blocks": (lambda: (parameter(4, 4), {"blocks": 0}), "blocks >= 1"),
    "negative blocks": (lambda: (parameter(4, 4), {"blocks": -1}), "blocks >= 1"),
    "half a block": (lambda: (parameter(4, 4), {"blocks": 1.5}), "whole number of blocks"),
    "a vector": (lambda: (parameter(4), {}), "at least 2 dimensions"),
    "a third dim": (lambda: (parameter(4, 4), {"dim": 2}), "dim=2"),
    "dim 1 of four": (lambda: (parameter(4, 4, 3, 3), {"dim": 1}), "dim 1 of a matrix"),
    "no gain": (lambda: (parameter(4, 4), {"gain": 0.0}), "gain above 0"),
    "infinite gain": (lambda: (parameter(4, 4), {"gain": float("inf")}), "gain above 0"),
    "nan": (lambda: (nn.Parameter(torch.full((3, 3), float("nan"))), {}), r"not finite.*init\.orthogonal_"),
    "rank-deficient": (lambda: (nn.Parameter(torch.ones(3, 3)), {}), r"rank-deficient.*init\.orthogonal_"),
    "zero": (lambda: (nn.Parameter(torch.zeros(6, 2)), {"blocks": 3}), r"rank-deficient.*init\.orthogonal_"),
    "empty": (lambda: (nn.Parameter(torch.zeros(0, 2)), {}), "empty"),
    "not a leaf": (lambda: (2 * parameter(3, 3), {}), "not a leaf.*remove_parametrizations"),
    "a parametrized weight": (lambda: (parametrized_linear().weight, {}), "not a leaf.*remove_parametrizations"),
    "a buffer": (lambda: (torch.eye(3), {}), "nn.Parameter.*buffer"),
    "data": (lambda: (parameter(3, 3).data, {}), "nn.Parameter.*data"),
    "lazy": (lambda: (nn.LazyLinear(3).weight, {}), "lazy.*one batch"),
    "sparse": (lambda: (torch.eye(3).to_sparse().requires_grad_(), {}), r"sparse.*to_dense"),
    "integer": (lambda: (nn.Parameter(torch.eye(3, dtype=torch.int64), requires_grad=False), {}), "int64.*float32"),
    "channels last, and not all of it": (
        lambda: (nn.Parameter(torch.randn(8, 4, 3, 3).to(memory_format=torch.channels_last)), {"blocks": (3, 5)}),
        r"strides.*contiguous",
    ),
    "no tensor": (lambda: (3.0, {}), "tensor or a module"),
    "a module without a name": (lambda: (nn.Linear(3, 3), {}), "needs the name"),
    "a tensor with a name": (lambda: (parameter(3, 3), {"name": "weight"}), "takes no name"),
}


@pytest.mark.filterwarnings("ignore:Lazy modules")
@pytest.mark.parametrize("case", REFUSED)
def test_refuses_with_the_remedy_and_writes_nothing(case):
    make, match = REFUSED[case]
    target, options = make()
    before = copy.deepcopy(target.detach()) if case not in ("lazy", "no tensor", "a module without a name") else None
    with pytest.raises(ValueError, match=match) as refusal:
        mark_orthogonal(target, **options)
    assert "mark_orthogonal" in str(refusal.value)
    assert len(str(refusal.value)) < 500
    if isinstance(target, torch.Tensor) and case != "lazy":
        assert constraint_of(target) is None
        if not target.is_sparse:
            assert torch.equal(target.detach().nan_to_num(), before.nan_to_num())


@pytest.mark.parametrize(
    ("make", "name", "match"),
    [
        (parametrized_linear, "weight", "remove_parametrizations"),
        (lambda: nn.GRU(3, 4), "weight_h", "has no parameter 'weight_h'; it has weight_ih_l0"),
        (lambda: nn.GRU(3, 4), "hidden_size", "has no parameter"),
        (lambda: nn.GRU(3, 4), "cell.weight", "has no parameter"),
        (parametrized_linear, "parametrizations.weight.original", "remove_parametrizations"),
        (lambda: nn.utils.spectral_norm(nn.Linear(3, 3)), "weight", "remove_spectral_norm"),
        (lambda: nn.BatchNorm1d(3), "running_mean", "has no parameter"),
    ],
)
def test_refuses_a_name(make, name, match):
    with pytest.raises(ValueError, match=match):
        mark_orthogonal(make(), name)


def test_the_remedies_work():
    layer = parametrized_linear()
    nn.utils.parametrize.remove_parametrizations(layer, "weight")
    mark_orthogonal(layer, "weight")
    dead = nn.Parameter(torch.zeros(3, 3))
    mark_orthogonal(init.orthogonal_(dead))
    conv = nn.Parameter(torch.randn(8, 4, 3, 3).to(memory_format=torch.channels_last))
    mark_orthogonal(nn.Parameter(conv.detach().contiguous()), blocks=(3, 5))


def test_mark_recurrent_refuses_a_parametrized_weight():
    gru = parametrizations.orthogonal(nn.GRU(3, 4), "weight_hh_l0")
    with pytest.raises(ValueError, match="remove_parametrizations"):
        mark_recurrent(gru)


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
def test_mark_recurrent_refuses_an_old_weight_norm():
    gru = nn.utils.weight_norm(nn.GRU(3, 4), "weight_hh_l0")
    before = gru.weight_hh_l0_v.detach().clone()
    with pytest.raises(ValueError, match="remove_weight_norm"):
        mark_recurrent(gru)
    assert torch.equal(gru.weight_hh_l0_v, before)


# What a mark survives today.


def test_a_mark_survives_moving_saving_and_loading():
    gru = nn.GRU(3, 4)
    mark_recurrent(gru)
    buffer = io.BytesIO()
    torch.save(gru, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert constraint_of(loaded.weight_hh_l0) == Orthogonal(blocks=3)
    gru.double()
    gru.load_state_dict(gru.state_dict())
    assert constraint_of(gru.weight_hh_l0) == Orthogonal(blocks=3)


# The forum case.


@pytest.mark.parametrize("orthogonal_map", ["matrix_exp", "cayley", "householder"])
def test_the_forum_case(orthogonal_map):
    """Started from eye_, torch's parametrization has an orthonormal stack, W_hz and W_hn zero; marking, three gates."""
    hidden = 8
    stacked = nn.GRU(4, hidden)
    nn.init.eye_(stacked.weight_hh_l0)
    parametrizations.orthogonal(stacked, "weight_hh_l0", orthogonal_map=orthogonal_map)
    gates = stacked.weight_hh_l0.detach().unflatten(0, (3, hidden))
    assert orthogonality_error(stacked.weight_hh_l0.detach()) < 1e-5
    assert gates[1:].abs().max() < 1e-6  # W_hz and W_hn
    assert orthogonality_error(gates) == pytest.approx(hidden**0.5)

    gru = nn.GRU(4, hidden)
    nn.init.eye_(gru.weight_hh_l0)
    with pytest.raises(ValueError, match=r"rank-deficient.*init\.orthogonal_"):
        mark_orthogonal(gru, "weight_hh_l0")
    init.orthogonal_(gru.weight_hh_l0, blocks=3)
    mark_orthogonal(gru, "weight_hh_l0")
    opt = Adam(gru.parameters(), lr=1e-2)
    for _ in range(20):
        opt.zero_grad()
        gru(torch.ones(6, 2, 4))[0].square().mean().backward()
        opt.step()
        gates = gru.weight_hh_l0.detach().unflatten(0, (3, hidden))
        assert float(error(gates).max()) < 1e-6 * hidden**0.5


def test_mark_recurrent_refuses_what_cannot_be_kept_before_it_writes():
    net = nn.ModuleList([nn.GRU(3, 6), nn.GRU(3, 6).to(torch.float8_e5m2)])
    before = net[0].weight_hh_l0.detach().clone()
    with pytest.raises(ValueError, match=r"1\.weight_hh_l0 has dtype torch.float8"):
        mark_recurrent(net)
    assert torch.equal(net[0].weight_hh_l0, before)
    net[1].float()
    mark_orthogonal(net[1].weight_hh_l0, blocks=1)
    with pytest.raises(ValueError, match="already marked as"):
        mark_recurrent(net)
    assert constraint_of(net[0].weight_hh_l0) is None


@pytest.mark.parametrize(
    ("options", "match"),
    [({"blocks": True}, "blocks=True"), ({"dim": False}, "dim=False"), ({"dim": 0.0}, r"dim=0\.0")],
)
def test_numbers_that_are_none_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        mark_orthogonal(nn.Parameter(torch.eye(4)), **options)


def test_numbers_from_numpy_become_pythons():
    weight = mark_orthogonal(
        nn.Parameter(torch.eye(4)), blocks=numpy.int64(2), dim=numpy.int64(0), gain=numpy.float32(2)
    )
    constraint = constraint_of(weight)
    assert [type(x) for x in (constraint.blocks, constraint.dim, constraint.gain)] == [int, int, float]


def test_a_weight_without_a_value_is_marked_and_put_there_by_the_first_step():
    layer = nn.Linear(4, 4, device="meta")
    mark_orthogonal(layer, "weight")
    layer.load_state_dict(nn.Linear(4, 4).state_dict(), assign=True)
    assert constraint_of(layer.weight) == Orthogonal()
    opt = manifold_opt.SGD(layer.parameters(), lr=0.1)
    layer.weight.grad = torch.zeros(4, 4)
    with pytest.warns(UserWarning, match="away from its manifold"):
        opt.step()
    assert orthogonality_error(layer.weight) < 1e-5


def test_some_gates_of_every_recurrent_net():
    net = nn.LSTM(3, 4, num_layers=2)
    mark_recurrent(net, which=(2,), gain=2.0)
    assert constraint_of(net.weight_hh_l1) == Orthogonal(4, gain=2.0, which=(2,))
    gates = net.weight_hh_l1.detach().view(4, 4, 4)
    assert float(error(gates[2] / 2)) < 1e-5
    assert float(error(gates[0] / 2)) > 0.1


def test_blocks_may_be_a_list_wherever_they_are_told():
    stacked = nn.Parameter(torch.randn(24, 16))
    init.orthogonal_(stacked, blocks=[8, 16])
    assert orthogonality_error(stacked, blocks=[8, 16]) < 1e-5
    assert constraint_of(mark_orthogonal(stacked, blocks=[8, 16])) == Orthogonal((8, 16))


OVERLAPPING = {
    "expanded": lambda: torch.randn(1, 4).expand(4, 4),
    "windows": lambda: torch.randn(7).unfold(0, 4, 1),  # (4, 4) with strides (1, 1): a Hankel matrix
    "strided": lambda: torch.randn(20).as_strided((4, 4), (3, 1)),
    "a batch": lambda: torch.randn(12).as_strided((3, 2, 2), (2, 2, 1)),
    "complex": lambda: torch.randn(5, dtype=torch.complex64).as_strided((3, 3), (1, 1)),
}


@pytest.mark.parametrize("case", OVERLAPPING)
def test_entries_that_share_memory_are_refused_everywhere(case):
    """Such matrices were accepted, and written to until they were 0.7 off."""
    x = OVERLAPPING[case]()
    before = x.clone()
    options = {"flatten": False} if x.ndim == 3 else {}
    for function in (lambda x: mark_orthogonal(nn.Parameter(x), **options), orthogonalize_, init.orthogonal_):
        with pytest.raises(ValueError, match=r"has strides .*share memory, or could; use \.clone\(\) first"):
            function(x)
    assert torch.equal(x, before)
    weight = mark_orthogonal(nn.Parameter(gaussian(*x.shape, dtype=x.dtype)), **options)
    layer = nn.ParameterList([weight])
    opt = Adam([weight])
    weight.data = x
    weight.grad = torch.zeros(x.shape, dtype=x.dtype)
    assert "share memory" in check(layer, opt)[0]
    with pytest.raises(ValueError, match="share memory"):
        opt.step()


@pytest.mark.parametrize(
    "x",
    [
        torch.randn(5, 4).t(),
        torch.randn(8, 8)[::2, ::2],
        torch.randn(4, 3, 2, 2).contiguous(memory_format=torch.channels_last),
        torch.randn(6, 1)[::3].as_strided((2, 1), (3, 0)),
        torch.randn(1, 4).expand(1, 4),
        torch.randn(2, 3, 4).movedim(0, 1),
    ],
)
def test_strides_that_do_not_overlap_are_taken(x):
    weight = mark_orthogonal(nn.Parameter(x), blocks=1)
    assert weight.stride() == x.stride()
    assert orthogonality_error(weight) < 1e-6


def test_a_trained_leaf_of_a_parametrization_can_be_marked_by_its_name():
    """As a rotation that the weights of several layers share."""

    class Rotate(nn.Module):
        def __init__(self, rotation):
            super().__init__()
            self.rotation = rotation

        def forward(self, w):
            return w @ self.rotation

    net = nn.Sequential(nn.Linear(6, 6))
    parametrize.register_parametrization(net[0], "weight", Rotate(nn.Parameter(gaussian(6, 6).float())))
    rotation = mark_orthogonal(net, "0.parametrizations.weight.0.rotation")
    opt = Adam(net.parameters(), lr=0.01)
    net(torch.ones(2, 6)).square().sum().backward()
    opt.step()
    assert orthogonality_error(rotation) < 1e-5
    for name in ("0.weight", "0.parametrizations.weight.original"):
        with pytest.raises(ValueError, match="remove_parametrizations"):
            mark_orthogonal(net, name)


def test_an_error_in_a_part_of_a_model_names_the_path():
    net = nn.ModuleDict({"encoder": nn.GRU(3, 4), "decoder": nn.GRU(3, 4)})
    nn.utils.parametrizations.orthogonal(net["decoder"], "weight_hh_l0")
    with pytest.raises(ValueError, match=r"^mark_recurrent: decoder\.weight_hh_l0 of ModuleDict is parametrized"):
        mark_recurrent(net)
    heads = nn.ModuleDict({"head": nn.MultiheadAttention(4, 2)})
    nn.utils.parametrizations.orthogonal(heads["head"], "in_proj_weight")
    with pytest.raises(ValueError, match=r"^mark_attention: head\.in_proj_weight of ModuleDict is parametrized"):
        mark_attention(heads)
