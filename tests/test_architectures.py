"""For every architecture listed, what the engine and the LM head make of it is what the model itself says."""

import dataclasses
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BartForConditionalGeneration,
    BertGenerationConfig,
    BloomConfig,
    Cohere2Config,
    CohereConfig,
    FalconConfig,
    FalconH1Config,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    GraniteConfig,
    Llama4TextConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    ModernBertDecoderConfig,
    Olmo2Config,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    RecurrentGemmaConfig,
    SmolLM3Config,
    StableLmConfig,
    T5Config,
    T5ForConditionalGeneration,
    XLMConfig,
)

from cache_schema import CacheReader, verify
from cache_schema.sequence import TokenSequence
from tests.caches import make_plan
from tests.conftest import dump
from tests.tiny import tiny_tokenizer
from tests.tiny_cache import CPU, dump_tiny_cache, random_sequences
from tests.tiny_models import build_tiny_model, save_tiny_model
from workers.errors import InputError
from workers.teacher import lm_head
from workers.teacher.checkpoint import body_of, identity_of, load_model, require_plain_head
from workers.teacher.lm_head import load_head
from workers.teacher.scoring import score
from workers.teacher.transformers_teacher import TransformersTeacher

WINDOW = 8
LENGTHS = (23, 48, 9, 2, 17)
TOP_K = 16
PAGE = Path(__file__).parent.parent / "docs" / "reference" / "architectures.md"

MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
MAMBA = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8}
SLIDING = {"sliding_window": WINDOW}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 8,
    "long_factor": [4.0] * 8,
    "original_max_position_embeddings": 20,
}

ARCHITECTURES = {
    "Llama": (LlamaConfig, {}),
    "Llama 4": (
        Llama4TextConfig,
        {"head_dim": 16, "num_local_experts": 4, "intermediate_size_mlp": 64, "attention_chunk_size": WINDOW},
    ),
    "Mistral": (MistralConfig, SLIDING),
    "Mixtral": (MixtralConfig, {**SLIDING, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "Qwen2": (Qwen2Config, {**SLIDING, "use_sliding_window": True, "max_window_layers": 2}),
    "Qwen2-MoE": (Qwen2MoeConfig, {**MOE, "num_experts": 4, "shared_expert_intermediate_size": 32}),
    "Qwen3": (Qwen3Config, {"head_dim": 16, "tie_word_embeddings": True}),
    "Qwen3-MoE": (Qwen3MoeConfig, {**MOE, "num_experts": 4, "head_dim": 16, "norm_topk_prob": True}),
    "GPT-OSS": (GptOssConfig, {**SLIDING, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16}),
    "Gemma 2": (Gemma2Config, {**SLIDING, "head_dim": 16, "final_logit_softcapping": 5.0}),
    "Gemma 3 text": (Gemma3TextConfig, {**SLIDING, "head_dim": 16, "sliding_window_pattern": 2}),
    "RecurrentGemma": (
        RecurrentGemmaConfig,
        {"logits_soft_cap": 5.0, "attention_window_size": WINDOW, "w_init_variance_scale": 1.0},
    ),
    "GPT-2": (GPT2Config, {}),
    "GPT-NeoX": (GPTNeoXConfig, {}),
    "BLOOM": (BloomConfig, {}),
    "Falcon": (FalconConfig, {"alibi": False, "new_decoder_architecture": True}),
    "Falcon-H1": (FalconH1Config, {**MAMBA, "head_dim": 16, "num_hidden_layers": 2, "lm_head_multiplier": 0.5}),
    "OPT": (OPTConfig, {"ffn_dim": 64, "word_embed_proj_dim": 32, "init_std": 0.4}),
    "OPT, projected": (
        OPTConfig,
        {"ffn_dim": 64, "word_embed_proj_dim": 16, "init_std": 0.4, "do_layer_norm_before": False},
    ),
    "Phi": (PhiConfig, {}),
    "Phi-3": (Phi3Config, {**SLIDING}),
    "Phi-3, longrope": (Phi3Config, {"rope_parameters": LONGROPE, "original_max_position_embeddings": 20}),
    "Cohere": (CohereConfig, {"logit_scale": 0.5}),
    "Cohere2": (Cohere2Config, {**SLIDING, "logit_scale": 0.5, "sliding_window_pattern": 2, "head_dim": 16}),
    "Granite": (GraniteConfig, {"logits_scaling": 2.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5}),
    "StableLM": (StableLmConfig, {"qk_layernorm": True, "use_qkv_bias": True}),
    "OLMo 2": (Olmo2Config, {}),
    "SmolLM3": (SmolLM3Config, {"no_rope_layers": [1, 1, 1, 0]}),
}
"""By the name they have on the page: config class, and what its tiny model sets besides."""


def load_engine(folder, size=384):
    identity = identity_of(str(folder), "float32")
    return TransformersTeacher(str(folder), identity, make_plan().engine, vocab_size=size, device=CPU)


def ragged(size=384):
    generator = np.random.default_rng(0)
    ids = [generator.integers(0, size, length).astype(np.int32) for length in LENGTHS]
    return [TokenSequence(row, np.arange(len(row)) > 0, "random") for row in ids]


def own_logits(model, sequence):
    """The model's own, of the sequence alone, at its target rows. float32 [T - 1, V]"""
    with torch.no_grad():
        return model(torch.tensor(sequence.input_ids)[None].long(), use_cache=False).logits[0, :-1]


def rounding(logits):
    """What float32 sums in another order may change: 1e-5 and less was measured of the largest logit."""
    return 1e-4 * float(logits.abs().max())


def teach(folder, family, config, size=384):
    """A tiny model saved and loaded again: by the engine, which reads one padded batch, and by transformers."""
    save_tiny_model(folder, tiny_tokenizer(), family, **{"vocab_size": size, **config})
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    teacher, batch = load_engine(folder, size), ragged(size)
    return SimpleNamespace(
        folder=folder,
        model=model,
        head=teacher.lm_head,
        batch=batch,
        states=teacher.hidden_states(batch, "all"),
        expected=[own_logits(model, sequence) for sequence in batch],
    )


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """Name of an architecture to what its tiny model says; each made once."""
    made = {}

    def of(name):
        if name not in made:
            made[name] = teach(tmp_path_factory.mktemp("models") / "tiny", *ARCHITECTURES[name])
        return made[name]

    return of


# ---- the same numbers ----


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_padded_batch_s_hidden_states_times_the_head_are_each_sequence_s_own_logits(taught, name):
    tiny = taught(name)
    for hidden, expected in zip(tiny.states, tiny.expected, strict=True):
        logits = tiny.head.logits(hidden)
        assert float((expected.amax(1) - expected.amin(1)).min()) > 4  # nats: rounding cannot hide behind flat rows
        torch.testing.assert_close(logits, expected, rtol=0, atol=rounding(expected))


def assert_scored(head, hidden, expected):
    labels = torch.arange(len(expected)) % expected.shape[1]
    top = score(head, hidden, labels, TOP_K, (1.0,))
    values, ids = expected.topk(TOP_K + 1)
    tolerance = rounding(expected)
    torch.testing.assert_close(top.logits_NK, values[:, :-1], rtol=0, atol=tolerance)
    # Two logits closer than rounding may change places.
    apart = values[:, :-1] - values[:, 1:] > 2 * tolerance
    settled = apart & torch.cat([torch.ones_like(apart[:, :1]), apart[:, :-1]], 1)
    assert float(settled.float().mean()) > 0.9
    assert torch.equal(top.token_ids_NK[settled], ids[:, :-1][settled])
    whole = torch.logaddexp(top.logits_NK.logsumexp(1), top.tail_logsumexp_NR[:, 0])
    torch.testing.assert_close(whole, expected.logsumexp(1), rtol=0, atol=tolerance)
    torch.testing.assert_close(top.label_logit_N, expected.gather(1, labels[:, None])[:, 0], rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_is_scored_is_the_top_of_the_model_s_own_logits(taught, name):
    tiny = taught(name)
    assert_scored(tiny.head, torch.cat(tiny.states), torch.cat(tiny.expected))


def test_a_vocabulary_of_262144_tokens(tmp_path):
    config = {"head_dim": 8, "hidden_size": 16, "num_hidden_layers": 2, "final_logit_softcapping": 8.0}
    tiny = teach(tmp_path, Gemma3TextConfig, config, size=262_144)
    hidden, expected = tiny.states[2], tiny.expected[2]
    assert expected.shape == (LENGTHS[2] - 1, 262_144)
    torch.testing.assert_close(tiny.head.logits(hidden), expected, rtol=0, atol=rounding(expected))
    top = score(tiny.head, hidden, torch.zeros(len(hidden), dtype=torch.long), TOP_K, (1.0,))
    torch.testing.assert_close(top.logits_NK, expected.topk(TOP_K).values, rtol=0, atol=rounding(expected))


def test_a_language_model_inside_a_multimodal_one(tmp_path):
    text = {
        "vocab_size": 384, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16,
        "num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.4, "sliding_window": WINDOW,
    }  # fmt: skip
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = Gemma3Config(text_config=text, vision_config={**vision, "image_size": 28, "patch_size": 14})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    teacher, model = load_engine(tmp_path), load_model(str(tmp_path), torch.float32)
    for sequence, hidden in zip(ragged(), teacher.hidden_states(ragged(), "all"), strict=True):
        expected = own_logits(model, sequence)
        torch.testing.assert_close(teacher.lm_head.logits(hidden), expected, rtol=0, atol=rounding(expected))


# ---- what the architectures are here for ----


@pytest.mark.parametrize(
    ("name", "part", "value"),
    [
        ("Gemma 2", "softcap", 5.0),
        ("RecurrentGemma", "softcap", 5.0),
        ("Cohere", "scale", 0.5),
        ("Cohere2", "scale", 0.5),
        ("Granite", "scale", 0.5),
        ("Falcon-H1", "scale", 0.5),
    ],
)
def test_cap_and_scale_are_the_config_s_and_the_logits_are_others_without(taught, name, part, value):
    tiny = taught(name)
    assert getattr(tiny.head, part) == value
    without = dataclasses.replace(tiny.head, **{part: {"softcap": None, "scale": 1.0}[part]})
    expected = tiny.expected[0]
    assert float((without.logits(tiny.states[0]) - expected).abs().max()) > 100 * rounding(expected)


def test_a_bias_is_taken_where_there_is_one(taught):
    assert {name for name in ARCHITECTURES if taught(name).head.bias_V is not None} == {"Phi"}
    tiny = taught("Phi")
    without = dataclasses.replace(tiny.head, bias_V=None).logits(tiny.states[0])
    assert float((without - tiny.expected[0]).abs().max()) > 100 * rounding(tiny.expected[0])


def test_a_projection_after_the_final_norm_belongs_to_the_body(taught):
    assert {name: taught(name).states[0].shape[1] for name in ("OPT", "OPT, projected")} == {
        "OPT": 32,
        "OPT, projected": 16,
    }


@pytest.mark.parametrize("name", [name for name, (_, config) in ARCHITECTURES.items() if "sliding_window" in config])
def test_the_sequences_are_longer_than_the_window(taught, name):
    """As far as the window reaches, a wider one makes the same model; beyond, another."""
    tiny = taught(name)
    family, config = ARCHITECTURES[name]
    wide = build_tiny_model(tiny_tokenizer(), family, **{**config, "sliding_window": 64})
    wide.load_state_dict(tiny.model.state_dict())
    differs = (own_logits(wide, tiny.batch[1]) - tiny.expected[1]).abs().amax(1)
    assert float(differs[:WINDOW].max()) <= rounding(tiny.expected[1])
    assert float(differs[WINDOW:].min()) > 10 * rounding(tiny.expected[1])


def test_longrope_serves_short_and_long_sequences_of_a_batch_each_by_its_own_frequencies(taught):
    tiny = taught("Phi-3, longrope")
    assert [length > 20 for length in LENGTHS] == [True, True, False, False, False]
    padded = torch.zeros(2, LENGTHS[1], dtype=torch.long)
    for row, sequence in enumerate((tiny.batch[1], tiny.batch[2])):
        padded[row, : sequence.num_tokens] = torch.tensor(sequence.input_ids)
    with torch.no_grad():
        together = tiny.model(padded, use_cache=False).logits[1, : LENGTHS[2] - 1]
    assert float((together - tiny.expected[2]).abs().max()) > 1  # what one forward of both would have given


@pytest.mark.parametrize("name", ["Mixtral", "Qwen2-MoE", "Qwen3-MoE", "GPT-OSS"])
def test_the_experts_differ_by_token(taught, name):
    """A mixture that sent every token to the same experts could not show whether padding changes the routing."""
    tiny, chosen = taught(name), []
    routers = [module for path, module in tiny.model.named_modules() if re.search(r"mlp\.(gate|router)$", path)]
    hooks = [router.register_forward_hook(lambda *call: chosen.append(call[2])) for router in routers]
    own_logits(tiny.model, tiny.batch[1])
    for hook in hooks:
        hook.remove()
    assert len(chosen) == 4
    for answer in chosen:
        assert len({tuple(sorted(row)) for row in answer[-1].tolist()}) > 1


# ---- what cannot be right is refused ----

REFUSED = {
    "more than a linear map on top": (ModernBertDecoderConfig, {"bos_token_id": 1}, "its logits are not its LM head"),
    "an encoder as a decoder": (
        BertGenerationConfig,
        {"is_decoder": False},
        "hidden states change with tokens that come later",
    ),
    "attention both ways": (
        Gemma3TextConfig,
        {"head_dim": 16, "use_bidirectional_attention": True},
        "hidden states change with tokens that come later.*give a causal language model",
    ),
    "attention both ways, all but uniform": (
        BertGenerationConfig,
        {"is_decoder": False, "initializer_range": 0.02},
        "hidden states change with tokens that come later",
    ),
    "masked language model": (XLMConfig, {}, "hidden states change with tokens that come later"),
}


@pytest.mark.parametrize(("family", "config", "says"), REFUSED.values(), ids=REFUSED.keys())
def test_a_model_whose_logits_would_be_wrong_is_refused(tmp_path, family, config, says):
    folder = save_tiny_model(tmp_path, tiny_tokenizer(), family, **config)
    with pytest.raises(InputError, match=says):
        load_engine(folder)


SMALL = {"vocab_size": 384, "d_model": 32}


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda: T5ForConditionalGeneration(T5Config(**SMALL, num_layers=1, d_ff=32)), "does not load as a causal"),
        (
            lambda: BartForConditionalGeneration(BartConfig(**SMALL, encoder_layers=1, decoder_layers=1)),
            "give the whole checkpoint of a causal language model",
        ),
    ],
    ids=["T5", "BART"],
)
def test_an_encoder_decoder_is_refused(tmp_path, build, says):
    build().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(InputError, match=says):
        load_engine(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "keys"), [("Gemma 2", "_SOFTCAPS"), ("Cohere", "_MULTIPLIERS"), ("Granite", "_DIVISORS")]
)
def test_a_cap_or_scale_under_a_name_that_is_not_known_is_refused(monkeypatch, name, keys, dtype):
    family, config = ARCHITECTURES[name]
    model = build_tiny_model(tiny_tokenizer(), family, dtype=dtype, **config).train()
    require_plain_head(model, 384)
    monkeypatch.setattr(lm_head, keys, ())
    with pytest.raises(InputError, match="its logits are not its LM head on its last hidden state"):
        require_plain_head(model, 384)
    assert model.training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_model_in_train_mode_is_probed_in_eval_mode_and_left_as_it_was(name, dtype):
    family, config = ARCHITECTURES[name]
    model = build_tiny_model(tiny_tokenizer(), family, dtype=dtype, **{**config, "vocab_size": 400}).train()
    body_of(model).eval()
    modes = [module.training for module in model.modules()]
    require_plain_head(model, 384)
    assert [module.training for module in model.modules()] == modes
    assert len(set(modes)) == 2


# ---- into a cache and back ----


@pytest.mark.parametrize("name", ["Gemma 2", "Cohere", "Phi", "Mixtral", "Falcon-H1"])
def test_a_cache_gives_the_model_s_own_logits_back(taught, tmp_path, name):
    tiny = taught(name)
    reader = dump_tiny_cache(tmp_path / "cache", tiny.folder, random_sequences())
    head = load_head(reader.lm_head_path, CPU)
    assert torch.equal(head.weight_VD, tiny.head.weight_VD)
    assert (head.scale, head.softcap) == (tiny.head.scale, tiny.head.softcap)
    assert (head.bias_V is None) == (tiny.head.bias_V is None)
    assert head.bias_V is None or torch.equal(head.bias_V, tiny.head.bias_V)
    for index, scored in enumerate(reader):
        rows = torch.from_numpy(scored.sequence.target_rows("response"))
        expected = own_logits(tiny.model, scored.sequence)[rows]
        logits = head.logits(torch.from_numpy(np.array(reader.hidden_states(index))))
        torch.testing.assert_close(logits, expected, rtol=0, atol=rounding(expected))
        stored = torch.from_numpy(np.array(scored.rows.logits))
        near = 1 / 128 + rounding(expected)
        torch.testing.assert_close(stored, expected.topk(8).values, rtol=0, atol=near)
        ids = torch.from_numpy(np.array(scored.rows.token_ids)).long()
        torch.testing.assert_close(stored, expected.gather(1, ids), rtol=0, atol=near)
    assert verify(tmp_path / "cache").ok


def test_a_dump_stores_hidden_states_as_wide_as_the_head_reads_them(taught, data_file, tmp_path):
    reader = CacheReader(dump(taught("OPT, projected").folder, data_file, tmp_path / "cache", "--limit", "4"))
    assert reader.plan.hidden_states.size == reader.hidden_states(0).shape[1] == 16
    assert verify(tmp_path / "cache").ok


# ---- the page ----


def test_the_page_lists_what_is_checked_here():
    rows = re.findall(r"^\| ([^|]+?) \|", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert [row for row in rows if row not in {"architecture", "---"}] == list(ARCHITECTURES)
