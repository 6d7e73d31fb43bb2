"""The student's head without [N, V]: numbers and gradients of the dense computation in a fraction of its memory."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from workers.distill.sparse_head import logits_at, row_loss, student_top_k
from workers.losses.catalogue import LOSSES
from workers.losses.targets import Targets
from workers.ordering import exact_top_k
from workers.teacher import lm_head
from workers.teacher.lm_head import LMHead

OPTIONS = {
    "plain": {},
    "bias": {"bias": True},
    "scale": {"scale": 0.25},
    "softcap": {"softcap": 4.0},
    "everything": {"bias": True, "scale": 0.5, "softcap": 6.0},
}


def problem(num_positions=13, vocab_size=57, size=11, num_ids=6, *, bias=False, dtype=torch.float64, seed=0, **options):
    """A head and hidden states that want gradients, and ids, some of them repeated within and between positions."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(vocab_size, size, generator=generator, dtype=dtype).requires_grad_()
    hidden = torch.randn(num_positions, size, generator=generator, dtype=dtype).requires_grad_()
    bias_V = torch.randn(vocab_size, generator=generator, dtype=dtype).requires_grad_() if bias else None
    ids = torch.randint(vocab_size, (num_positions, num_ids), generator=generator)
    if num_ids > 1:
        ids[:, 1] = ids[:, 0]
    return LMHead(weight, bias_V, **options), hidden, ids


def dense_logits(head, hidden):
    logits = F.linear(hidden, head.weight_VD, head.bias_V) * head.scale
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


def gradients(loss, head, hidden):
    leaves = [hidden, head.weight_VD] + ([] if head.bias_V is None else [head.bias_V])
    return torch.autograd.grad(loss, leaves)


def uneven(values):
    """A scalar of them whose gradient is different everywhere, and not the graph's last node."""
    return (values * torch.linspace(-2, 3, values.numel(), dtype=values.dtype).view_as(values)).sin().sum() * 1.7


@pytest.fixture(params=["gathered", "dense"], autouse=True)
def way(request, monkeypatch):
    """Rows of the head gathered one by one, or all multiplied, which so small a head would always choose."""
    monkeypatch.setattr(lm_head, "_DENSE_PRODUCTS_PER_GATHER", 0 if request.param == "gathered" else 10**9)
    return request.param


@pytest.fixture(params=["one chunk", "a row a chunk", "uneven chunks"])
def chunked(request, monkeypatch):
    """Run the test in chunks of different sizes: the bytes are those of 4 positions of logits_at, of 2 of row_loss."""
    if request.param != "one chunk":
        monkeypatch.setattr(lm_head, "CHUNK_BYTES", 1 if request.param == "a row a chunk" else 4 * 6 * 11 * 8)


@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_chosen_logits_and_their_gradients_are_the_dense_ones(options):
    head, hidden, ids = problem(**options)
    chosen, expected = logits_at(head, hidden, ids), dense_logits(head, hidden).gather(1, ids)
    torch.testing.assert_close(chosen, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        gradients(uneven(chosen), head, hidden), gradients(uneven(expected), head, hidden), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (1, 57, 11, 57), (5, 3, 1, 7), (0, 57, 11, 6), (3, 1, 4, 2), (4, 9, 5, 0)]
)
def test_awkward_shapes_are_no_exception(shape):
    head, hidden, ids = problem(*shape, bias=True)
    chosen, expected = logits_at(head, hidden, ids), dense_logits(head, hidden).gather(1, ids)
    torch.testing.assert_close(chosen, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        gradients(uneven(chosen), head, hidden), gradients(uneven(expected), head, hidden), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_chosen_logits_pass_gradcheck(options):
    head, hidden, ids = problem(4, 7, 3, 3, **options)

    def chosen(hidden, weight, *bias):
        return logits_at(LMHead(weight, *bias, scale=head.scale, softcap=head.softcap), hidden, ids)

    leaves = [hidden, head.weight_VD] + ([] if head.bias_V is None else [head.bias_V])
    assert gradcheck(chosen, leaves)


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_chosen_logits_of_float32_weights_are_float32_whatever_the_hidden_states_are(compute):
    head, hidden, ids = problem(64, 57, 128, dtype=torch.float32)
    hidden = hidden.detach().to(compute).requires_grad_()
    wide = LMHead(head.weight_VD.detach().double().requires_grad_())
    chosen = logits_at(head, hidden, ids)
    assert chosen.dtype == torch.float32
    expected = dense_logits(wide, hidden.detach().double()).gather(1, ids)
    torch.testing.assert_close(chosen.double(), expected, rtol=1e-5, atol=1e-4)
    grad_hidden, grad_weight = gradients(chosen.sin().sum(), head, hidden)
    assert (grad_hidden.dtype, grad_weight.dtype) == (compute, torch.float32)
    wanted = torch.autograd.grad(expected.sin().sum(), wide.weight_VD)[0]
    torch.testing.assert_close(grad_weight.double(), wanted, rtol=1e-4, atol=1e-4)


def test_a_run_repeats_bit_for_bit():
    runs = []
    for _ in range(3):
        head, hidden, ids = problem(200, 40, 24, 16, bias=True, dtype=torch.float32)
        chosen = logits_at(head, hidden, ids)
        values = row_loss(head, hidden, lambda logits, rows: [0.3 * logits.logsumexp(1)])[0]
        runs.append([chosen, values, *gradients(uneven(chosen) + values, head, hidden)])
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


def whole_row_loss(name, head, hidden, teacher, labels, weights, groups=()):
    """Through row_loss, once for each weight: the sum of all, and each one's."""

    def values_of(student, rows):
        targets = Targets(student_row_NV=student, teacher_row_NV=teacher[rows], labels_N=labels[rows])
        for weight in weights:
            yield weight * LOSSES[name].values(targets, **LOSSES[name].defaults())

    return row_loss(head, hidden, values_of, groups)


def plain_values(name, student, teacher, labels):
    if name == "sft":
        return F.cross_entropy(student, labels, reduction="none")
    student, teacher = (student / 3).log_softmax(1), (teacher / 3).log_softmax(1)
    if name == "rkl":
        student, teacher = teacher, student
    return F.kl_div(student, teacher, log_target=True, reduction="none").sum(1)


@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("name", ["kl", "rkl", "sft"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_a_loss_on_whole_rows_and_its_gradients_are_the_dense_ones(name, options):
    head, hidden, _ = problem(**options)
    generator = torch.Generator().manual_seed(5)
    teacher = torch.randn(13, 57, generator=generator, dtype=torch.float64) * 3
    labels = torch.randint(57, (13,), generator=generator)
    total, sums = whole_row_loss(name, head, hidden, teacher, labels, [0.07, 0.3])
    expected = plain_values(name, dense_logits(head, hidden), teacher, labels)
    each = torch.stack([0.07 * expected.sum(), 0.3 * expected.sum()]).detach()
    torch.testing.assert_close(sums, each, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(total, expected.sum() * 0.37, rtol=1e-11, atol=1e-12)
    assert not sums.requires_grad
    # Not the last node, and an upstream gradient that is not one.
    torch.testing.assert_close(
        gradients(total.square() * -2.5, head, hidden),
        gradients((expected.sum() * 0.37).square() * -2.5, head, hidden),
        rtol=1e-10,
        atol=1e-12,
    )


@pytest.mark.usefixtures("chunked")
def test_groups_are_never_parted():
    head, hidden, _ = problem()
    groups = [slice(0, 3), slice(3, 4), slice(4, 9), slice(9, 13)]
    seen = []

    def values_of(student, rows):
        seen.append((rows.start, rows.stop))
        yield student.logsumexp(1)

    total, _ = row_loss(head, hidden, values_of, groups)
    torch.testing.assert_close(total, dense_logits(head, hidden).logsumexp(1).sum())
    assert [start for start, _ in seen] == [0, *(stop for _, stop in seen[:-1])]
    assert {stop for _, stop in seen} <= {group.stop for group in groups}


def test_no_rows_have_a_zero_loss_that_backpropagates():
    head, hidden, _ = problem(num_positions=0, bias=True)
    total, sums = row_loss(head, hidden, lambda logits, rows: [logits.logsumexp(1)])
    assert float(total.detach()) == 0
    assert sums.tolist() == [0]
    assert not any(gradient.any() for gradient in gradients(total, head, hidden))


def test_without_gradients_there_are_values_alone():
    head, hidden, _ = problem()
    with torch.no_grad():
        total, sums = row_loss(head, hidden, lambda logits, rows: [2.0 * logits.logsumexp(1)])
    torch.testing.assert_close(sums[0], 2.0 * dense_logits(head, hidden).logsumexp(1).sum().detach())
    assert not total.requires_grad
    assert float(total) == pytest.approx(float(sums.sum()))


def test_a_frozen_head_still_hands_the_gradient_down():
    head, hidden, ids = problem()
    frozen = LMHead(head.weight_VD.detach())
    total = row_loss(frozen, hidden, lambda logits, rows: [logits.logsumexp(1)])[0]
    expected = dense_logits(frozen, hidden)
    for ours, theirs in (
        (total, expected.logsumexp(1).sum()),
        (uneven(logits_at(frozen, hidden, ids)), uneven(expected.gather(1, ids))),
    ):
        torch.testing.assert_close(
            torch.autograd.grad(ours, hidden, retain_graph=True),
            torch.autograd.grad(theirs, hidden, retain_graph=True),
            rtol=1e-12,
            atol=1e-12,
        )


def test_a_second_backward_of_a_row_loss_is_an_error():
    head, hidden, _ = problem()
    total = row_loss(head, hidden, lambda logits, rows: [logits.logsumexp(1)])[0]
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward only"):
        total.backward()


def test_a_second_backward_of_chosen_logits_is_an_error_or_right():
    head, hidden, ids = problem()
    chosen = logits_at(head, hidden, ids).sum()
    first = torch.autograd.grad(chosen, hidden, retain_graph=True)
    assert torch.equal(torch.autograd.grad(chosen, hidden)[0], first[0])
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(chosen, hidden)


@pytest.mark.parametrize("which", ["chosen", "rows"])
def test_a_gradient_of_the_gradient_is_an_error(which):
    head, hidden, ids = problem()
    if which == "chosen":
        loss = logits_at(head, hidden, ids).square().sum()
    else:
        loss = row_loss(head, hidden, lambda logits, rows: [logits.logsumexp(1)])[0].square()
    (gradient,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_tied_embeddings_get_both_gradients():
    head, _, ids = problem()
    tokens = torch.arange(13) * 2 % 57

    def tied(of_logits):
        hidden = head.weight_VD[tokens].tanh()
        return torch.autograd.grad(of_logits(hidden), head.weight_VD)[0]

    torch.testing.assert_close(
        tied(lambda hidden: uneven(logits_at(head, hidden, ids))),
        tied(lambda hidden: uneven(dense_logits(head, hidden).gather(1, ids))),
        rtol=1e-12,
        atol=1e-12,
    )
    torch.testing.assert_close(
        tied(lambda hidden: row_loss(head, hidden, lambda logits, rows: [logits.logsumexp(1)])[0]),
        tied(lambda hidden: dense_logits(head, hidden).logsumexp(1).sum()),
        rtol=1e-11,
        atol=1e-12,
    )


def integers(vocab_size, num_positions=30, size=6, span=2, seed=0):
    """Operands of small integers: every product is exact, and most logits tie."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randint(-span, span + 1, (vocab_size, size), generator=generator).float()
    return LMHead(weight), torch.randint(-span, span + 1, (num_positions, size), generator=generator).float()


@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("vocab_size", "k"), [(20, 3), (20, 12), (20, 20), (500, 1), (500, 8), (500, 40)])
def test_the_student_s_top_k_is_ordered_by_logit_then_id_under_ties(vocab_size, k, dtype):
    head, hidden = integers(vocab_size)
    expected = exact_top_k(hidden @ head.weight_VD.T, k)[1]
    assert torch.equal(student_top_k(head, hidden.to(dtype), k), expected)


def test_a_student_whose_logits_all_tie_leads_with_the_lowest_ids():
    assert student_top_k(LMHead(torch.ones(300, 5)), torch.ones(4, 5), 8).tolist() == [list(range(8))] * 4


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_the_student_s_top_k_is_that_of_its_float32_logits(options):
    head, hidden, _ = problem(200, 1000, 32, dtype=torch.float32, **options)
    expected = exact_top_k(dense_logits(head, hidden).detach(), 8)[1]
    assert torch.equal(student_top_k(head, hidden, 8), expected)


@pytest.mark.parametrize("k", [8, 256])
def test_a_bfloat16_scan_finds_the_float32_top_k(k):
    head, hidden, _ = problem(100, 5000, 32, dtype=torch.float32)
    hidden = hidden.detach().bfloat16()
    logits = head.logits_at(hidden, torch.arange(5000).expand(100, -1)).detach()
    scanned = exact_top_k((hidden @ head.weight_VD.detach().bfloat16().T).float(), k)[1]
    assert torch.equal(student_top_k(head, hidden, k), exact_top_k(logits, k)[1])
    assert not torch.equal(scanned, exact_top_k(logits, k)[1])  # which the scan alone does not


class LargestTensor(TorchDispatchMode):
    """Records the most elements of any tensor an operation returned."""

    num_elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.num_elements = max(self.num_elements, leaf.numel())
        return result


@pytest.mark.parametrize("which", ["chosen", "rows"])
def test_the_whole_logits_never_exist(monkeypatch, which):
    num_positions, vocab_size, size = 1200, 1000, 16
    monkeypatch.setattr(lm_head, "CHUNK_BYTES", 40 * 4 * vocab_size)
    head, hidden, _ = problem(num_positions, vocab_size, size, dtype=torch.float32)
    with LargestTensor() as largest:
        if which == "chosen":
            loss = logits_at(head, hidden, student_top_k(head, hidden, 8)).sum()
        else:
            loss = row_loss(head, hidden, lambda logits, rows: [logits.logsumexp(1)])[0]
        loss.backward()
    assert largest.num_elements <= 40 * vocab_size  # the chunk, far below the 1,200,000 of [N, V]
    with LargestTensor() as dense:
        dense_logits(head, hidden).sum()
    assert dense.num_elements == num_positions * vocab_size
