"""Final norm and LM head from the checkpoint alone, and the checks of an engine's hidden states made of them."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BloomConfig,
    CohereConfig,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    PhiConfig,
    Qwen2Config,
)

from cache_schema.plan import Engine
from tests.tiny import CHATML, tiny_tokenizer
from tests.tiny_cache import CPU, random_sequences
from tests.tiny_models import save_tiny_llama, save_tiny_model
from workers.errors import InputError
from workers.teacher.checkpoint import identity_of, load_model
from workers.teacher.head_files import read_head_files
from workers.teacher.lm_head import head_of
from workers.teacher.self_check import (
    reason_against_reference,
    require_final_norm,
    require_not_unit_length,
    require_reference,
    require_same_logits,
)
from workers.teacher.transformers_teacher import TransformersTeacher

VOCAB = 384
SEQUENCES = random_sequences(5)
ENGINE = Engine(name="transformers", device="cpu", num_threads=1, tokens_per_batch=64, versions={})


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer(chat_template=CHATML)


def states_of(folder, dtype="float32"):
    """Hidden states of every row but the last, as the reference engine gives them. [N, D]"""
    teacher = TransformersTeacher(str(folder), identity_of(str(folder), dtype), ENGINE, vocab_size=VOCAB, device=CPU)
    return torch.cat(teacher.hidden_states(SEQUENCES, "all"))


def edit(folder, **keys):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | keys))


@pytest.mark.parametrize(
    ("family", "config"),
    [
        (Qwen2Config, {"tie_word_embeddings": False}),  # its own head, and rows beyond the tokenizer's
        (Gemma3TextConfig, {"head_dim": 16, "final_logit_softcapping": 30.0}),  # tied; norm of 1 + weight; soft cap
        (GPT2Config, {}),  # LayerNorm, other names
        (BloomConfig, {}),  # two norms in the body
        (GPTNeoXConfig, {}),
        (PhiConfig, {}),  # a head with a bias
        (CohereConfig, {"logit_scale": 0.25}),
        (GraniteConfig, {"logits_scaling": 8.0}),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_head_of_the_files_is_the_head_of_the_loaded_model(tokenizer, tmp_path, family, config, dtype):
    folder = save_tiny_model(tmp_path / "model", tokenizer, family, vocab_size=VOCAB + 7, **config)
    files = read_head_files(str(folder), getattr(torch, dtype), VOCAB)
    expected = head_of(load_model(str(folder), getattr(torch, dtype)), VOCAB)
    assert (files.lm_head.scale, files.lm_head.softcap) == (expected.scale, expected.softcap)
    assert files.lm_head.weight_VD.dtype == getattr(torch, dtype)
    assert torch.equal(files.lm_head.weight_VD, expected.weight_VD)
    assert (files.lm_head.bias_V is None) == (expected.bias_V is None)
    assert files.lm_head.bias_V is None or torch.equal(files.lm_head.bias_V, expected.bias_V)
    # The reference engine's own states pass, and no others do.
    hidden_ND = states_of(folder, dtype)
    assert files.final_norm is not None
    require_final_norm(hidden_ND, files.final_norm, "it")
    for wrong_ND in (1.1 * hidden_ND, files.final_norm.normalised(hidden_ND) * 2):
        with pytest.raises(InputError, match=r"not its final norm's output.*--engine transformers"):
            require_final_norm(wrong_ND, files.final_norm, "it")


def test_states_of_length_1_are_refused(tokenizer, tmp_path):
    folder = save_tiny_llama(tmp_path / "model", tokenizer)
    files = read_head_files(str(folder), torch.float32, VOCAB)
    hidden_ND = states_of(folder)
    require_not_unit_length(hidden_ND, "vllm")
    normalised_ND = torch.nn.functional.normalize(hidden_ND, dim=1)
    with pytest.raises(InputError, match=r"length 1.*its pooler normalises them"):
        require_not_unit_length(normalised_ND, "vllm")
    assert files.final_norm is not None
    with pytest.raises(InputError, match="not its final norm's output"):
        require_final_norm(normalised_ND, files.final_norm, "vllm")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_states_of_another_row_or_another_model_are_not_the_reference_s(tokenizer, tmp_path, dtype):
    folder = save_tiny_llama(tmp_path / "model", tokenizer)
    other = save_tiny_llama(tmp_path / "other", tokenizer, seed=1)
    identity = identity_of(str(folder), dtype)
    head = read_head_files(str(folder), getattr(torch, dtype), VOCAB).lm_head
    sequence = SEQUENCES[1]

    def check(hidden_TD):
        require_reference(str(folder), identity, ENGINE, sequence, hidden_TD, head, "vllm 0.32.0")

    def states(folder):
        teacher = TransformersTeacher(
            str(folder), identity_of(str(folder), dtype), ENGINE, vocab_size=VOCAB, device=CPU
        )
        return teacher.hidden_states([sequence], "all")[0]

    check(states(folder))
    for wrong in (states(folder).roll(1, 0), states(other)):
        with pytest.raises(InputError, match=r"vllm 0.32.0 gives other logits .* differ by [0-9.]+, rounding explains"):
            check(wrong)


@pytest.mark.parametrize(
    ("dtype", "largest", "allowed"), [("float32", 40.0, 1e-3), ("float32", 80.0, 2e-3), ("bfloat16", 40.0, 5.0)]
)
def test_one_logit_may_differ_by_rounding_and_no_more(dtype, largest, allowed):
    expected_NV = torch.linspace(-1, largest, 12, dtype=torch.float64).reshape(3, 4)
    for share in (0.99, 1.01):
        given_NV = expected_NV.clone()
        given_NV[1, 2] -= share * allowed
        if share < 1:
            require_same_logits(given_NV, expected_NV, dtype, "vllm")
        else:
            with pytest.raises(InputError, match="gives other logits than the transformers engine"):
                require_same_logits(given_NV, expected_NV, dtype, "vllm")
    with pytest.raises(InputError, match="differ by nan"):
        require_same_logits(expected_NV * torch.nan, expected_NV, dtype, "vllm")


def test_a_head_is_read_where_the_files_leave_out_the_model_s_prefix(tokenizer, tmp_path):
    folder = save_tiny_model(tmp_path / "model", tokenizer, GPT2Config)
    expected = head_of(load_model(str(folder), torch.float32), VOCAB)
    file = folder / "model.safetensors"
    save_file(
        {name.removeprefix("transformer."): part for name, part in load_file(file).items()}, file, {"format": "pt"}
    )
    assert "wte.weight" in load_file(file)
    assert torch.equal(read_head_files(str(folder), torch.float32, VOCAB).lm_head.weight_VD, expected.weight_VD)


def test_a_head_of_its_own_is_not_tied_whatever_the_config_says(tokenizer, tmp_path):
    folder = save_tiny_llama(tmp_path / "model", tokenizer, tie_word_embeddings=False)
    edit(folder, tie_word_embeddings=True)
    weight_VD = read_head_files(str(folder), torch.float32, VOCAB).lm_head.weight_VD
    assert torch.equal(weight_VD, load_model(str(folder), torch.float32).get_output_embeddings().weight)
    assert torch.equal(weight_VD, load_file(folder / "model.safetensors")["lm_head.weight"])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda parts: {"lm_head.qweight": parts.pop("lm_head.weight").int()}, "LM head is quantised (lm_head.qweight"),
        (lambda parts: {"lm_head.weight": parts.pop("lm_head.weight").to(torch.int8)}, "(lm_head.weight: I8)"),
        (lambda parts: {"other": parts.pop("lm_head.weight")}, "holds no lm_head.weight, the LM head"),
        (
            lambda parts: {"lm_head.weight": parts["lm_head.weight"][:300]},
            "has shape [300, 32], config.json asks for [384",
        ),
        (lambda parts: {"lm_head.weight": parts["lm_head.weight"] * torch.nan}, "lm_head.weight is not finite"),
    ],
)
def test_a_head_that_cannot_be_used_is_named(tokenizer, tmp_path, damage, words):
    folder = save_tiny_llama(tmp_path / "model", tokenizer, tie_word_embeddings=False)
    file = folder / "model.safetensors"
    parts = load_file(file)
    parts |= damage(parts)
    save_file(parts, file, {"format": "pt"})
    with pytest.raises(InputError) as caught:
        read_head_files(str(folder), torch.float32, VOCAB)
    assert words in str(caught.value)
    assert str(folder) in str(caught.value)


def test_a_model_of_fewer_ids_than_the_tokenizer_is_refused(tokenizer, tmp_path):
    folder = save_tiny_llama(tmp_path / "model", tokenizer)
    with pytest.raises(InputError, match="384 rows, the tokenizer 385 ids"):
        read_head_files(str(folder), torch.float32, VOCAB + 1)
    shutil.copytree(folder, tmp_path / "empty")
    edit(tmp_path / "empty", model_type="unheard-of")
    with pytest.raises(InputError, match=r"config.json is no config of a causal language model"):
        read_head_files(str(tmp_path / "empty"), torch.float32, VOCAB)


def test_what_cannot_be_compared_with_the_reference_says_why(tokenizer, tmp_path):
    identity = identity_of(str(save_tiny_llama(tmp_path / "model", tokenizer)), None)
    assert reason_against_reference(identity, ENGINE, {}) is None
    assert (
        reason_against_reference(identity, ENGINE, {"quantization_config": {"bits": 4}}) == "its weights are quantised"
    )
    while_loading = ENGINE.model_copy(update={"quantization": "fp8"})
    assert reason_against_reference(identity, while_loading, {}) == "its weights are quantised"
    large = identity.model_copy(update={"num_parameters": 10**13})
    assert "more than an eighth of the" in str(reason_against_reference(large, ENGINE, {}))
