"""Adapters on a student: what is trained, what is saved, and that plain PEFT and plain transformers read it."""

import copy
import json
import math
import sys

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MixtralConfig, PhiConfig

from tests.tiny import tiny_tokenizer
from tests.tiny_cache import CPU, dump_tiny_cache, random_sequences
from tests.tiny_models import build_tiny_model, save_tiny_llama, save_tiny_model
from workers.distill.adapters import (
    PeftConfig,
    add_adapters,
    freeze_parts,
    load_trained,
    merged_state,
    require_freezable,
    save_adapter,
)
from workers.distill.student import load_student
from workers.distill.student_loss import StudentLoss
from workers.distill.terms import Term
from workers.errors import InputError
from workers.lookup.batch import collate
from workers.lookup.opening import stored_ladder
from workers.losses.catalogue import LOSSES
from workers.teacher.checkpoint import require_plain_head

VOCAB_SIZE = 384
INPUT_IDS = torch.randint(VOCAB_SIZE, (2, 24), generator=torch.Generator().manual_seed(0))

STUDENTS = {
    "llama, tied": (LlamaConfig, {"tie_word_embeddings": True}, "model.embed_tokens", "lm_head"),
    "llama, untied": (LlamaConfig, {"tie_word_embeddings": False}, "model.embed_tokens", "lm_head"),
    "gpt2, Conv1D": (GPT2Config, {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}, "transformer.wte", ""),
    "phi, biases": (PhiConfig, {}, "model.embed_tokens", "lm_head"),
}

CONFIGS = {
    "lora": PeftConfig(r=4, alpha=8),
    "dora": PeftConfig(method="dora", r=4, alpha=8),
    "rslora on two layers": PeftConfig(rslora=True, r=4, alpha=8, target_modules=("k_proj", "0.self_attn.q_proj")),
    "lora, embeddings": PeftConfig(r=4, alpha=8, train_embeddings=True),
    "dora, head": PeftConfig(method="dora", r=4, alpha=8, train_head=True),
    "lora, embeddings and head": PeftConfig(r=4, alpha=8, train_embeddings=True, train_head=True),
}

EACH = [
    *(("llama, tied", config) for config in CONFIGS),
    *(("llama, untied", config) for config in CONFIGS),
    *(("gpt2, Conv1D", config) for config in ("lora", "dora, head")),
    *(("phi, biases", config) for config in ("lora", "dora, head")),
]
each = pytest.mark.parametrize(("student", "config"), EACH, ids=[", ".join(pair) for pair in EACH])


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    teacher = save_tiny_llama(folder / "teacher", tiny_tokenizer(), layers=2)
    return dump_tiny_cache(folder / "cache", teacher, random_sequences(), positions="all", logit_step=0)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Each student's folder, where plain transformers finds the base."""
    folder = tmp_path_factory.mktemp("bases")
    return {
        name: str(save_tiny_model(folder / name, tiny_tokenizer(), family, **{"num_hidden_layers": 2, **config}))
        for name, (family, config, *_) in STUDENTS.items()
    }


def adapted(base, config, seed=0, layers=None, gradient_checkpointing=False):
    model = load_student(base, layers, gradient_checkpointing=gradient_checkpointing)
    add_adapters(model, config, seed)
    return model


def backward(model, reader):
    """The gradients of one step of BiLD and the labels' cross-entropy."""
    student = StudentLoss(model, [stored_ladder(reader, CPU)], vocab_size=VOCAB_SIZE, autocast=False)
    terms = [Term("response", LOSSES[name], LOSSES[name].defaults(), 1.0) for name in ("bild", "sft")]
    batch = collate(reader, range(7), ["response"], CPU)
    loss, _ = student.share(batch, [term.scaled(term.weight_in([batch])) for term in terms])
    loss.backward()


def train(model, reader, steps=2):
    """Two steps move all there is: the first leaves LoRA's A, whose gradient a B of zeros hides."""
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-2)
    for _ in range(steps):
        backward(model, reader)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return model


def logits_of(model, dtype=torch.float32):
    model = copy.deepcopy(model).to(dtype).eval()
    with torch.no_grad():
        return model(INPUT_IDS, use_cache=False).logits


def trained_whole(student, config):
    """Names of the weights beside the adapters that are to be trained, under every name they have."""
    _, _, embeddings, head = STUDENTS[student]
    tied = student in ("llama, tied", "gpt2, Conv1D")
    names = {f"{embeddings}.weight"} if config.train_embeddings or (tied and config.train_head) else set()
    if head and not tied and config.train_head:
        names.add(f"{head}.weight")
    return names | ({"lm_head.bias"} if student == "phi, biases" and config.train_head else set())


def bits(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@each
def test_adapters_and_what_was_asked_for_are_trained_and_nothing_else(bases, reader, student, config):
    config = CONFIGS[config]
    model = adapted(bases[student], config)
    backward(model, reader)
    graded = {name for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad(set_to_none=True)
    adapters = {name for name, _ in model.named_parameters() if ".lora_" in name}
    assert graded == adapters | trained_whole(student, config)
    before = bits(model)
    train(model, reader)
    moved = {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}
    assert moved == graded


@each
def test_an_adapted_student_starts_as_its_base(bases, student, config):
    model = adapted(bases[student], CONFIGS[config])
    require_plain_head(model, VOCAB_SIZE)
    expected = logits_of(load_student(bases[student], None, gradient_checkpointing=False))
    torch.testing.assert_close(logits_of(model), expected, rtol=1e-5, atol=1e-5)
    assert all(module.training for module in model.modules())


@each
def test_the_merged_student_is_a_plain_model_with_the_same_logits(tmp_path, bases, reader, student, config):
    model = train(adapted(bases[student], CONFIGS[config]), reader)
    model.save_pretrained(tmp_path, state_dict=merged_state(model))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    truth = logits_of(model, torch.float64)
    rounding = (logits_of(model) - truth).abs().max()
    assert (logits_of(plain) - truth).abs().max() <= 4 * rounding
    assert (logits_of(load_student(bases[student], None, gradient_checkpointing=False)) - truth).abs().max() > 0.1
    # The same tensors as in the base, tied or not: neither more nor others.
    base = AutoModelForCausalLM.from_pretrained(bases[student])
    assert [name for name, _ in plain.named_parameters()] == [name for name, _ in base.named_parameters()]
    assert plain.config.to_diff_dict() | {"_name_or_path": ""} == base.config.to_diff_dict() | {"_name_or_path": ""}


@each
def test_the_adapter_alone_loads_in_plain_peft_with_the_same_logits(tmp_path, bases, reader, student, config):
    model = train(adapted(bases[student], CONFIGS[config]), reader)
    save_adapter(model, tmp_path, bases[student])
    expected = logits_of(model)
    for low_memory in (False, True):
        base = AutoModelForCausalLM.from_pretrained(bases[student])
        assert torch.equal(logits_of(PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=low_memory)), expected)
    assert torch.equal(logits_of(AutoPeftModelForCausalLM.from_pretrained(tmp_path)), expected)
    if CONFIGS[config].method == "lora":  # transformers 5.19 leaves DoRA's norms as they began, under a name of its own
        assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path)), expected)


@pytest.mark.parametrize("config", CONFIGS)
def test_merging_is_peft_s_own_bit_for_bit(tmp_path, bases, reader, config):
    student = "llama, tied"
    model = train(adapted(bases[student], CONFIGS[config]), reader)
    save_adapter(model, tmp_path, bases[student])
    base = AutoModelForCausalLM.from_pretrained(bases[student])
    theirs = PeftModel.from_pretrained(base, tmp_path).merge_and_unload().state_dict()
    ours = merged_state(model)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("config", ["lora", "dora", "rslora on two layers"])
def test_a_merged_weight_is_the_published_formula(bases, reader, config):
    config = CONFIGS[config]
    model = train(adapted(bases["llama, tied"], config), reader)
    layer = model.model.layers[0].self_attn.q_proj
    weight, down, up = (
        m.weight.detach().double() for m in (layer.base_layer, layer.lora_A.default, layer.lora_B.default)
    )
    changed = weight + config.alpha / (math.sqrt(config.r) if config.rslora else config.r) * up @ down
    if config.method == "dora":
        norms = layer.lora_magnitude_vector.default.weight.detach().double().unsqueeze(1)
        changed = norms * changed / changed.norm(dim=1, keepdim=True)
    merged = merged_state(model)["model.layers.0.self_attn.q_proj.weight"]
    assert (merged - weight).abs().max() > 1e-3
    torch.testing.assert_close(merged.double(), changed, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("config", ["lora", "dora, head"])
def test_saving_in_the_midst_of_training_changes_nothing(tmp_path, bases, reader, config):
    saved, unbroken = (adapted(bases["llama, tied"], CONFIGS[config]) for _ in range(2))
    train(saved, reader)
    before, config_before = bits(saved), copy.deepcopy(saved.peft_config["default"])
    save_adapter(saved, tmp_path / "adapter", bases["llama, tied"])
    saved.save_pretrained(tmp_path / "merged", state_dict=merged_state(saved))
    assert all(torch.equal(tensor, before[name]) for name, tensor in saved.state_dict().items())
    assert saved.peft_config["default"] == config_before
    train(unbroken, reader)
    train(saved, reader)
    train(unbroken, reader)
    assert all(torch.equal(tensor, saved.state_dict()[name]) for name, tensor in unbroken.state_dict().items())


@pytest.mark.parametrize("config", ["lora", "dora, head", "lora, embeddings and head"])
def test_trained_weights_alone_make_the_student_of_some_layers_again(tmp_path, reader, config):
    whole = str(save_tiny_llama(tmp_path / "whole", tiny_tokenizer(), layers=4))
    model = train(adapted(whole, CONFIGS[config], layers=[0, 3]), reader)
    trained = {name: weight.detach().clone() for name, weight in model.named_parameters() if weight.requires_grad}
    fresh = load_student(whole, [0, 3], gradient_checkpointing=False)
    fresh.save_pretrained(tmp_path / "base")
    add_adapters(fresh, CONFIGS[config], 0)
    load_trained(fresh, trained)
    assert torch.equal(logits_of(fresh), logits_of(model))
    save_adapter(fresh, tmp_path / "adapter", str(tmp_path / "base"))
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    assert torch.equal(logits_of(again), logits_of(model))


def test_weights_of_another_student_are_refused(bases):
    model = adapted(bases["llama, tied"], CONFIGS["lora"])
    trained = {name: weight.detach().clone() for name, weight in model.named_parameters() if weight.requires_grad}
    name = "model.layers.0.self_attn.q_proj.lora_A.default.weight"
    with pytest.raises(ValueError, match=rf"{name} is not among the weights"):
        load_trained(model, {key: tensor for key, tensor in trained.items() if key != name})
    with pytest.raises(ValueError, match=r"lm_head\.weight is no trained parameter"):
        load_trained(model, trained | {"lm_head.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match=rf"{name} has the shape \[4, 32\], not \[1\]"):
        load_trained(model, trained | {name: torch.zeros(1)})


def test_an_adapter_s_files_say_no_more_than_was_given(tmp_path, bases):
    model = adapted(bases["llama, untied"], PeftConfig(train_head=True))
    save_adapter(model, tmp_path / "adapter", "some/student")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    named = {key: config[key] for key in ("base_model_name_or_path", "peft_type", "task_type", "r", "lora_alpha")}
    assert named == {
        "base_model_name_or_path": "some/student",
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 16,
        "lora_alpha": 32,
    }
    assert config["inference_mode"] is True
    assert config["target_modules"] == sorted(config["target_modules"])
    ends = {name.rpartition(".")[2] for name in config["target_modules"]}
    assert ends == {"down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"}
    assert bases["llama, untied"] not in json.dumps(config)
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    assert weights.stat().st_mode & 0o777 == 0o644
    tensors = load_file(weights)
    assert len(tensors) == 2 * 2 * 7 + 1
    assert {name for name in tensors if "lora" not in name} == {"base_model.model.lm_head.weight"}


def test_adapters_depend_on_the_seed_alone_and_draw_from_no_other_generator(bases):
    state = torch.get_rng_state()
    first = adapted(bases["llama, tied"], CONFIGS["lora"], seed=3)
    torch.rand(5)
    before = torch.get_rng_state()
    model = load_student(bases["llama, tied"], None, gradient_checkpointing=False)
    torch.set_rng_state(before)
    add_adapters(model, CONFIGS["lora"], 3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.set_rng_state(state)
    other = adapted(bases["llama, tied"], CONFIGS["lora"], seed=4)
    name = "model.layers.0.self_attn.q_proj.lora_A.default.weight"
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in first.state_dict().items())
    assert not torch.equal(first.state_dict()[name], other.state_dict()[name])


def test_training_without_dropout_is_the_same_every_time_and_dropout_drops(bases, reader):
    first, second = (train(adapted(bases["llama, tied"], CONFIGS["lora"]), reader) for _ in range(2))
    assert all(torch.equal(tensor, second.state_dict()[name]) for name, tensor in first.state_dict().items())
    dropping = adapted(bases["llama, tied"], PeftConfig(r=4, alpha=8, dropout=0.5))
    train(dropping, reader)
    with torch.no_grad():
        assert not torch.equal(dropping(INPUT_IDS).logits, dropping(INPUT_IDS).logits)
        dropping.eval()
        assert torch.equal(dropping(INPUT_IDS).logits, dropping(INPUT_IDS).logits)


@pytest.mark.parametrize("config", ["lora", "dora", "lora, embeddings"])
def test_gradient_checkpointing_gives_the_same_gradients(bases, reader, config):
    found = []
    for checkpointing in (False, True):
        model = adapted(bases["llama, tied"], CONFIGS[config], gradient_checkpointing=checkpointing)
        assert model.is_gradient_checkpointing == checkpointing
        train(model, reader, steps=1)
        backward(model, reader)
        found.append({name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None})
    assert found[0].keys() == found[1].keys() == {n for n, w in model.named_parameters() if w.requires_grad}
    for name, gradient in found[0].items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(found[1][name], gradient)


@pytest.mark.parametrize("name", ["lm_head", "embed_tokens", "self_attn", "c_attn", "proj", "0", ""])
def test_what_is_no_linear_layer_gets_no_adapter(bases, name):
    model = load_student(bases["llama, untied"], None, gradient_checkpointing=False)
    names = model.state_dict().keys()
    with pytest.raises(InputError) as refused:
        add_adapters(model, PeftConfig(target_modules=("q_proj", name)), 0)
    assert str(refused.value) == (
        f"peft.target_modules: {name or 'an empty name'} names no linear layer that an adapter can go on: give "
        f"all-linear or some of down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj. Embeddings and head are "
        f"trained whole, by peft.train_embeddings and peft.train_head."
    )
    assert model.state_dict().keys() == names
    assert all(weight.requires_grad for weight in model.parameters())


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning")
def test_fused_experts_get_no_adapter(method):
    model = build_tiny_model(tiny_tokenizer(), MixtralConfig, num_local_experts=2)
    with pytest.raises(InputError, match="MixtralForCausalLM"):
        add_adapters(model, PeftConfig(method=method), 0)


@pytest.mark.parametrize("student", STUDENTS)
@pytest.mark.parametrize("parts", [("embeddings",), ("head",), ("embeddings", "head")])
def test_what_is_frozen_stays_and_all_else_is_trained(bases, reader, student, parts):
    model = load_student(bases[student], None, gradient_checkpointing=False)
    freeze_parts(model, parts)
    before = bits(model)
    train(model, reader)
    still = {name for name, weight in model.named_parameters() if torch.equal(weight, before[name])}
    config = PeftConfig(train_embeddings="embeddings" in parts, train_head="head" in parts)
    assert still == trained_whole(student, config)


@pytest.mark.parametrize("freeze", [("head",), ("embeddings", "head")])
@pytest.mark.parametrize("trained", [{}, {"train_head": True}, {"train_embeddings": True}])
def test_freezing_beside_adapters_is_a_contradiction(freeze, trained):
    with pytest.raises(ValueError, match=r"freeze=.*head is for training without \[peft\].*leave freeze out"):
        require_freezable(freeze, PeftConfig(**trained))
    require_freezable(freeze, None)
    require_freezable((), PeftConfig(**trained))


@pytest.mark.parametrize(
    "wrong",
    [{"r": 0}, {"alpha": 0}, {"dropout": 1.0}, {"target_modules": "q_proj"}, {"target_modules": []}, {"rank": 8}],
)
def test_a_config_that_makes_no_adapters_is_refused(wrong):
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        PeftConfig.model_validate(wrong)


def test_without_the_library_its_installation_is_named(monkeypatch, bases):
    monkeypatch.setitem(sys.modules, "peft", None)  # what an import finds where the package is absent
    model = load_student(bases["llama, tied"], None, gradient_checkpointing=False)
    assert merged_state(model).keys() == model.state_dict().keys()
    with pytest.raises(InputError, match=r"peft is not installed: `pip install 'logit-cache\[peft\]'`"):
        add_adapters(model, PeftConfig(), 0)
