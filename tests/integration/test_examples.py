"""What the examples compute, beside an oracle or a case by hand."""

import importlib
import itertools
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from manifold_opt import mark_attention

for needed in ("matplotlib", "rich"):
    pytest.importorskip(needed)


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "examples"))
    return importlib.import_module


def test_certified_radii_by_hand(example):
    lipschitz_classifier = example("lipschitz_classifier")
    logits = torch.tensor([[3.0, 1.0, 0.0], [3.0, 1.0, 0.0], [0.5, 0.5, 0.0]])
    classes = torch.tensor([0, 1, 0])
    assert lipschitz_classifier.margins(logits, classes).tolist() == [2.0, -2.0, 0.0]
    radii = lipschitz_classifier.certified_radii(logits, classes, 2.0)
    assert radii.tolist() == pytest.approx([1 / math.sqrt(2), 0, 0])


def test_a_certificate_is_attained(example):
    """By logits x and -x, whose Jacobian has the norm sqrt(2): the margin 2x is gone exactly at x = 0."""
    lipschitz_classifier = example("lipschitz_classifier")
    net = nn.Sequential(nn.Flatten(), nn.Linear(1, 2, bias=False)).double()
    net[1].weight.data = torch.tensor([[1.0], [-1.0]]).double()
    x, classes = torch.tensor([0.25, 3.0]).double().view(2, 1, 1, 1), torch.tensor([0, 0])
    assert lipschitz_classifier.spectral_norms(net) == pytest.approx([math.sqrt(2)])
    radii = lipschitz_classifier.certified_radii(net(x).detach(), classes, math.sqrt(2))
    assert radii.tolist() == pytest.approx([0.25, 3.0])
    assert not lipschitz_classifier.falls(net, x, classes, radii * (1 - 1e-9), steps=10).any()
    assert lipschitz_classifier.falls(net, x, classes, radii * (1 + 1e-9), steps=10).all()


def test_the_attack_finds_the_nearest_boundary_of_a_linear_classifier(example):
    lipschitz_classifier = example("lipschitz_classifier")
    net = nn.Sequential(nn.Flatten(), nn.Linear(9, 2)).double()
    x = torch.randn(50, 1, 3, 3).double()
    logits = net(x).detach()
    classes = logits.argmax(1)
    apart = net[1].weight.detach().diff(dim=0).norm()
    distance = lipschitz_classifier.margins(logits, classes) / apart
    assert not lipschitz_classifier.falls(net, x, classes, 0.999 * distance, steps=10).any()
    assert lipschitz_classifier.falls(net, x, classes, 1.001 * distance, steps=10).all()
    start = torch.randn_like(x)
    assert not lipschitz_classifier.falls(net, x, classes, 0.999 * distance, steps=50, start=start).any()
    assert lipschitz_classifier.falls(net, x, classes, 1.01 * distance, steps=50, start=start).all()


def test_groupsort_sorts_pairs_and_keeps_lengths(example):
    sort = example("lipschitz_classifier").GroupSort()
    assert sort(torch.tensor([[1.0, 2.0, 4.0, 3.0]])).tolist() == [[2.0, 1.0, 4.0, 3.0]]
    x, y = torch.randn(8, 6, 5), torch.randn(8, 6, 5)
    assert torch.equal(sort(x).sort(dim=1).values, x.sort(dim=1).values)
    assert (sort(x) - sort(y)).norm() <= (x - y).norm()


def test_the_classifier_is_as_lipschitz_as_the_product_of_its_norms(example):
    """Through the convolution too: its patches do not overlap."""
    lipschitz_classifier = example("lipschitz_classifier")
    net = lipschitz_classifier.classifier(8, 16).double()
    for layer in lipschitz_classifier.layers(net):
        layer.weight.data.mul_(0.5).add_(0.3 * torch.randn_like(layer.weight))
    bound = math.prod(lipschitz_classifier.spectral_norms(net))
    convolution = torch.autograd.functional.jacobian(net[0], torch.randn(1, 1, 8, 8).double()).reshape(64, 64)
    assert float(torch.linalg.matrix_norm(convolution, 2)) == pytest.approx(lipschitz_classifier.spectral_norms(net)[0])
    for _ in range(5):
        steepest = torch.autograd.functional.jacobian(net, torch.randn(1, 1, 8, 8).double()).reshape(10, 64)
        assert float(torch.linalg.matrix_norm(steepest, 2)) <= bound


@pytest.fixture
def recurrent(example):
    pytest.importorskip("sklearn")
    return example("lipschitz_recurrent")


def spread_(module, scale):
    """Entries of all parameters, biases too, with this standard deviation."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=scale)
    return module.double()


CELLS = {
    "relu": lambda _: nn.RNN(3, 6, nonlinearity="relu", batch_first=True),
    "tanh": lambda _: nn.RNN(3, 6, batch_first=True),
    "joint": lambda recurrent: recurrent.JointRNN(3, 6),
    "gru": lambda _: nn.GRU(3, 6, batch_first=True),
}


@pytest.mark.parametrize("scale", [0.05, 0.3, 1.0, 3.0])
@pytest.mark.parametrize("cell", CELLS)
def test_recurrent_bounds_are_at_least_every_jacobian(recurrent, cell, scale):
    """Of the logits in a whole sequence, at any scale of weights and inputs."""
    torch.manual_seed(0)
    for _ in range(5):
        net = spread_(recurrent.Reader(CELLS[cell](recurrent), 6), scale)
        x = torch.randn(50, 1, 7, 3).double() * torch.rand(50, 1, 1, 1) * 3
        assert recurrent.jacobian_norms(net, x).max() <= recurrent.lipschitz(net, 7) * (1 + 1e-12)


@pytest.mark.parametrize("scale", [0.05, 0.3, 1.0, 3.0])
@pytest.mark.parametrize("cell", CELLS)
def test_recurrent_bounds_of_one_step(recurrent, cell, scale):
    """In the pair (state, row), for states with entries from -1 to 1."""
    torch.manual_seed(1)
    for _ in range(5):
        made = spread_(CELLS[cell](recurrent), scale)
        if cell == "joint":
            made = as_rnn(made)
        pairs = torch.cat((2 * torch.rand(50, 6) - 1, scale * torch.randn(50, 3)), 1).double()
        step = Step(made)
        assert recurrent.jacobian_norms(step, pairs).max() <= recurrent.lipschitz_after_row(made, 1.0) * (1 + 1e-12)


class Step(nn.Module):
    """One step of a cell with six hidden units, of (state, row) side by side."""

    def __init__(self, cell):
        super().__init__()
        self.cell = cell

    def forward(self, pairs):
        return self.cell(pairs[:, None, 6:], pairs[None, :, :6].contiguous())[1][0]


def as_rnn(joint):
    """The nn.RNN with the two parts of a JointRNN."""
    hidden, both = joint.weight.shape
    cell = nn.RNN(both - hidden, hidden, nonlinearity="relu", batch_first=True).to(joint.weight.dtype)
    parts = {"weight_hh_l0": joint.weight_hh_l0, "weight_ih_l0": joint.weight_ih_l0, "bias_ih_l0": joint.bias}
    cell.load_state_dict({**parts, "bias_hh_l0": torch.zeros(hidden)})
    return cell


def test_a_joint_rnn_is_an_nn_rnn(recurrent):
    joint = spread_(recurrent.JointRNN(3, 6), 0.5)
    x = torch.randn(4, 7, 3).double()
    torch.testing.assert_close(joint(x), as_rnn(joint)(x))


def test_the_bound_of_two_marks_is_attained(recurrent):
    """W_hh = I and one input, which every row adds to the state: the norm is sqrt(T) |W_ih|."""
    net = recurrent.Reader(nn.RNN(1, 2, nonlinearity="relu", batch_first=True), 2).double()
    net.cell.weight_hh_l0.data = torch.eye(2).double()
    net.cell.weight_ih_l0.data = torch.tensor([[0.5], [0.0]]).double()
    assert recurrent.lipschitz(net, 9) == pytest.approx(1.5)
    assert recurrent.jacobian_norms(net, torch.ones(1, 1, 9, 1).double()).tolist() == pytest.approx([1.5])


def test_the_bound_of_one_matrix_is_attained(recurrent):
    """By a shift register, which keeps every row: the bound is 1 for any number of rows, and all of it is used."""
    net = recurrent.Reader(recurrent.JointRNN(1, 9), 9).double()
    net.cell.weight.data = torch.eye(10)[1:].double()
    for rows in (1, 2, 9, 30):
        assert recurrent.lipschitz(net, rows) == pytest.approx(1)
        assert recurrent.jacobian_norms(net, torch.ones(1, 1, rows, 1).double()).tolist() == pytest.approx([1])


@pytest.mark.parametrize(
    ("inputs", "recurrents", "biases", "new_bias", "row", "state"),
    [
        ((-0.21, 1.23, -0.13), (-0.33, -1.84, -0.2), (-2.28, 1.57, 1.92), 0.06, -2.33, -0.82),
        ((-0.66, -0.88, -0.62), (-2.14, 0.68, -0.77), (3.18, -16.97, -6.52), 17.74, 3.17, 0.51),
    ],
    ids=["update gate", "reset gate"],
)
def test_the_bound_of_a_gru_has_no_room_for_smaller_constants(
    recurrent, inputs, recurrents, biases, new_bias, row, state
):
    """GRUs of one unit, found by search, whose Jacobian is most of the bound; 1/8 for 1/2, 1/10 for 1/4 would fail."""
    gru = nn.GRU(1, 1).double()
    values = (inputs, recurrents, biases, (0.0, 0.0, new_bias))  # gates r, z, n
    for parameter, gates in zip(gru.parameters(), values, strict=True):
        parameter.data = torch.tensor(gates).double().view_as(parameter)
    h, x = (torch.full((1, 1, 1), value).double().requires_grad_() for value in (state, row))
    slopes = torch.autograd.grad(gru(x, h)[1], (h, x))
    bound = recurrent.lipschitz_after_row(gru, 1.0)
    assert 0.75 * bound < float(torch.hypot(*slopes)) <= bound


def test_the_inequality_behind_the_bound_of_a_gru():
    """z^2 + (1 - z)^2 + 8 z^2 (1 - z)^2 <= 1: the three coefficients of a, b and w / sqrt(2)."""
    z = torch.linspace(0, 1, 10_001).double()
    assert float((z**2 + (1 - z) ** 2 + 8 * (z * (1 - z)) ** 2).max()) <= 1 + 1e-15


@pytest.mark.parametrize("name", ["RNN, unconstrained", "RNN, two marks", "RNN, one matrix", "GRU, gain 0.25"])
def test_trained_recurrent_nets_keep_their_certificates(recurrent, name, tmp_path):
    args = recurrent.parse(["--toy", "--steps", "60", "--plot", str(tmp_path / "plot.png")])
    data = recurrent.digits()
    with recurrent.Runs() as runs:
        result = recurrent.judge(recurrent.train(name, args, data, 0, runs), args, data)
    assert result.accuracy > 0.2  # of ten classes
    assert result.steepest <= result.bound
    assert result.fell == 0
    for radius, left in zip(recurrent.RADII, result.attacked, strict=True):
        assert recurrent.certified([result], radius) <= left
    if name in ("RNN, two marks", "RNN, one matrix"):  # c_8 and the head to the rounding of float32
        assert result.bound <= 1 + 1e-4


def test_attention_logits_are_those_of_torch(example):
    attention_heads = example("attention_heads")
    attention = nn.MultiheadAttention(12, 3, bias=False, batch_first=True)
    x = torch.randn(2, 5, 12)
    logits = attention_heads.attention_logits(x, attention.in_proj_weight, 3)
    weights = attention(x, x, x, average_attn_weights=False)[1]
    torch.testing.assert_close(logits.softmax(-1), weights)


def test_entropy_by_hand(example):
    entropy = example("attention_heads").entropy
    assert float(entropy(torch.zeros(7))) == pytest.approx(math.log(7))
    assert float(entropy(torch.tensor([0.0, 200.0]))) == 0.0


def test_no_logit_of_orthogonal_heads_is_above_the_bound(example):
    attention_heads = example("attention_heads")
    net = attention_heads.VisionTransformer(8, 4, 16, 2, 1)
    mark_attention(net)
    assert net.bound == pytest.approx(16 / math.sqrt(8))
    weight = net.layers[0].self_attn.in_proj_weight.detach()
    x = net.layers[0].norm1(100 * torch.randn(20, 30, 16))
    assert float(attention_heads.attention_logits(x, weight, 2).abs().max()) <= net.bound
    worst = 4 * weight[None, :1]  # as long as what a norm lets out, and nothing of it is lost to that head
    same = weight[:8].repeat(6, 1)  # queries and keys
    assert float(attention_heads.attention_logits(worst, same, 2).max()) == pytest.approx(net.bound)  # it is attained


def test_modrelu_keeps_phases(example):
    modrelu = example("unitary_rnn").modrelu
    z = torch.tensor([3 + 4j, -1j, 0.5 + 0j, 0j])
    torch.testing.assert_close(modrelu(z, torch.tensor(-1.0)), torch.tensor([2.4 + 3.2j, 0, 0, 0]), rtol=1e-5, atol=0)
    assert torch.isfinite(torch.view_as_real(modrelu(z, torch.tensor(1.0)))).all()


def test_when_it_was_first_learned(example):
    unitary_rnn = example("unitary_rnn")
    assert example("recurrent").memoryless(100) == pytest.approx(10 * math.log(8) / 120)
    losses = [1.0] * 20 + [0.0] * 20
    assert unitary_rnn.first_below(losses, 0.55) == "25"  # five of the last ten are 0
    assert unitary_rnn.first_below(losses, 0.0) == "never"


def test_docstrings_tell_neither_their_module_nor_each_other(example):
    docstrings = example("docstrings")
    found = docstrings.docstrings()
    assert {label for _, label in found.values()} == set(range(len(docstrings.MODULES)))
    assert not any(name in text.lower() for text in found for name in docstrings.MODULES)

    read = []

    def tokenizer(texts, *, max_length, **_):
        read.append({found[text][0] for text in texts})
        numbers = torch.tensor([[len(text)] * max_length for text in texts])
        return {"input_ids": numbers, "attention_mask": torch.ones_like(numbers)}

    parts = docstrings.split(tokenizer, 7, None)
    assert sum(len(texts.labels) for texts in parts.values()) == len(found)
    for one, other in itertools.combinations(read, 2):
        assert not one & other
    assert [len(texts.labels) for texts in docstrings.split(tokenizer, 7, 5).values()] == [5, 5, 5]


def test_a_batch_is_padded_to_its_longest_text(example):
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]])
    texts = example("docstrings").Texts({"attention_mask": mask}, torch.tensor([5, 6, 7]))
    tokens, labels = texts.batch(torch.tensor([2, 1]))
    assert tokens["attention_mask"].tolist() == [[1, 0], [1, 1]]
    assert labels.tolist() == [7, 6]


def test_fine_tuning_trains_what_the_method_says_and_keeps_the_spectrum(example):
    transformers = pytest.importorskip("transformers")
    finetune = example("finetune_fixed_spectrum")
    config = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    start = transformers.BertModel(transformers.BertConfig(vocab_size=20, **config), add_pooling_layer=False).eval()
    model = finetune.build(finetune.FIXED, start, 0)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {
        *(f"encoder.encoder.layer.0.attention.self.{name}.weight" for name in ("query", "key", "value")),
        "encoder.encoder.layer.0.attention.output.dense.weight",
        *("head.weight", "head.bias"),
    }
    tokens = torch.randint(20, (6, 5))
    texts = example("docstrings").Texts({"input_ids": tokens, "attention_mask": tokens.ge(0).long()}, torch.arange(6))
    args = finetune.parse(["--steps", "5", "--batch-size", "4"])
    opt = finetune.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    assert len(list(finetune.train(model, opt, texts, args, 0))) == 5
    before, after = finetune.weights_of(start), finetune.weights_of(model.encoder)
    assert (after - before).norm() > 0.02 * before.norm()
    torch.testing.assert_close(torch.linalg.svdvals(after), torch.linalg.svdvals(before), atol=1e-7, rtol=0)
