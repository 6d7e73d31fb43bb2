"""``pipeline estimate``: what K and hidden states cost and save, before anything is dumped.

Counted on the whole data: sequences, tokens, positions; where the teacher writes the responses, extrapolated.
Measured on a pilot, which the teacher scores into a temporary cache: bytes of a position, the mass outside the top K,
what a student misses. Extrapolated from the pilot: bytes in all, by positions and tokens, and seconds, by the tokens
the teacher reads, padding included.
"""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cache_schema.manifest import LM_HEAD_NAME
from pipeline.pilot import Pilot, padded_tokens, score_pilot, student_misses, written_at
from pipeline.statistics import (
    STUDENT_K,
    by_top_k,
    evenly_spread,
    misses_by_top_k,
    require_student,
    stored_logits,
)
from pipeline.teacher_dump import Prepared, prepare
from workers.errors import InputError
from workers.evaluate.misses import TOP_KS, mass_outside
from workers.teacher.config import DumpConfig
from workers.teacher.engines import open_teacher
from workers.teacher.teacher import ScoringTeacher

_HELD_OUT = 4
"""One pilot sequence in so many is kept from the student's training and counted: few sequences are soon known by heart,
and there a student misses less than it will in any run."""


@dataclass(frozen=True)
class Intent:
    """What is to be trained, and how much may be spent on the estimate."""

    student: str | None
    student_layers: tuple[int, ...] | None
    epochs: int
    students: int
    pilot_sequences: int
    pilot_steps: int
    pilot_lr: float


def estimate(config: DumpConfig, intent: Intent) -> dict[str, Any]:
    """Score a pilot, train the student on it if there is one, and extrapolate; leaves nothing on the disk.

    Raises:
        InputError, CacheError: what ``teacher-dump`` and ``distill`` would refuse.
    """
    if config.cache.sampling == "random":
        raise InputError(
            "estimate measures what each K of a top-k costs and misses, and --sampling random stores draws: leave "
            "cache.sampling out, or see the size of the draws with `pipeline teacher-dump --sampling random --dry-run`."
        )
    if config.engine.logits == "engine":
        raise InputError(
            "estimate measures what lies outside each K, and engine.logits=engine gives no tails: leave it out, or see "
            "the size of the cache with `pipeline teacher-dump ... --dry-run`."
        )
    # The pilot keeps hidden states whatever the dump is to keep: they are half of the question.
    config = config.model_copy(update={"cache": config.cache.model_copy(update={"hidden_states": True})})
    with tempfile.TemporaryDirectory(prefix="logit-cache-") as name:
        folder = Path(name)
        prepared = prepare(config)
        trained, held_out = _choose(prepared, intent)
        if intent.student is not None:
            extra = config.responses.max_new_tokens if prepared.plan.responses else 0
            longest = max(sequence.num_tokens for sequence in prepared.sequences) + extra
            require_student(intent.student, intent.student_layers, prepared.tokenizer, longest)
        pilot = _score(config, prepared, trained, held_out, folder)
        top_ks = _top_ks(prepared)
        facts = _counts(prepared, pilot) | _bytes(prepared, pilot, top_ks, folder)
        facts |= {"mass_outside": by_top_k(_mass_outside(pilot, top_ks)), "misses": None}
        if intent.student is not None:
            k = min(STUDENT_K, prepared.plan.tokenizer.vocab_size)
            misses = student_misses(
                pilot,
                intent.student,
                intent.student_layers,
                k=k,
                top_ks=top_ks,
                steps=intent.pilot_steps,
                lr=intent.pilot_lr,
                device=prepared.device,
                folder=folder,
            )
            facts["misses"] = {"k": k, "steps": intent.pilot_steps, "lr": intent.pilot_lr}
            facts["misses"] |= {when: misses_by_top_k(found) for when, found in misses.items()}
        facts |= _passes(prepared, pilot, intent)
    return facts | {"recommendation": _recommendation(facts)}


def _choose(prepared: Prepared, intent: Intent) -> tuple[list[int], list[int]]:
    """Indexes of the sequences the student is trained on (all, without a student) and of those held out."""
    chosen = evenly_spread(len(prepared.sequences), intent.pilot_sequences)
    if intent.student is None:
        return chosen, []
    held_out = chosen[_HELD_OUT - 1 :: _HELD_OUT] or chosen[-1:]
    trained = [index for index in chosen if index not in held_out]
    if not trained:
        raise InputError(
            "a student's pilot needs two sequences, one to train on and one to count misses on: give "
            "--pilot-sequences 2 or more, and data of as many rows."
        )
    return trained, held_out


def _score(config: DumpConfig, prepared: Prepared, trained: list[int], held_out: list[int], folder: Path) -> Pilot:
    """The teacher is in memory for as long as this takes, and gone before a student comes."""
    with open_teacher(config.teacher.model, prepared.plan, config.engine, prepared.device) as teacher:
        assert not isinstance(teacher, ScoringTeacher)
        return score_pilot(prepared, trained, held_out, teacher, folder)


def _top_ks(prepared: Prepared) -> list[int]:
    """The usual ones and the one that was asked for, none larger than the vocabulary."""
    return sorted({min(top_k, prepared.plan.tokenizer.vocab_size) for top_k in (*TOP_KS, prepared.plan.top_k)})


def _counts(prepared: Prepared, pilot: Pilot) -> dict[str, Any]:
    plan, sequences = prepared.plan, prepared.sequences
    in_pilot = {
        "sequences": len(pilot.scored),
        "tokens": sum(reader.manifest.num_tokens for reader in pilot.readers),
        "positions": sum(reader.manifest.num_positions for reader in pilot.readers),
        "held_out_sequences": len(pilot.held_out) if pilot.held_out else 0,
    }
    if plan.responses is None:
        num_tokens, num_positions = sum(sequence.num_tokens for sequence in sequences), prepared.num_positions
    else:
        longer = len(sequences) / in_pilot["sequences"]
        num_tokens, num_positions = round(in_pilot["tokens"] * longer), round(in_pilot["positions"] * longer)
    return {
        "num_sequences": len(sequences),
        "num_tokens": num_tokens,
        "num_positions": num_positions,
        "positions_are_exact": plan.responses is None,
        "vocab_size": plan.tokenizer.vocab_size,
        "pilot": in_pilot,
    }


def _bytes(prepared: Prepared, pilot: Pilot, top_ks: list[int], folder: Path) -> dict[str, Any]:
    """Per position as written, and extrapolated to the data."""
    counts = _counts(prepared, pilot)
    num_positions, in_pilot = counts["num_positions"], counts["pilot"]
    receipts = {top_k: written_at(prepared, pilot, top_k, folder / f"top-{top_k}") for top_k in top_ks}
    logits = {top_k: receipt.logits_bytes / in_pilot["positions"] for top_k, receipt in receipts.items()}
    one = receipts[prepared.plan.top_k]
    scalars = one.scalar_bytes / in_pilot["positions"]
    tokens = (sum(file.num_bytes for file in one.files) - one.logits_bytes - one.scalar_bytes) / in_pilot["tokens"]
    states = pilot.trained.plan.hidden_states
    assert states is not None
    hidden_files = [file for receipt in pilot.trained.manifest.receipts for file in receipt.files]
    hidden = sum(file.num_bytes for file in hidden_files if ".hidden." in file.name)
    hidden_per_position = hidden / pilot.trained.manifest.num_positions
    head = next(file.num_bytes for file in pilot.trained.manifest.files if file.name == LM_HEAD_NAME)
    other = num_positions * scalars + counts["num_tokens"] * tokens
    return {
        "top_k": prepared.plan.top_k,
        "bytes_per_position": by_top_k(logits),
        "scalar_bytes_per_position": scalars,
        "hidden_bytes_per_position": hidden_per_position,
        "hidden_dtype": states.dtype,
        "token_bytes_per_token": tokens,
        "bytes": {str(top_k): round(num_positions * per_one + other) for top_k, per_one in logits.items()},
        "hidden_bytes": round(num_positions * hidden_per_position),
        "lm_head_bytes": head,
    }


def _mass_outside(pilot: Pilot, top_ks: list[int]) -> dict[int, float]:
    parts = [stored_logits(reader, range(len(reader))) for reader in pilot.readers]
    logits_NK, tail_N = (torch.cat(columns) for columns in zip(*parts, strict=True))
    return mass_outside(logits_NK, tail_N, top_ks)


def _passes(prepared: Prepared, pilot: Pilot, intent: Intent) -> dict[str, Any]:
    """Teacher passes over the data and their seconds: live in every epoch, or from a cache."""
    plan, sequences = prepared.plan, prepared.sequences
    longer = len(sequences) / len(pilot.scored)
    ratio = longer
    if plan.responses is None:
        shards = ([sequences[index] for index in plan.shard_range(shard)] for shard in range(plan.num_shards))
        ratio = sum(padded_tokens(shard, plan.engine.tokens_per_batch) for shard in shards) / pilot.padded_tokens
    live, dumped = pilot.teacher_seconds * ratio, pilot.dump_seconds * ratio
    wanted = intent.epochs * intent.students
    ways = {"live": (wanted, wanted * live), "hidden_states": (1, dumped), "no_hidden_states": (2, dumped + live)}
    return {
        "epochs": intent.epochs,
        "students": intent.students,
        "seconds": {
            "teacher_pass": live,
            "dump": dumped,
            "generation": pilot.generation_seconds * longer if plan.responses else None,
        },
        "passes": {way: passes for way, (passes, _) in ways.items()},
        "teacher_seconds": {way: seconds for way, (_, seconds) in ways.items()},
        "break_even": {
            way: {"passes": passes + 1, "seconds": int(seconds // live) + 1}
            for way, (passes, seconds) in ways.items()
            if way != "live"
        },
    }


def smallest_k_worth_its_bytes(
    bytes_per_position: Mapping[str, float], hidden_bytes_per_position: float, asking: Mapping[str, float], least: int
) -> int:
    """The smallest K past which the next one adds more bytes to every epoch's reading than it saves.

    A run reads ids and logits of every position, and the hidden states of each sequence with a miss.

    Args:
        asking: the share of such sequences at each K.
        least: the loss's own k.
    """
    best, *larger = sorted(top_k for top_k in map(int, bytes_per_position) if top_k >= least)
    for top_k in larger:
        saved = hidden_bytes_per_position * (asking[str(best)] - asking[str(top_k)])
        if bytes_per_position[str(top_k)] - bytes_per_position[str(best)] >= saved:
            break
        best = top_k
    return best


def _recommendation(facts: dict[str, Any]) -> dict[str, Any]:
    """What the numbers say, with the reason in words; K is null where no student was given to measure."""
    hidden, asked = facts["hidden_bytes_per_position"], facts["top_k"]
    ids = facts["bytes_per_position"][str(asked)]
    share = ids / (ids + facts["scalar_bytes_per_position"] + hidden)
    exact = "within the rounding of int8" if facts["hidden_dtype"] == "int8" else "exact"
    if facts["misses"] is None:
        return {
            "top_k": None,
            "hidden_states": True,
            "reason": f"Every lookup is then {exact}, whatever K; K = {asked} is {share:.0%} of a position's bytes. "
            f"Leave them out if every student trains with t_ld, topk_kl or sft. Give --student to see what K saves.",
        }
    asking = facts["misses"]["after"]["share_of_sequences"]
    best = smallest_k_worth_its_bytes(facts["bytes_per_position"], hidden, asking, facts["misses"]["k"])
    widest = max(asking, key=int)
    return {
        "top_k": best,
        "hidden_states": True,
        "reason": f"{asking[str(best)]:.0%} of the sequences ask for an id outside the top {best}, and "
        f"{asking[widest]:.0%} outside the top {widest}; one such id takes the teacher or hidden states. With these "
        f"every answer is {exact}, whatever K; past {best} a larger K adds more bytes to an epoch's reading than it "
        f"spares. K = {asked} is {share:.0%} of a position's bytes. Losses on stored ids (topk_kl) and overlap@32 need "
        f"the K they compare.",
    }
