"""The summaries a person reads, made of the same objects that ``--json`` prints."""

from pathlib import Path
from typing import Any

from pipeline.describe import human_bytes, in_words


def size_in_words(size: dict[str, Any]) -> str:
    about = "" if size["positions_are_exact"] else "at most "
    lines = [
        f"{size['num_sequences']:,} sequences, {about}{size['num_positions']:,} positions, {size['num_shards']} shards",
        f"  {'draws ' if size['draws'] else 'logits'}         about {human_bytes(size['logits_bytes'])}",
    ]
    if size["hidden_bytes"]:
        int8 = size["hidden_dtype"] == "int8"
        without = (
            "a loss on the draws alone needs none (--no-hidden-states)"
            if size["draws"]
            else "without them (--no-hidden-states) every student that looks outside the top k needs the teacher again"
        )
        lines.append(
            f"  hidden states  {'at most ' if int8 else about}{human_bytes(size['hidden_bytes'])}"
            f"{' as int8' if int8 else ''}; {without}"
        )
    else:
        outside = "ask for more than the draws" if size["draws"] else "look outside the top k"
        lines.append(f"  hidden states  none: students that {outside} will need the teacher again")
    return "\n".join(lines)


def dump_in_words(cache_dir: Path, facts: dict[str, Any]) -> str:
    rate = facts["scored_sequences"] / facts["seconds"] if facts["scored_sequences"] else 0.0
    return (
        f"{in_words(cache_dir, facts)}\n"
        f"scored {facts['scored_sequences']:,} sequences in {facts['seconds']:.1f} s ({rate:.2f}/s)"
    )


def report_in_words(cache_dir: Path, report: dict[str, Any]) -> str:
    if report["ok"]:
        log = f", and {report['log_files']:,} files of the lookup log" if report["log_files"] else ""
        return (
            f"{cache_dir}: ok. {human_bytes(report['checked_bytes'])} hashed, every row checked, those of "
            f"{report['recomputed_sequences']} sequences made again from hidden states and head{log}"
        )
    lines = [f"{cache_dir}: {len(report['errors'])} errors"]
    return "\n".join(lines + [f"  {error['file']}: {error['reason']}" for error in report["errors"]])


def compaction_in_words(folded: dict[str, Any]) -> str:
    return (
        f"{folded['log']}: {folded['files_before']:,} files ({human_bytes(folded['bytes_before'])}) are now "
        f"{folded['files_after']:,} ({human_bytes(folded['bytes_after'])}); {folded['duplicates']:,} repeats dropped"
    )


def work_in_words(work: dict[str, Any]) -> str:
    kept, in_cache = sum(work["sequences_kept"]), work["sequences_in_cache"]
    sequences = f"{kept:,}" if kept == in_cache else f"{kept:,} of the {in_cache:,}"
    losses = [
        f"  {key.replace('_', ' ')} {', '.join(f'{name} {value}' for name, value in work[key].items())}\n"
        for key in ("loss", "prompt_loss")
        if key in work
    ]
    return (
        f"{work['steps']:,} steps, {work['epochs']:.2f} epochs of {sequences} sequences "
        f"({work['positions_in_cache']:,} positions{'' if kept == in_cache else ' before the filter'})\n"
        f"{''.join(losses)}"
        f"  lookups outside the stored top k: {work['lookups_from']}"
    )


def run_in_words(summary: dict[str, Any]) -> str:
    if "stopped" in summary:
        return (
            f"{summary['run']}: stopped after {summary['steps']:,} of {summary['of_steps']:,} steps; "
            f"`pipeline distill --resume --out {summary['run']}` goes on"
        )
    pairs = sum(summary["lookups"].values())
    tiers = ", ".join(f"{tier} {count:,}" for tier, count in summary["lookups"].items() if count)
    lines = [
        f"{summary['run']}: {summary['steps']:,} steps in {summary['seconds']:.1f} s, "
        f"{summary['positions']:,} positions, {summary['positions_per_second']:,.0f} positions/s",
        f"  loss      {summary['first_loss']:.4f} at the first step, {summary['loss']:.4f} at the last",
        f"  lookups   {tiers or 'none'}{f' of {pairs:,}' if pairs else ''}; teacher forwards "
        f"{summary['teacher_forwards']:,}",
        *_approximate(summary),
        f"  memory    {human_bytes(summary['peak_memory_bytes'])} at the peak",
    ]
    for label, measured in (("before", summary["eval_before"]), ("after", summary["eval"])):
        if measured:
            lines.append(f"  {label:<9} {_measured_line(measured)}")
    if best := summary.get("best"):
        lines.append(f"  best      step {best['step']:,}: {best['model']}")
    return "\n".join([*lines, f"  model     {summary['model']}"])


def _approximate(summary: dict[str, Any]) -> list[str]:
    share = summary["bound_share"]
    return [f"  NOT exact {share:.1%} of the lookups were answered with an upper bound"] if share else []


def evaluation_in_words(measured: dict[str, Any]) -> str:
    return f"{measured['positions']:,} positions (micro average over positions)\n  {_measured_line(measured)}"


def _measured_line(measured: dict[str, Any]) -> str:
    overlaps = ", ".join(f"@{k} {value:.3f}" for k, value in measured["overlap"].items() if value is not None)
    kl = "unknown without hidden states" if measured["kl"] is None else f"{measured['kl']:.3f}"
    return f"overlap {overlaps}; KL {kl}; loss {measured['loss']:.3f}"
