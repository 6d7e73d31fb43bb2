"""What a run refuses before it loads a model: caches, student, teacher and losses that do not fit each other."""

from collections.abc import Sequence

from cache_schema.errors import CacheCorruptError, CacheMismatchError
from cache_schema.manifest import LM_HEAD_NAME, hidden_name
from cache_schema.reader import CacheReader
from cache_schema.remote import local_copy
from workers.distill.adapters import require_peft
from workers.distill.config import DistillConfig
from workers.distill.curriculum import configs_in_turn
from workers.distill.data import TrainingData
from workers.distill.loss_config import LossConfig, Summand
from workers.distill.schedules import require_in_time
from workers.distill.selection import token_counts
from workers.distill.student import require_layers
from workers.distill.terms import losses_of
from workers.errors import InputError
from workers.lookup.live import require_same_teacher
from workers.lookup.opening import Asked, open_log, require_ways, source_of_misses
from workers.losses.catalogue import LOSSES
from workers.losses.loss import Loss
from workers.teacher.checkpoint import context_length, identity_of, model_directory, read_text_config
from workers.tokenizers import check_same_vocabulary, load_tokenizer


def check(config: DistillConfig) -> TrainingData:
    """Open the caches, fetching what is remote, and refuse without loading a model what cannot be trained from them.

    Raises:
        CacheError, InputError: says what does not fit, and how to mend it.
    """
    if config.peft is not None:
        require_peft()
    readers = [CacheReader(local_copy(cache)) for cache in config.cache]
    for turn in configs_in_turn(config, config.switch):
        for reader in readers:
            check_needs(turn, reader)
    _check_each_once(readers)
    _check_one_tokenizer(readers)
    data = TrainingData.of(readers, config.filter)
    data.require_shares(config.weights)
    require_in_time(config.schedule, config.switch, data.num_steps(config))
    student_dir = model_directory(config.student)
    check_same_vocabulary(load_tokenizer(str(readers[0].tokenizer_dir)), load_tokenizer(config.student))
    for reader, kept in zip(readers, data.kept, strict=True):
        _check_context(config.student, reader, kept)
    if config.student_layers is not None:
        require_layers(config.student_layers, read_text_config(student_dir).num_hidden_layers)
    if config.teacher is not None:
        _check_teacher(config, config.teacher, readers)
    require_ways(readers if needs_lookups(config) else [], asked_of(config))
    return data


def needs_lookups(config: DistillConfig) -> bool:
    """Whether a loss asks for more than the stored top-k."""
    return any(
        summand.loss.needs & {"lookups", "full_row"}
        for turn in configs_in_turn(config, config.switch)
        for loss in losses_of(turn).values()
        for summand in loss.summands
    )


def asked_of(config: DistillConfig) -> Asked:
    """What the config gives for lookups that leave the stored top-k."""
    return Asked(config.teacher, config.on_miss, config.lookups)


def check_needs(config: DistillConfig, reader: CacheReader) -> None:
    """Refuse a loss that the cache and what was given beside it cannot serve.

    Raises:
        InputError: names what is missing and every way to add it.
    """
    plan = reader.plan
    if len(losses_of(config)) > 1 and plan.positions != "all":
        asks, way = (
            ("--prompt-loss", "leave the prompt loss out")
            if config.prompt_loss
            else (f"loss {config.loss.name}", "choose one without a part on the prompt, as bild")
        )
        raise InputError(
            f"{asks} trains the prompt's positions, {reader.cache_dir} holds those of the response: dump with "
            f"--positions all, or {way}."
        )
    for part, loss in losses_of(config).items():
        for summand in loss.summands:
            key = "loss" if part == "response" or config.prompt_loss is None else "prompt_loss"
            _check_summand(config, reader, key, loss, summand)


def _check_summand(config: DistillConfig, reader: CacheReader, key: str, losses: LossConfig, summand: Summand) -> None:
    plan, loss = reader.plan, summand.loss
    params = summand.parameters(plan.top_k, plan.tokenizer.vocab_size)
    _check_capture(reader, key, loss)
    if "k" in params:
        k, least = params["k"], loss.parameters["k"].minimum
        assert isinstance(k, int)
        if "top_k" in loss.needs and least > plan.top_k:
            raise InputError(
                f"{key} {loss.name} compares {least:g} ids at least, {reader.cache_dir} stores {plan.top_k}: dump with "
                f"--top-k {max(k, int(least))} or more."
            )
        its_k = losses.key_of(loss.name, "k", key)
        if "top_k" in loss.needs and k > plan.top_k:
            raise InputError(
                f"{its_k}={k} is more than the top {plan.top_k} that {reader.cache_dir} stores: give "
                f"--set {its_k}={plan.top_k} or less, or dump with --top-k {k}."
            )
        if k > plan.tokenizer.vocab_size:
            raise InputError(f"{its_k}={k} is more than the vocabulary of {plan.tokenizer.vocab_size}: lower it.")
    if "logsumexp" in loss.needs:
        its_temperature = losses.key_of(loss.name, "temperature", key) if len(config.cache) == 1 else None
        _check_temperature(reader, f"{key} {loss.name}", loss.temperature(params), its_temperature)
    if loss.needs & {"lookups", "full_row"}:
        _check_misses(config, reader, key, summand)


def _check_capture(reader: CacheReader, key: str, loss: Loss) -> None:
    """A cache stores a top-k, or draws."""
    sampling = reader.plan.sampling
    if sampling and loss.needs & {"top_k", "lookups", "logsumexp"}:
        raise InputError(
            f"{key} {loss.name} compares the teacher's leading ids, {reader.cache_dir} holds {sampling.draws} draws a "
            f"position: choose rskd, or dump with --sampling top-k."
        )
    if not sampling and "samples" in loss.needs:
        raise InputError(
            f"{key} {loss.name} needs ids drawn from the teacher, {reader.cache_dir} has its top {reader.plan.top_k}: "
            f"dump with --sampling random, or choose tail_gjsd, which has no noise."
        )


def _check_temperature(reader: CacheReader, loss: str, temperature: float, key: str | None) -> None:
    """The cache must hold the log-sum-exp at the temperature; ``key`` is where the user may give another."""
    stored = reader.plan.temperatures
    if temperature in stored:
        return
    if reader.plan.logits_alone:
        raise InputError(
            f"{loss} needs the teacher's log-sum-exp, and {reader.cache_dir} holds the engine's own logits without it: "
            f"choose a loss that the stored top-k serves (t_ld, topk_kl), or dump without engine.logits=engine."
        )
    dump = ",".join(f"{value:g}" for value in sorted({*stored, temperature}))
    other = f"give --set {key}={stored[0]:g}; or " if key else ""
    raise InputError(
        f"{loss} needs the teacher's log-sum-exp at temperature {temperature:g}, which no other's can stand for, and "
        f"{reader.cache_dir} holds it at {', '.join(f'{value:g}' for value in stored)}: {other}dump with "
        f"--set cache.temperatures=[{dump}]."
    )


def _check_misses(config: DistillConfig, reader: CacheReader, key: str, summand: Summand) -> None:
    """Something must answer what is not in the stored top-k."""
    _check_all_or_none(reader)
    loss = summand.loss
    source, rows = source_of_misses(reader, asked_of(config)), "full_row" in loss.needs
    if source == "cached" or (rows and source == "bound"):
        asks = "the teacher's whole rows" if rows else "the teacher's logits at the student's own top-k"
        log = open_log(reader, config.lookups)
        logged = (
            f", and its log those of {log.num_with_hidden_states} of {len(reader)} sequences" if log.files() else ""
        )
        alone = reader.plan.logits_alone
        bound = "" if rows or alone else ", or --on-miss bound for an upper bound in their place"
        again = "without engine.logits=engine and --no-hidden-states" if alone else "without --no-hidden-states"
        raise InputError(
            f"{key} {loss.name} needs {asks}, and {reader.cache_dir} has no hidden states{logged}. Give --teacher "
            f"{reader.plan.teacher.name}{bound}; or dump again {again} (with --hidden-states); or "
            f"choose a loss that the {_near(reader, key, summand)}."
        )
    if source == "bound" and reader.plan.logits_alone:
        raise InputError(
            f"--on-miss bound takes the teacher's log-sum-exp at temperature 1, and {reader.cache_dir} holds the "
            f"engine's own logits without it: give --teacher {reader.plan.teacher.name}, or choose a loss that the "
            f"{_near(reader, key, summand)}."
        )
    if rows and source == "live" and config.lookups.log == "logits":
        raise InputError(
            f"{key} {loss.name} needs the teacher's whole rows, which a log of logits cannot keep: give --log hidden, "
            f"or --log none to run the teacher in every epoch."
        )


def _near(reader: CacheReader, key: str, summand: Summand) -> str:
    """The losses that what is stored serves, the one nearest to a given one first and with what it must be told."""
    plan = reader.plan
    if plan.sampling:
        return "draws serve (rskd)"
    if summand.loss.tail_form is None or plan.logits_alone:
        return "stored top-k serves (t_ld, topk_kl)"
    name, told = summand.loss.tail_form
    params = {**summand.parameters(plan.top_k, plan.tokenizer.vocab_size), **told}
    near = LOSSES[name].parameters
    settings = [
        f" --set {key}.{param}={params[param]}"
        for param in near
        if param in params and params[param] != near[param].default
    ]
    return f"stored top-k serves ({name}{''.join(settings)})"


def _check_all_or_none(reader: CacheReader) -> None:
    """A cache whose hidden states are there in part has lost the others, and no teacher should be asked for that."""
    if reader.plan.hidden_states is None:
        return
    states = [reader.cache_dir / hidden_name(receipt.shard) for receipt in reader.manifest.receipts]
    present = [path for path in states if path.exists()]
    missing = [path for path in [*states, reader.lm_head_path] if not path.exists()]
    if present and missing:
        raise CacheCorruptError(
            f"{missing[0]} is missing, while {present[0].name} is there: either all files of hidden states may be "
            f"deleted, or none, and {LM_HEAD_NAME} stays. Restore it, or delete every shard-*.hidden.parquet to do "
            f"without hidden states."
        )


def _check_each_once(readers: list[CacheReader]) -> None:
    """Whatever path each was given by."""
    seen: dict[str, CacheReader] = {}
    for reader in readers:
        other = seen.setdefault(reader.manifest_sha256, reader)
        if other is not reader:
            raise InputError(
                f"cache names one cache twice: {other.cache_dir} and {reader.cache_dir} have the same manifest. Give "
                f"it once, with a weight."
            )


def _check_one_tokenizer(readers: list[CacheReader]) -> None:
    first = readers[0]
    for reader in readers[1:]:
        if reader.plan.tokenizer.fingerprint != first.plan.tokenizer.fingerprint:
            raise CacheMismatchError(
                f"{reader.cache_dir} was made with another tokenizer than {first.cache_dir}: one student reads one. "
                f"Give caches of teachers that share it."
            )


def _check_context(student: str, reader: CacheReader, kept: Sequence[int]) -> None:
    context = context_length(model_directory(student))
    if context is not None and context < reader.plan.dataset.max_tokens:
        longest = int(token_counts(reader)[kept].max())
        if context < longest:
            raise InputError(
                f"{student} reads {context:,} tokens, {reader.cache_dir} holds a sequence of {longest:,}: give a "
                f"student with a longer context, or dump with --set data.max_tokens={context}."
            )


def _check_teacher(config: DistillConfig, teacher: str, readers: list[CacheReader]) -> None:
    """It must be that of every cache it would be run for; where it is run for none, that of the first."""
    asked = asked_of(config)
    live = [reader for reader in readers if source_of_misses(reader, asked) == "live"]
    for reader in live or readers[:1]:
        require_same_teacher(reader, identity_of(teacher, reader.plan.teacher.dtype))
    for reader in live[1:]:
        if reader.plan.teacher.dtype != live[0].plan.teacher.dtype:
            raise CacheMismatchError(
                f"{reader.cache_dir} was dumped in {reader.plan.teacher.dtype}, {live[0].cache_dir} in "
                f"{live[0].plan.teacher.dtype}: one run has one live teacher. Train on them one after the other, or "
                f"dump one of them again."
            )
