"""Hidden states become logits, top-k and tails in one place, in float32, for every architecture."""

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PhiConfig,
)

from cache_schema.errors import CacheCorruptError
from tests.tiny import tiny_tokenizer
from tests.tiny_models import build_tiny_model, save_tiny_llama
from workers.errors import InputError
from workers.teacher import lm_head, scoring
from workers.teacher.checkpoint import body_of, require_plain_head, require_vocabulary
from workers.teacher.lm_head import LMHead, chunks, float32_matmul, head_of, load_head, save_head
from workers.teacher.scoring import score

CPU = torch.device("cpu")
TEMPERATURES = (1.0, 3.0)


def random_head(seed=0, vocab_size=101, size=16, std=1.0, dtype=torch.float32, **options):
    generator = torch.Generator().manual_seed(seed)
    return LMHead((torch.randn(vocab_size, size, generator=generator) * std).to(dtype), **options)


def random_hidden(seed=1, num_positions=23, size=16, dtype=torch.float32):
    return torch.randn(num_positions, size, generator=torch.Generator().manual_seed(seed)).to(dtype)


def random_labels(num_positions=23, vocab_size=101):
    return torch.randint(vocab_size, (num_positions,), generator=torch.Generator().manual_seed(2))


def numpy_logits(head, hidden):
    """The definition, in float64."""
    logits = hidden.double().numpy() @ head.weight_VD.double().numpy().T
    if head.bias_V is not None:
        logits = logits + head.bias_V.double().numpy()
    logits = logits * head.scale
    return logits if head.softcap is None else head.softcap * np.tanh(logits / head.softcap)


def numpy_score(logits, labels, top_k, temperature):
    """Ids in order, the log-sum-exp of the others, the label's logit, mean and deviation, row by row."""
    ids = np.lexsort((np.broadcast_to(np.arange(logits.shape[1]), logits.shape), -logits), axis=1)
    tails = []
    for row, order in zip(logits, ids, strict=True):
        rest = row[order[top_k:]] / temperature
        tails.append(rest.max() + np.log(np.exp(rest - rest.max()).sum()))
    label_logits = logits[np.arange(len(logits)), labels]
    return ids[:, :top_k], np.array(tails), label_logits, logits.mean(1), logits.std(1, ddof=1)


HEADS = {
    "plain": {},
    "bias": {"bias_V": torch.linspace(-3, 3, 101)},
    "scale": {"scale": 0.25},
    "softcap": {"softcap": 5.0},
    "everything": {"bias_V": torch.linspace(-3, 3, 101), "scale": 0.5, "softcap": 10.0},
}


@pytest.mark.parametrize("options", HEADS.values(), ids=HEADS.keys())
@pytest.mark.parametrize("top_k", [1, 7, 100])
def test_a_scored_row_is_what_float64_says(options, top_k):
    head, hidden, labels = random_head(**options), random_hidden(), random_labels()
    top = score(head, hidden, labels, top_k, TEMPERATURES)
    logits = numpy_logits(head, hidden)
    for column, temperature in enumerate(TEMPERATURES):
        ids, tails, label_logits, means, stds = numpy_score(logits, labels.numpy(), top_k, temperature)
        np.testing.assert_array_equal(top.token_ids_NK.numpy(), ids)
        np.testing.assert_allclose(top.tail_logsumexp_NR[:, column].numpy(), tails, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(top.logits_NK.numpy(), np.take_along_axis(logits, ids, 1), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(top.label_logit_N.numpy(), label_logits, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(top.row_mean_N.numpy(), means, atol=1e-5)
    np.testing.assert_allclose(top.row_std_N.numpy(), stds, rtol=1e-5)
    assert {part.dtype for part in vars(top).values()} == {torch.int64, torch.float32}


def test_a_peaked_row_keeps_its_tail():
    # The first id stands 60 nats above the rest: subtracting it from the whole log-sum-exp would leave nothing.
    head, hidden = random_head(std=0.3), random_hidden()
    head.weight_VD[0] = 0
    peaked = LMHead(head.weight_VD, bias_V=torch.cat([torch.tensor([60.0]), torch.zeros(100)]))
    top = score(peaked, hidden, random_labels(), 1, TEMPERATURES)
    assert bool((top.token_ids_NK == 0).all())
    logits = numpy_logits(peaked, hidden)
    for column, temperature in enumerate(TEMPERATURES):
        tails = numpy_score(logits, random_labels().numpy(), 1, temperature)[1]
        np.testing.assert_allclose(top.tail_logsumexp_NR[:, column].numpy(), tails, rtol=0, atol=2e-6 * 60)
    with np.errstate(divide="ignore"):
        whole = np.logaddexp.reduce(logits.astype(np.float32), axis=1)
        subtracted = np.log(np.exp(whole - 60) - np.exp(logits[:, 0].astype(np.float32) - 60)) + 60
    assert not np.isfinite(subtracted).any()  # what is tested here can be seen: the subtraction has lost the tail


def test_the_whole_vocabulary_as_top_k_leaves_no_tail():
    top = score(random_head(), random_hidden(), random_labels(), 101, TEMPERATURES)
    assert bool((top.tail_logsumexp_NR == -torch.inf).all())


def test_ties_of_the_teacher_go_to_the_lower_id():
    head = LMHead(torch.ones(50, 4))
    assert (
        score(head, torch.ones(3, 4), torch.zeros(3, dtype=torch.long), 5, (1.0,)).token_ids_NK.tolist()
        == [[0, 1, 2, 3, 4]] * 3
    )


@pytest.mark.parametrize("rows_per_chunk", [1, 5, 23])
def test_chunking_changes_memory_not_the_result(monkeypatch, rows_per_chunk):
    head, hidden, labels = random_head(**HEADS["everything"]), random_hidden(), random_labels()
    ids = torch.randint(101, (23, 9))
    whole, whole_at = score(head, hidden, labels, 7, TEMPERATURES), head.logits_at(hidden, ids)
    sizes = []
    monkeypatch.setattr(lm_head, "CHUNK_BYTES", rows_per_chunk * 4 * 101)
    monkeypatch.setattr(
        scoring, "exact_top_k", lambda logits, k, run=scoring.exact_top_k: sizes.append(len(logits)) or run(logits, k)
    )
    chunked = score(head, hidden, labels, 7, TEMPERATURES)
    assert sum(sizes) == 23
    assert max(sizes) == rows_per_chunk
    for name, part in vars(whole).items():
        # A matmul of other shape may add in another order, so the last bit of a float is not promised.
        torch.testing.assert_close(getattr(chunked, name), part, rtol=1e-6, atol=2e-6)
    monkeypatch.setattr(lm_head, "CHUNK_BYTES", rows_per_chunk * 4 * 9 * 16)
    torch.testing.assert_close(head.logits_at(hidden, ids), whole_at, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_head_is_upcast_once_for_all_chunks_with_the_same_result(monkeypatch, dtype):
    head, hidden, labels = random_head(dtype=dtype, **HEADS["everything"]), random_hidden(dtype=dtype), random_labels()
    monkeypatch.setattr(lm_head, "CHUNK_BYTES", 5 * 4 * 101)
    upcast = []
    monkeypatch.setattr(
        scoring,
        "exact_top_k",
        lambda logits, k, run=scoring.exact_top_k: upcast.append(logits.clone()) or run(logits, k),
    )
    score(head, hidden, labels, 7, TEMPERATURES)
    assert len(upcast) == 5
    for number, logits in enumerate(upcast):
        assert torch.equal(logits, head.logits(hidden[5 * number : 5 * number + 5]))


def test_chunks_are_larger_on_a_gpu():
    row = lm_head.CHUNK_BYTES // 3
    assert len(list(chunks(24, row))) == len(list(chunks(24, row, CPU))) == 8
    assert len(list(chunks(24, row, torch.device("cuda")))) == 1


@pytest.mark.parametrize(
    ("num_rows", "bytes_per_row", "sizes"),
    [(0, 8, [0]), (5, 8, [5]), (5, 4, [5]), (25, 8, [12, 12, 1]), (3, 1000, [1, 1, 1]), (4, 0, [4])],
)
def test_chunks_cover_every_row_once_within_the_limit(monkeypatch, num_rows, bytes_per_row, sizes):
    monkeypatch.setattr(lm_head, "CHUNK_BYTES", 100)
    slices = list(chunks(num_rows, bytes_per_row))
    assert [part.stop - part.start for part in slices] == sizes
    assert [row for part in slices for row in range(part.start, part.stop)] == list(range(num_rows))


@pytest.mark.filterwarnings("ignore:std_mean")
def test_no_positions_score_to_empty_columns():
    top = score(random_head(), random_hidden(num_positions=0), random_labels(0), 7, TEMPERATURES)
    assert {name: tuple(part.shape) for name, part in vars(top).items()} == {
        "token_ids_NK": (0, 7),
        "logits_NK": (0, 7),
        "tail_logsumexp_NR": (0, 2),
        "label_logit_N": (0,),
        "row_mean_N": (0,),
        "row_std_N": (0,),
    }


@pytest.mark.parametrize("options", HEADS.values(), ids=HEADS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_chosen_logits_are_those_of_the_whole_row(options, dtype):
    head, hidden = random_head(dtype=dtype, **options), random_hidden(dtype=dtype)
    ids = torch.randint(101, (23, 9), generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(head.logits_at(hidden, ids), head.logits(hidden).gather(1, ids), rtol=1e-5, atol=1e-5)
    assert head.logits_at(hidden, ids[:, :0]).shape == (23, 0)
    assert head.logits_at(hidden[:0], ids[:0]).shape == (0, 9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_head_adds_up_in_float32(dtype):
    head, hidden = random_head(size=512, dtype=dtype), random_hidden(size=512, dtype=dtype)
    truth = numpy_logits(head, hidden)
    float32_error = np.abs((hidden.float() @ head.weight_VD.float().T).double().numpy() - truth).max()
    half_error = np.abs((hidden @ head.weight_VD.T).double().numpy() - truth).max()
    ids = torch.arange(101).expand(23, -1)
    for logits in (head.logits(hidden), head.logits_at(hidden, ids)):
        assert logits.dtype == torch.float32
        error = np.abs(logits.double().numpy() - truth).max()
        assert error <= 4 * float32_error
        assert error < half_error / 100


def test_the_matmul_s_precision_setting_is_left_as_it_was():
    before = torch.get_float32_matmul_precision()
    float32_matmul(torch.ones(2, 3, dtype=torch.bfloat16), torch.ones(4, 3, dtype=torch.bfloat16))
    assert torch.get_float32_matmul_precision() == before
    with pytest.raises(RuntimeError):
        float32_matmul(torch.ones(2, 3, dtype=torch.bfloat16), torch.ones(4, 5, dtype=torch.bfloat16))
    assert torch.get_float32_matmul_precision() == before


def test_a_head_is_probed_whatever_weight_is_not_finite():
    model = build_tiny_model(tiny_tokenizer(), LlamaConfig)
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[3, 4] = torch.nan
    with pytest.raises(
        InputError, match=r"NaN or infinity at its own probe: its weight model\.layers\.2\.mlp\.up_proj"
    ):
        require_plain_head(model, 384)


@pytest.mark.parametrize("family", [LlamaConfig, PhiConfig])
def test_padded_vocabulary_rows_are_cut(family):
    model = build_tiny_model(tiny_tokenizer(), family, vocab_size=448)
    head = head_of(model, 384)
    input_ids = torch.arange(20)[None]
    with torch.no_grad():
        expected = model(input_ids).logits[0]
        hidden = body_of(model)(input_ids=input_ids).last_hidden_state[0]
        assert expected.shape == (20, 448)
        torch.testing.assert_close(head.logits(hidden), expected[:, :384], rtol=1e-5, atol=1e-5)
        assert int(score(head, hidden, torch.zeros(20, dtype=torch.long), 384, (1.0,)).token_ids_NK.max()) == 383


def test_a_model_with_fewer_rows_than_the_tokenizer_has_ids_is_refused():
    require_vocabulary(build_tiny_model(tiny_tokenizer(), LlamaConfig, vocab_size=384), 384)
    with pytest.raises(InputError, match=r"has 383 rows, the tokenizer 384 ids"):
        require_vocabulary(build_tiny_model(tiny_tokenizer(), LlamaConfig, vocab_size=383), 384)


def test_a_model_without_a_head_is_refused():
    with pytest.raises(InputError, match="LlamaModel: its LM head has 0 rows"):
        require_vocabulary(build_tiny_model(tiny_tokenizer(), LlamaConfig).model, 384)


def test_the_head_is_the_model_s_own_parameter(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(save_tiny_llama(tmp_path, tiny_tokenizer()))
    assert head_of(model, 384).weight_VD is model.lm_head.weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("options", HEADS.values(), ids=HEADS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_head_is_read_back_bit_for_bit(tmp_path, dtype, options):
    head = random_head(dtype=dtype, **options)
    path = tmp_path / "lm_head.safetensors"
    save_head(head, path)
    loaded = load_head(path, CPU)
    assert loaded.weight_VD.dtype == dtype
    assert torch.equal(loaded.weight_VD, head.weight_VD)
    assert (loaded.scale, loaded.softcap) == (head.scale, head.softcap)
    assert (loaded.bias_V is None) == (head.bias_V is None)
    assert head.bias_V is None or torch.equal(loaded.bias_V, head.bias_V)
    assert [file.name for file in tmp_path.iterdir()] == ["lm_head.safetensors"]


def test_a_head_cut_from_a_padded_model_is_saved_without_the_padding(tmp_path):
    model = build_tiny_model(tiny_tokenizer(), LlamaConfig, vocab_size=448)
    save_head(head_of(model, 384), tmp_path / "head")
    assert load_head(tmp_path / "head", CPU).weight_VD.shape == (384, 32)
    assert (tmp_path / "head").stat().st_size < 384 * 32 * 4 + 1024


DAMAGES = {
    "missing": lambda path, content: path.unlink(),
    "empty": lambda path, content: path.write_bytes(b""),
    "short": lambda path, content: path.write_bytes(content[:-100]),
    "only its header": lambda path, content: path.write_bytes(content[:8]),
    "no JSON": lambda path, content: path.write_bytes(content[:8] + b"\xff" * (len(content) - 8)),
    "another tensor": lambda path, content: path.write_bytes(content.replace(b'"weight"', b'"wei-ht"')),
    "no scale": lambda path, content: path.write_bytes(content.replace(b"scale", b"sca-e")),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_head_says_so(tmp_path, damage):
    path = tmp_path / "lm_head.safetensors"
    save_head(random_head(), path)
    damage(path, path.read_bytes())
    with pytest.raises(CacheCorruptError, match=r"lm_head\.safetensors cannot be read.*dump again"):
        load_head(path, CPU)
