"""``pipeline teacher-dump``: from a data set and a teacher to a finished cache."""

import hashlib
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow
import safetensors
import torch

from cache_schema.plan import DatasetIdentity, Engine, Generation, HiddenStates, Plan, Sampling, TokenizerIdentity
from cache_schema.sequence import TokenSequence
from pipeline.describe import describe
from pipeline.progress import dump_bar, progress_bar
from workers.device import device_name, resolve_device
from workers.errors import InputError
from workers.teacher.checkpoint import context_length, end_token_ids, hidden_width, identity_of, model_directory
from workers.teacher.config import DumpConfig
from workers.teacher.directory import finished_manifest, remaining_shards, tidy
from workers.teacher.dump import Progress, Worker, dump
from workers.teacher.engines import open_teacher
from workers.teacher.int8 import num_residual_channels
from workers.teacher.sequences import TokenizedData, read_sequences
from workers.teacher.vllm_engine import vllm_version
from workers.tokenizers import chat_template_fingerprint, load_tokenizer, tokenizer_fingerprint, vocab_size

# Bytes an id and a logit take together in a shard, measured on instruction text; for the size said before the dump.
_BYTES_PER_ENTRY = 2.4
_SCALARS = 5
# The same for 50 draws of a position: ids that differ, and how they grow with the draws, from 20 to 1,000 of them.
_IDS_OF_50_DRAWS = 12.3
_IDS_BY_DRAWS = 0.63
_BYTES_PER_DRAWN_ID = 2.2
_DEFAULT_MAX_TOKENS = 2048


@dataclass(frozen=True)
class Prepared:
    plan: Plan
    sequences: list[TokenSequence]
    tokenizer: Any
    device: torch.device
    num_positions: int
    """Exact for the data set's responses; for the teacher's own, the most there can be."""


def prepare(config: DumpConfig) -> Prepared:
    """Read everything but the teacher's weights, and decide the plan.

    Raises:
        InputError, CacheError: see the parts.
    """
    device = resolve_device(config.engine.device)
    directory = model_directory(config.teacher.model)
    tokenizer = load_tokenizer(str(directory))
    vocabulary = vocab_size(tokenizer)
    sampling = None
    if config.cache.sampling == "random":
        sampling = Sampling(draws=config.cache.draws, seed=config.cache.sample_seed)
    elif config.cache.top_k > vocabulary:
        raise InputError(f"--top-k {config.cache.top_k} is more than the vocabulary of {vocabulary}: lower it.")
    logits_alone = config.engine.logits == "engine"
    context = context_length(directory)
    # vLLM makes no logits without writing a token after the sequence.
    max_tokens = _max_tokens(config, context - 1 if context and logits_alone else context)
    data = _read(config, tokenizer, max_tokens)
    identity = identity_of(config.teacher.model, config.teacher.dtype)
    hidden = None
    if config.cache.hidden_states:
        # The scales of int8 need the teacher: ``dump`` measures them, or takes those the directory's plan has.
        dtype = config.cache.hidden_dtype or identity.dtype
        hidden = HiddenStates(dtype=dtype, size=hidden_width(directory))
    plan = Plan(
        teacher=identity,
        tokenizer=TokenizerIdentity(
            fingerprint=tokenizer_fingerprint(tokenizer),
            vocab_size=vocabulary,
            chat_template=chat_template_fingerprint(tokenizer),
        ),
        dataset=DatasetIdentity(
            name=data.name,
            sha256=data.sha256,
            sequences_sha256=_sha256_of_ids(data.sequences),
            num_rows=data.num_rows,
            num_duplicates=data.num_duplicates,
            num_truncated=data.num_truncated,
            max_tokens=max_tokens,
        ),
        responses=_generation(config, directory, tokenizer),
        engine=_engine(config, device),
        positions=config.cache.positions,
        sampling=sampling,
        top_k=0 if sampling else config.cache.top_k,
        logit_step=0.0 if sampling else config.cache.logit_step,
        temperatures=() if sampling or logits_alone else config.cache.temperatures,
        hidden_states=hidden,
        num_sequences=len(data.sequences),
        sequences_per_shard=config.cache.sequences_per_shard,
    )
    extra = config.responses.max_new_tokens * len(data.sequences) if plan.responses else 0
    known = sum(len(sequence.target_rows(plan.positions)) for sequence in data.sequences)
    return Prepared(plan, data.sequences, tokenizer, device, known + extra)


def run(prepared: Prepared, config: DumpConfig, cache_dir: Path, worker: Worker) -> dict[str, Any]:
    """Dump what is missing, beside other workers if there are any, and wait for theirs.

    Returns the description of the finished cache with what this worker did.
    """
    plan, latest = prepared.plan, Progress()
    remaining_shards(cache_dir, plan)  # refuses another dump's directory before a model is loaded
    started = time.perf_counter()
    if finished_manifest(cache_dir) is not None:
        tidy(cache_dir)
    else:
        with (
            open_teacher(config.teacher.model, plan, config.engine, prepared.device) as teacher,
            dump_bar("answering and scoring" if plan.responses else "scoring") as show,
        ):

            def report(progress: Progress) -> None:
                nonlocal latest
                latest = progress
                show(progress)

            dump(cache_dir, plan, prepared.sequences, teacher, prepared.tokenizer, report, worker)
    return describe(cache_dir) | {
        "cache": str(cache_dir),
        "worker": f"{worker.index}/{worker.count}",
        "scored_sequences": latest.sequences,
        "scored_tokens": latest.tokens,
        "seconds": time.perf_counter() - started,
    }


def expected_size(prepared: Prepared) -> dict[str, Any]:
    """What the dump will hold, before it starts."""
    plan, num_positions = prepared.plan, prepared.num_positions
    hidden = num_positions * _hidden_bytes_per_position(plan.hidden_states) if plan.hidden_states else 0
    return {
        "num_sequences": plan.num_sequences,
        "num_shards": plan.num_shards,
        "num_positions": num_positions,
        "positions_are_exact": plan.responses is None,
        "draws": plan.sampling.draws if plan.sampling else None,
        "logits_bytes": round(num_positions * _row_bytes_per_position(plan)),
        "hidden_bytes": hidden,
        "hidden_dtype": plan.hidden_states.dtype if plan.hidden_states else None,
    }


def _row_bytes_per_position(plan: Plan) -> float:
    if plan.sampling is None:
        return plan.top_k * _BYTES_PER_ENTRY + 4 * (1 if plan.logits_alone else _SCALARS)
    num_ids: float = _IDS_OF_50_DRAWS * (plan.sampling.draws / 50) ** _IDS_BY_DRAWS
    return min(num_ids, plan.sampling.draws, plan.tokenizer.vocab_size) * _BYTES_PER_DRAWN_ID


def _hidden_bytes_per_position(hidden: HiddenStates) -> int:
    """Before compression, which int8 alone has."""
    if hidden.dtype == "int8":
        return hidden.size + num_residual_channels(hidden.size) + 4  # and the row's scale
    return hidden.size * (4 if hidden.dtype == "float32" else 2)


def _max_tokens(config: DumpConfig, context: int | None) -> int:
    """The longest sequence: as asked, or 2,048, or what the teacher's positions cover if that is less."""
    asked = config.data.max_tokens
    if asked is None:
        return min(_DEFAULT_MAX_TOKENS, context or _DEFAULT_MAX_TOKENS)
    if context and asked > context:
        beside = " beside the one that engine.logits=engine takes" if config.engine.logits == "engine" else ""
        raise InputError(
            f"data.max_tokens={asked} is more than the {context} positions {config.teacher.model} can read{beside}: "
            f"give --set data.max_tokens={context}."
        )
    return asked


def _read(config: DumpConfig, tokenizer: Any, max_tokens: int) -> TokenizedData:
    with progress_bar("tokenizing") as progress:
        return read_sequences(
            config.data.path,
            tokenizer,
            max_tokens=max_tokens,
            responses=config.responses.source,
            max_new_tokens=config.responses.max_new_tokens,
            limit=config.data.limit,
            split=config.data.split,
            progress=progress,
        )


def _sha256_of_ids(sequences: list[TokenSequence]) -> str:
    digest = hashlib.sha256()
    for sequence in sequences:
        digest.update(sequence.sequence_id)
    return digest.hexdigest()


def _generation(config: DumpConfig, model_dir: Path, tokenizer: Any) -> Generation | None:
    if config.responses.source == "dataset":
        return None
    choices = config.responses.model_dump(exclude={"source"})
    return Generation(**choices, end_token_ids=end_token_ids(model_dir, tokenizer))


def _engine(config: DumpConfig, device: torch.device) -> Engine:
    """The engine of this machine."""
    import transformers

    num_threads = torch.get_num_threads() if device.type == "cpu" else 0
    versions = {
        "logit-cache": version("logit-cache"),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "pyarrow": pyarrow.__version__,
        "safetensors": safetensors.__version__,
    }
    if config.engine.name == "vllm":
        versions["vllm"] = vllm_version()
    return Engine(
        name=config.engine.name,
        device=device_name(device),
        num_threads=num_threads,
        tokens_per_batch=config.engine.tokens_per_batch,
        compiled=config.engine.compile,
        tensor_parallel=config.engine.tensor_parallel,
        pipeline_parallel=config.engine.pipeline_parallel,
        quantization=config.engine.quantization,
        logits=config.engine.logits,
        versions=versions,
    )
