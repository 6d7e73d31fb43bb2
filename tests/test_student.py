"""A student of some of a model's layers; and the module that makes a loss of a batch, as the dense computation does."""

import copy
import dataclasses
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    LlamaConfig,
    PhiConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    SmolLM3Config,
)

from tests.tiny import tiny_tokenizer
from tests.tiny_cache import CPU, dump_tiny_cache, random_sequences
from tests.tiny_models import build_tiny_model, save_tiny_llama, save_tiny_model
from workers.distill.student import keep_layers, load_student
from workers.distill.student_loss import StudentLoss
from workers.distill.terms import Term
from workers.errors import InputError
from workers.lookup.batch import collate
from workers.lookup.opening import stored_ladder
from workers.losses.catalogue import LOSSES
from workers.losses.dense import dense_loss
from workers.teacher import lm_head

VOCAB_SIZE = 384
INPUT_IDS = torch.randint(VOCAB_SIZE, (2, 24), generator=torch.Generator().manual_seed(0))

CUTTABLE = {
    "llama, tied": (LlamaConfig, {"tie_word_embeddings": True}),
    "qwen2, two kinds of attention": (
        Qwen2Config,
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2, "tie_word_embeddings": False},
    ),
    "smollm3, a layer without positions": (SmolLM3Config, {"no_rope_layers": [1, 1, 1, 0]}),
    "gemma2, alternating": (Gemma2Config, {"head_dim": 16, "sliding_window": 4}),
}


def logits_of(model):
    with torch.no_grad():
        return model(INPUT_IDS, use_cache=False).logits


def logits_with_layers_skipped(model, kept):
    """The definition: the whole model, in which every other layer hands on what it was given."""
    skipping = copy.deepcopy(model)
    for index, layer in enumerate(skipping.model.layers):
        if index not in kept:
            layer.forward = lambda hidden_states, *args, **kwargs: hidden_states
    return logits_of(skipping)


@pytest.mark.parametrize(("family", "config"), CUTTABLE.values(), ids=CUTTABLE.keys())
@pytest.mark.parametrize("kept", [[0, 3], [1, 2, 3], [2], [0, 1, 2, 3]])
def test_a_student_of_some_layers_saves_and_loads_as_a_plain_model(tmp_path, family, config, kept):
    model = build_tiny_model(tiny_tokenizer(), family, **config)
    expected = logits_with_layers_skipped(model, kept)
    keep_layers(model, kept)
    torch.testing.assert_close(logits_of(model), expected)
    model.save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert plain.config.num_hidden_layers == len(kept)
    assert torch.equal(logits_of(plain), logits_of(model))
    assert plain.state_dict().keys() == model.state_dict().keys()


def test_the_layer_kinds_matter():
    family, config = CUTTABLE["qwen2, two kinds of attention"]
    model = build_tiny_model(tiny_tokenizer(), family, **config)
    keep_layers(model, [0, 3])
    assert model.config.layer_types == ["full_attention", "sliding_attention"]
    right = logits_of(model)
    for name in ("layer_types", "max_window_layers"):
        changed = copy.deepcopy(model.config)
        setattr(changed, name, ["full_attention"] * 2 if name == "layer_types" else 2)
        other = type(model)(changed).eval()
        other.load_state_dict(model.state_dict())
        # The list alone decides; the rule it came from does not.
        assert torch.allclose(logits_of(other), right, atol=1e-5) == (name == "max_window_layers")


def test_a_cut_student_generates_with_its_keys_and_values_cached():
    model = build_tiny_model(tiny_tokenizer(), LlamaConfig)
    keep_layers(model, [1, 3])
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    prompt = {"input_ids": INPUT_IDS, "attention_mask": torch.ones_like(INPUT_IDS)}
    cached, plain = (model.generate(**prompt, use_cache=use_cache, **options) for use_cache in (True, False))
    assert torch.equal(cached, plain)


def test_lists_of_the_config_that_are_not_per_layer_stay_whole():
    model = build_tiny_model(tiny_tokenizer(), LlamaConfig, eos_token_id=[2, 1, 5, 9])
    keep_layers(model, [0, 3])
    assert model.config.eos_token_id == [2, 1, 5, 9]


@pytest.mark.parametrize("layers", [[], [4], [0, 4], [-1], [-1, 2], [0, 0], [2, 1]])
def test_a_layer_list_that_names_no_model_is_refused(layers):
    model = build_tiny_model(tiny_tokenizer(), LlamaConfig)
    before = logits_of(model)
    with pytest.raises(InputError, match=r"--student-layers .*ascending indexes from 0 to 3.*has 4 layers"):
        keep_layers(model, layers)
    assert torch.equal(logits_of(model), before)


def test_a_student_whose_config_names_layers_by_index_is_refused():
    mixture = {"mlp_only_layers": [1], "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
    model = build_tiny_model(tiny_tokenizer(), Qwen2MoeConfig, shared_expert_intermediate_size=16, **mixture)
    with pytest.raises(InputError, match=r"no longer describes its layers \(model\.layers\.0"):
        keep_layers(model, [1, 2])


def test_a_student_is_loaded_in_float32_and_in_training_mode(tmp_path):
    folder = str(save_tiny_llama(tmp_path, tiny_tokenizer(), dtype=torch.bfloat16))
    student = load_student(folder, [0, 2], gradient_checkpointing=True)
    assert student.training
    assert student.is_gradient_checkpointing
    assert {parameter.dtype for parameter in student.parameters()} == {torch.float32}
    assert len(student.model.layers) == 2
    assert len(load_student(folder, None, gradient_checkpointing=False).model.layers) == 4


@pytest.fixture(autouse=True)
def gathered(monkeypatch):
    """Rows of the head are gathered one by one, as where the vocabulary is large."""
    monkeypatch.setattr(lm_head, "_DENSE_PRODUCTS_PER_GATHER", 0)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A teacher, its cache of all positions with logits stored exactly, and the cache's sequences."""
    teacher_dir = save_tiny_llama(tmp_path_factory.mktemp("teacher"), tiny_tokenizer(), layers=2)
    reader = dump_tiny_cache(
        tmp_path_factory.mktemp("caches") / "all", teacher_dir, random_sequences(), positions="all", logit_step=0
    )
    return SimpleNamespace(reader=reader, teacher=AutoModelForCausalLM.from_pretrained(teacher_dir).eval())


STUDENTS = {
    "llama, tied": (LlamaConfig, {"tie_word_embeddings": True}),
    "qwen2, untied, padded vocabulary": (Qwen2Config, {"tie_word_embeddings": False, "vocab_size": 400}),
    "gemma2, soft cap": (Gemma2Config, {"head_dim": 16, "final_logit_softcapping": 5.0}),
    "cohere, logit scale": (CohereConfig, {"logit_scale": 0.5}),
    "phi, bias": (PhiConfig, {}),
}


def build_student(name="llama, tied"):
    family, config = STUDENTS[name]
    return build_tiny_model(tiny_tokenizer(), family, seed=7, **{"num_hidden_layers": 2, **config})


def term(name, part="response", weight=1.0, **params):
    return Term(part, LOSSES[name], LOSSES[name].defaults() | params, weight)


TERMS = {
    "bild": [term("bild")],
    "bild, k = 5, T = 1": [term("bild", k=5, temperature=1.0)],
    "t_ld": [term("t_ld")],
    "s_ld": [term("s_ld")],
    "s_ld of more than is stored": [term("s_ld", k=20)],
    "topk_kl": [term("topk_kl", k=8)],
    "kl": [term("kl")],
    "kl, T2": [term("kl", T2=True)],
    "rkl": [term("rkl")],
    "sft": [term("sft")],
    "bild and kl on the prompt": [term("bild"), term("kl", "prompt", temperature=1.0)],
    "a sum": [term("bild", k=5), term("sft", weight=0.5), term("tail_gjsd", k=6, weight=2.0), term("topk_kl", k=8)],
    **{
        f"{name}, by its defaults": [term(name, **({"k": 8} if "k" in loss.parameters else {}))]
        for name, loss in LOSSES.items()
        if not loss.group_size and "samples" not in loss.needs  # what dense logits have no counterpart of
    },
}


def module_of(tiny, model, *, autocast=False):
    return StudentLoss(model, [stored_ladder(tiny.reader, CPU)], vocab_size=VOCAB_SIZE, autocast=autocast)


def parts_of(terms):
    return list(dict.fromkeys(term.part for term in terms))


def for_step(terms, batches):
    return [term.scaled(term.weight_in(batches)) for term in terms]


def gradients(model):
    found = {name: parameter.grad.double() for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return found


def step(tiny, model, terms, splits, **options):
    """One optimizer step's loss, shares and gradients, in micro-batches of these cache indexes."""
    module = module_of(tiny, model, **options)
    batches = [collate(tiny.reader, indexes, parts_of(terms), CPU) for indexes in splits]
    total, shares = 0.0, 0.0
    for batch in batches:
        loss, share = module.share(batch, for_step(terms, batches))
        loss.backward()
        total, shares = total + float(loss.detach()), shares + share.double()
    return total, shares, gradients(model)


def reference(tiny, model, teacher, terms, indexes, *, autocast=False):
    """The same from whole logits: each sequence alone, unpadded, the label of token t being token t + 1."""
    total = 0.0
    for term in terms:
        student_rows, teacher_rows, labels = [], [], []
        for index in indexes:
            sequence = tiny.reader[index].sequence
            input_ids = torch.tensor(sequence.input_ids).long()
            wanted = [t for t in range(1, len(input_ids)) if bool(sequence.loss_mask[t]) == (term.part == "response")]
            before = torch.tensor(wanted, dtype=torch.long) - 1
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                student_rows.append(model(input_ids[None]).logits[0, before, :VOCAB_SIZE])
            with torch.no_grad():
                teacher_rows.append(teacher(input_ids[None]).logits[0, before])
            labels.append(input_ids[wanted])
        rows = [torch.cat(part) for part in (student_rows, teacher_rows, labels)]
        mask = torch.ones(len(rows[2]))
        value = dense_loss(term.loss.name, rows[0], rows[1], mask, labels=rows[2], prompt_mask=0 * mask, **term.params)
        total = total + term.weight * value
    total.backward()
    return float(total.detach()), gradients(model)


def relative_error(found, truth):
    """Worst error of the value and of any parameter's gradient, each against the largest entry of the truth."""
    errors = [abs(found[0] - truth[0]) / abs(truth[0])]
    for name, gradient in truth[1].items():
        largest = float(gradient.abs().max())
        error = float((found[1][name] - gradient).abs().max())
        # A key's bias moves every score of a query alike, so its gradient is zero but for rounding.
        errors.append(error / largest if largest > 1e-9 else error)
    return max(errors)


def assert_equal_to_rounding(tiny, model, terms, found, indexes):
    """No further from float64 than the dense computation in float32 is, by a small factor."""
    truth = reference(tiny, copy.deepcopy(model).double(), copy.deepcopy(tiny.teacher).double(), terms, indexes)
    plain = reference(tiny, model, tiny.teacher, terms, indexes)
    assert truth[0] > 1e-3
    error, allowed = relative_error(found, truth), 4 * relative_error(plain, truth) + 1e-6
    assert allowed < 1e-3
    assert error <= allowed


@pytest.mark.parametrize("terms", TERMS.values(), ids=TERMS.keys())
def test_the_loss_of_a_batch_is_the_dense_loss_of_both_models(tiny, terms):
    model, indexes = build_student(), range(len(tiny.reader))
    total, shares, grads = step(tiny, model, terms, [indexes])
    assert total == pytest.approx(float(shares.sum()), rel=1e-6)
    assert_equal_to_rounding(tiny, model, terms, (total, grads), indexes)


@pytest.mark.parametrize("student", STUDENTS)
@pytest.mark.parametrize("name", ["bild", "kl", "sft"])
def test_every_architecture_s_head_is_trained_as_the_model_would_train_it(tiny, student, name):
    model, indexes = build_student(student), [1, 4, 6]
    total, _, grads = step(tiny, model, TERMS[name], [indexes])
    assert_equal_to_rounding(tiny, model, TERMS[name], (total, grads), indexes)


@pytest.mark.parametrize("splits", [[[0, 1, 2], [3, 4, 5, 6]], [[6], [0, 1, 2, 3, 4, 5]], [[i] for i in range(7)]])
@pytest.mark.parametrize(
    "terms",
    [
        TERMS["bild"],
        TERMS["kl"],
        TERMS["sft"],
        TERMS["bild and kl on the prompt"],
        TERMS["a sum"],
        [term("logistic_ranking", k=8)],
        [term("hinge", k=8)],
        [term("sinkd", rows=5, coef=1.0)],
        [term("rank_loss", k=3, dynamic=True), term("gjsd"), term("t_ld", k=5)],
    ],
    ids=lambda terms: "+".join(term.loss.name for term in terms),
)
def test_micro_batch_size_changes_memory_not_the_training(tiny, terms, splits):
    model = build_student()
    whole = step(tiny, model, terms, [range(7)])
    split = step(tiny, model, terms, splits)
    assert relative_error((split[0], split[2]), (whole[0], whole[2])) < 1e-4
    torch.testing.assert_close(split[1], whole[1], rtol=1e-5, atol=1e-7)


def test_the_dynamic_factor_is_the_share_of_common_ids(tiny):
    model, index, k = build_student(), 6, 8
    rank, other = term("rank_loss", k=k, dynamic=True), term("sft")
    batch = collate(tiny.reader, [index], ["response"], CPU)
    positions = batch.parts["response"]
    rows = model(batch.input_ids_BT).logits[0, positions.token_of_N, :VOCAB_SIZE]
    own = rows.topk(k).indices.tolist()
    shares = [len(set(led) & set(top)) / k for led, top in zip(positions.token_ids_NK.tolist(), own, strict=True)]
    assert 0 < sum(shares) < len(shares)
    values = torch.nn.functional.cross_entropy(rows, positions.labels_N, reduction="none")
    expected = (values * torch.tensor(shares)).mean()
    found = step(tiny, model, [rank, other], [[index]])[1][1]
    torch.testing.assert_close(found.float(), expected.detach(), rtol=1e-4, atol=1e-6)


def test_sinkd_compares_positions_of_one_sequence_with_each_other(tiny):
    model, terms = build_student(), [term("sinkd", rows=4)]
    batch = collate(tiny.reader, range(7), ["response"], CPU)
    positions, values = batch.parts["response"], []
    logits = model(batch.input_ids_BT).logits
    with torch.no_grad():
        teacher = tiny.teacher(batch.input_ids_BT).logits
    for row in range(7):
        columns = positions.token_of_N[positions.sequence_of_N == row]
        for group in columns.split(4):
            mask = torch.ones(len(group))
            values.append(dense_loss("sinkd", logits[row, group], teacher[row, group], mask))
    total = step(tiny, model, terms, [range(7)])[0]
    assert len(values) > 7
    assert total == pytest.approx(float(torch.stack(values).mean().detach()), rel=1e-5)


def test_a_token_weighs_the_same_in_a_short_sequence_as_in_a_long_one(tiny):
    # Sequences of 1 and of many trained tokens: a mean of means would differ.
    lengths = [int(tiny.reader[index].sequence.loss_mask.sum()) for index in range(7)]
    one, many = lengths.index(1), lengths.index(max(lengths))
    model = build_student()
    alone = {index: step(tiny, model, TERMS["sft"], [[index]])[0] for index in (one, many)}
    together = step(tiny, model, TERMS["sft"], [[one], [many]])[0]
    weighted = (alone[one] + alone[many] * lengths[many]) / (1 + lengths[many])
    assert together == pytest.approx(weighted, rel=1e-6)
    assert together != pytest.approx((alone[one] + alone[many]) / 2, rel=1e-3)


@pytest.mark.parametrize("name", ["bild", "kl", "sft"])
def test_what_stands_in_the_padding_changes_nothing(tiny, name):
    model, terms = build_student(), TERMS[name]
    module, batch = module_of(tiny, model), collate(tiny.reader, [0, 3, 6], ["response"], CPU)
    lengths = torch.tensor([tiny.reader[index].sequence.num_tokens for index in (0, 3, 6)])
    wide = torch.randint(VOCAB_SIZE, (3, batch.input_ids_BT.shape[1] + 9), generator=torch.manual_seed(0))
    inside = torch.arange(wide.shape[1]) < lengths.unsqueeze(1)
    wide[inside] = batch.input_ids_BT[inside[:, : batch.input_ids_BT.shape[1]]]
    found = []
    for padded in (batch, dataclasses.replace(batch, input_ids_BT=wide)):
        loss = module.share(padded, for_step(terms, [batch]))[0]
        loss.backward()
        found.append((float(loss.detach()), gradients(model)))
    assert relative_error(found[1], found[0]) < 1e-4


@pytest.mark.parametrize("name", ["bild", "kl"])
def test_chunks_of_the_head_change_memory_not_the_training(tiny, monkeypatch, name):
    model = build_student()
    whole = step(tiny, model, TERMS[name], [range(7)])
    monkeypatch.setattr(lm_head, "CHUNK_BYTES", 5 * 4 * VOCAB_SIZE)
    chunked = step(tiny, model, TERMS[name], [range(7)])
    assert relative_error((chunked[0], chunked[2]), (whole[0], whole[2])) < 1e-4


def test_lookups_are_counted_for_the_ids_the_student_leads_with(tiny):
    model, batch = build_student(), collate(tiny.reader, range(7), ["response"], CPU)
    module = module_of(tiny, model)
    module.share(batch, for_step(TERMS["bild"], [batch]))
    counts, forwards = module.ladders[0].take_counts()
    assert sum(counts.values()) == 8 * batch.num_positions("response")
    assert counts["cached"] + counts["hidden"] == sum(counts.values())
    assert forwards == 0


def test_a_part_without_positions_is_a_zero_that_backpropagates(tiny):
    model = build_student()
    batch = collate(tiny.reader, [2], ["response"], CPU)
    nothing = dataclasses.replace(
        batch.parts["response"],
        **{
            name: getattr(batch.parts["response"], name)[:0]
            for name in ("sequence_of_N", "token_of_N", "token_ids_NK", "logits_NK", "labels_N")
        },
    )
    for terms in (TERMS["bild"], TERMS["sft"]):
        empty = dataclasses.replace(batch, parts={"response": nothing})
        loss, shares = module_of(tiny, model).share(empty, for_step(terms, [empty]))
        loss.backward()
        assert float(loss.detach()) == float(shares.sum()) == 0.0
        assert not any(gradient.any() for gradient in gradients(model).values())


@pytest.mark.parametrize("name", ["bild", "kl", "sft"])
def test_under_autocast_gradients_are_no_worse_than_those_of_dense_bfloat16_logits(tiny, name):
    model = build_student()
    exact, rounded = (step(tiny, model, TERMS[name], [range(7)], autocast=autocast) for autocast in (False, True))
    plain = reference(tiny, model, tiny.teacher, TERMS[name], range(7), autocast=True)
    truth, *found = (
        torch.cat([gradient.flatten() for gradient in grads.values()]) for grads in (exact[2], rounded[2], plain[1])
    )
    ours, dense = (float((gradient - truth).norm() / truth.norm()) for gradient in found)
    assert 0 < ours < 1.2 * dense


def test_a_student_trained_on_its_own_cache_has_nothing_to_learn(tiny):
    found = step(tiny, copy.deepcopy(tiny.teacher), TERMS["bild"], [range(7)])
    assert found[0] == pytest.approx(0, abs=1e-6)
    assert max(float(gradient.abs().max()) for gradient in found[2].values()) < 1e-4


def test_a_saved_student_is_a_plain_checkpoint(tmp_path):
    folder = save_tiny_model(tmp_path / "whole", tiny_tokenizer(), Qwen2Config, tie_word_embeddings=False)
    student = load_student(str(folder), [0, 3], gradient_checkpointing=False)
    student.save_pretrained(tmp_path / "student")
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "student")), logits_of(student.eval()))
