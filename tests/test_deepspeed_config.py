"""What DeepSpeed is told, and what a user's DeepSpeed file may say."""

import json

import pytest

from pipeline.config import build_config
from workers.distill.config import DistillConfig, EngineConfig
from workers.distill.engines.deepspeed_config import deepspeed_config
from workers.errors import InputError

RUN = {
    "cache": "cache", "student": "student", "sequences_per_step": 16, "micro_batch_sequences": 2,
    "optimizer": {"lr": 3e-4, "betas": (0.9, 0.95), "weight_decay": 0.01, "max_grad_norm": 0.5, "eps": 1e-7},
}  # fmt: skip


def configured(file=None, *, ranks=2, hidden_size=64, stage=2, offload=None, offload_parameters=None, **settings):
    engine = {
        "name": "deepspeed", "zero_stage": stage, "offload_optimizer": offload,
        "offload_parameters": offload_parameters, "deepspeed_config": None if file is None else str(file),
    }  # fmt: skip
    config = DistillConfig(**RUN | settings | {"engine": engine})
    return deepspeed_config(config, num_ranks=ranks, hidden_size=hidden_size)


@pytest.fixture
def write(tmp_path):
    def written(content):
        path = tmp_path / "zero.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return path

    return written


def test_without_a_file_it_is_exactly_this():
    assert configured(stage=3) == {
        "train_batch_size": 4,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.5,
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_optimization": {"stage": 3},
        "zero_force_ds_cpu_optimizer": False,
    }


@pytest.mark.parametrize(
    ("stage", "dtype", "native"),
    [
        (0, "bfloat16", False),
        (1, "bfloat16", True),
        (3, "bfloat16", True),
        (0, "float32", False),
        (2, "float32", False),
    ],
)
def test_weights_are_bfloat16_where_gradients_still_add_up_in_float32(stage, dtype, native):
    config = configured(stage=stage, dtype=dtype)
    assert config["bf16"]["enabled"] is native
    assert config["data_types"]["grad_accum_dtype"] == "fp32"


def test_at_stage_0_the_engine_clips_itself():
    assert configured(stage=0)["gradient_clipping"] == 0.0


def test_offload_goes_to_memory_or_to_a_folder():
    zero = configured(stage=3, offload="/nvme/run", offload_parameters="cpu")["zero_optimization"]
    assert zero["offload_optimizer"] == {"device": "nvme", "nvme_path": "/nvme/run"}
    assert zero["offload_param"] == {"device": "cpu"}


EQUAL = {
    "train_batch_size": 16,
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 4,
    "gradient_clipping": 0.5,
    "optimizer": {"type": "adamw", "params": {"lr": 3e-4, "betas": [0.9, 0.95], "eps": 1e-7, "weight_decay": 0.01}},
    "scheduler": {"type": "WarmupCosineLR", "params": {"warmup_num_steps": "auto", "total_num_steps": "auto"}},
    "bf16": {"enabled": True},
    "fp16": {"enabled": False},
    "zero_optimization": {"stage": 2},
}
ALL_AUTO = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}},
    "scheduler": "auto",
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": "auto"},
    "zero_optimization": {"stage": "auto"},
}


@pytest.mark.parametrize("content", [{}, EQUAL, ALL_AUTO, {"bf16": "auto", "zero_optimization": "auto"}])
def test_a_file_that_says_the_same_changes_nothing(write, content):
    assert configured(write(content)) == configured()


@pytest.mark.parametrize(
    ("content", "key", "theirs", "ours", "setting"),
    [
        ({"train_batch_size": 32}, "train_batch_size", "32", "16", "sequences_per_step"),
        ({"train_micro_batch_size_per_gpu": 8}, "train_micro_batch_size_per_gpu", "8", "2", "micro_batch_sequences"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps", "2", "4", "sequences_per_step"),
        ({"gradient_clipping": 1.0}, "gradient_clipping", "1.0", "0.5", "optimizer.max_grad_norm"),
        ({"optimizer": {"params": {"lr": 1e-5}}}, "optimizer.params.lr", "1e-05", "0.0003", "optimizer.lr"),
        (
            {"optimizer": {"params": {"betas": [0.9, 0.999]}}},
            "optimizer.params.betas", "[0.9, 0.999]", "[0.9, 0.95]", "optimizer.betas",
        ),
        ({"optimizer": {"params": {"eps": 1e-8}}}, "optimizer.params.eps", "1e-08", "1e-07", "optimizer.eps"),
        (
            {"optimizer": {"params": {"weight_decay": 0}}},
            "optimizer.params.weight_decay", "0", "0.01", "optimizer.weight_decay",
        ),
        ({"optimizer": {"type": "Lion"}}, "optimizer.type", '"Lion"', '"AdamW"', "it to AdamW"),
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler.type", '"WarmupLR"', '"cosine"', "optimizer.schedule"),
        ({"bf16": {"enabled": False}}, "bf16.enabled", "false", "true", "dtype"),
        ({"zero_optimization": {"stage": 3}}, "zero_optimization.stage", "3", "2", "engine.zero_stage"),
    ],
)  # fmt: skip
def test_a_file_that_says_otherwise_is_refused_with_what_to_set(write, content, key, theirs, ours, setting):
    with pytest.raises(InputError) as error:
        configured(write(content))
    assert f"zero.json: {key} = {theirs}, but this run has {ours}: set {setting}" in str(error.value)


def test_a_file_offloads_where_the_run_does(write):
    file = write({"zero_optimization": {"offload_optimizer": {"device": "nvme", "nvme_path": "/a"}}})
    with pytest.raises(InputError, match=r'device = "nvme", but this run has "cpu": set engine.offload_optimizer'):
        configured(file, stage=3, offload="cpu")
    with pytest.raises(InputError, match=r'nvme_path = "/a", but this run has "/b": set engine.offload_optimizer'):
        configured(file, stage=3, offload="/b")
    assert configured(file, stage=3, offload="/a") == configured(file, stage=3)


@pytest.mark.parametrize(
    ("stage", "offload", "offload_parameters", "message"),
    [
        (0, "cpu", None, "engine.offload_optimizer: cpu needs ZeRO stage 1 or higher"),
        (2, "/nvme", None, "engine.offload_optimizer: nvme needs ZeRO stage 3: set engine.zero_stage, now 2"),
        (2, None, "cpu", "engine.offload_parameters: cpu needs ZeRO stage 3"),
    ],
)
def test_an_offload_that_the_stage_does_not_have_is_refused(stage, offload, offload_parameters, message):
    with pytest.raises(InputError, match=message):
        configured(stage=stage, offload=offload, offload_parameters=offload_parameters)


def test_what_is_not_the_run_s_passes_through(write):
    passed = {
        "comms_logger": {"enabled": True},
        "flops_profiler": {"enabled": True, "profile_step": 3},
        "communication_data_type": "bf16",
        "zero_optimization": {"overlap_comm": False, "offload_optimizer": {"device": "cpu", "pin_memory": False}},
    }
    config = configured(write(passed))
    assert {key: config[key] for key in passed if key != "zero_optimization"} == {
        key: value for key, value in passed.items() if key != "zero_optimization"
    }
    assert config["zero_optimization"] == {**passed["zero_optimization"], "stage": 2}


def test_sizes_left_to_auto_follow_from_the_hidden_size(write):
    zero = {
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "overlap_comm": "auto",
        "sub_group_size": 1e9,
    }
    assert configured(write({"zero_optimization": zero}), stage=3, hidden_size=64)["zero_optimization"] == {
        "stage": 3,
        "reduce_bucket_size": 4096,
        "stage3_prefetch_bucket_size": 3686,
        "stage3_param_persistence_threshold": 640,
        "sub_group_size": 1e9,
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"zero\.json is not JSON: "),
        ("[]", r"zero\.json holds no JSON object"),
        ({"zero_optimization": 2}, r"zero_optimization = 2: must be an object"),
        ({"optimizer": "AdamW"}, r'optimizer = "AdamW": must be an object'),
        ({"scheduler": {"params": []}}, r"scheduler\.params = \[\]: must be an object"),
        ({"zero_optimization": {"stage": 4}}, r"stage = 4: ZeRO has the stages 0, 1, 2 and 3"),
        ({"zero_optimization": {"stage": "two"}}, r'stage = "two": ZeRO has the stages 0, 1, 2 and 3'),
        ({"fp16": {"enabled": True}}, r"fp16\.enabled = true: float16 .*set dtype = bfloat16"),
        ({"bf16": {"check_grad_overflow": False}}, r"check_grad_overflow = false: must be true or left out"),
        ({"zero_optimization": {"compute_grad_norm": False}}, r"compute_grad_norm = false: must be true"),
        ({"amp": {"enabled": True}}, r"amp\.enabled = true is not supported: set dtype"),
        ({"zero_optimization": {"zenflow": {"topk_ratio": 0.1}}}, r"zenflow = .*is not supported"),
        (
            {"scheduler": {"type": "WarmupCosineLR", "params": {"warmup_num_steps": 9}}},
            r"set .*optimizer\.warmup_steps",
        ),
    ],
)
def test_a_file_that_cannot_be_used_is_refused(write, content, message):
    with pytest.raises(InputError, match=message):
        configured(write(content))


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"none\.json cannot be read: No such file"):
        configured(tmp_path / "none.json")


def test_a_run_that_names_no_stage_takes_the_file_s(tmp_path):
    file = tmp_path / "zero.json"
    file.write_text('{"zero_optimization": {"stage": 3}}', encoding="utf-8")
    assert configured(file, stage=None)["zero_optimization"]["stage"] == 3
    assert configured(stage=None)["zero_optimization"]["stage"] == 2


@pytest.mark.parametrize("key", ["zero_stage", "offload_optimizer", "offload_parameters", "deepspeed_config"])
def test_what_is_deepspeed_s_is_refused_for_another_engine(key):
    with pytest.raises(ValueError, match=f"engine.{key} is for DeepSpeed"):
        EngineConfig.model_validate({"name": "fsdp2", key: 1 if key == "zero_stage" else "cpu"})


@pytest.mark.parametrize("section", ["scheduler", "zero_optimization", "bf16", "optimizer"])
def test_null_is_as_if_it_were_left_out(write, section):
    assert configured(write({section: None})) == configured()
    assert configured(write({"zero_optimization": {"offload_optimizer": None}})) == configured()


@pytest.mark.parametrize("key", ["zero_optimisation", "tensor_parallel", "elasticity", "curriculum_learning"])
def test_a_key_that_the_run_does_not_know_is_refused(write, key):
    with pytest.raises(InputError, match=f"zero.json: {key} is not supported"):
        configured(write({key: {"enabled": True}}))


@pytest.mark.parametrize(("flag", "stage"), [("deepspeed", 3), (None, 3), ("fsdp2", None)])
def test_a_flag_for_another_engine_leaves_the_file_s_keys_behind(tmp_path, flag, stage):
    file = tmp_path / "config.toml"
    file.write_text('cache = "c"\nstudent = "s"\n[engine]\nname = "deepspeed"\nzero_stage = 3\n', encoding="utf-8")
    config = build_config(DistillConfig, file, [], {"engine.name": flag}, exclusive="engine")
    assert (config.engine.name, config.engine.zero_stage) == (flag or "deepspeed", stage)
