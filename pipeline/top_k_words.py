"""What a person reads of ``estimate`` and ``inspect --stats``: tables over K, and what they lead to."""

import textwrap
from typing import Any

from pipeline.describe import human_bytes

_WIDTH = 110


def estimate_in_words(facts: dict[str, Any]) -> str:
    """What a person reads; says which numbers are counted, measured and extrapolated."""
    pilot, misses, advice = facts["pilot"], facts["misses"], facts["recommendation"]
    counted = "counted" if facts["positions_are_exact"] else "extrapolated: the teacher is still to write the responses"
    lines = [
        f"{facts['num_sequences']:,} sequences, {facts['num_tokens']:,} tokens, {facts['num_positions']:,} positions "
        f"({counted})",
        f"measured on a pilot of {pilot['sequences']:,} sequences, {pilot['positions']:,} positions; bytes in all and "
        f"seconds are extrapolated from it",
    ]
    columns = {
        "B a position": {top_k: f"{size:.1f}" for top_k, size in facts["bytes_per_position"].items()},
        "in all": {top_k: human_bytes(size) for top_k, size in facts["bytes"].items()},
        "mass outside": as_percent(facts["mass_outside"]),
    }
    if misses is not None:
        columns["missed at step 0"] = as_percent(misses["before"]["share_of_pairs"])
        columns[f"at step {misses['steps']}"] = as_percent(misses["after"]["share_of_pairs"])
        columns["sequences asking"] = as_percent(misses["after"]["share_of_sequences"])
    lines += table_by_top_k(columns)
    if misses is not None:
        lines += [
            f"  missed: of the student's top {misses['k']}, outside the teacher's top K, before and after "
            f"{misses['steps']} steps of BiLD at lr {misses['lr']:g},",
            f"  on {pilot['held_out_sequences']} sequences held out from them; asking: with a miss after them",
        ]
    lines += [
        f"  scalars        {facts['scalar_bytes_per_position']:,.1f} B a position, within each sum above",
        f"  hidden states  {facts['hidden_bytes_per_position']:,.1f} B a position ({facts['hidden_dtype']}), "
        f"{human_bytes(facts['hidden_bytes'])} in all; the LM head {human_bytes(facts['lm_head_bytes'])}",
        *_passes_in_words(facts),
    ]
    chosen = "" if advice["top_k"] is None else f", --top-k {advice['top_k']}"
    recommended = f"recommended: hidden states{chosen}. {advice['reason']}"
    return "\n".join([*lines, textwrap.fill(recommended, _WIDTH, subsequent_indent="  ")])


def _passes_in_words(facts: dict[str, Any]) -> list[str]:
    seconds, passes, spent, even = facts["seconds"], facts["passes"], facts["teacher_seconds"], facts["break_even"]
    written = "" if seconds["generation"] is None else f"; {seconds['generation']:,.1f} s to write the responses first"
    lines = [
        f"  one pass       {seconds['teacher_pass']:,.1f} s of the teacher alone, {seconds['dump']:,.1f} s as a dump"
        f"{written}",
        f"teacher passes for epochs x students = {facts['epochs']} x {facts['students']}",
        f"  live teacher              {passes['live']:>9,}  {spent['live']:>10,.1f} s",
    ]
    for way, name in (("hidden_states", "hidden states"), ("no_hidden_states", "no hidden states")):
        most = "" if way == "hidden_states" else "at most "
        lines.append(
            f"  cache, {name:<18} {most + str(passes[way]):>9}  {spent[way]:>10,.1f} s  less than live from "
            f"{even[way]['passes']} epochs x students on, {even[way]['seconds']} by seconds"
        )
    return lines


def statistics_in_words(cache: dict[str, Any]) -> str:
    """The ``stats`` of a cache's description."""
    facts = cache["stats"]
    lines = ["columns, all shards"]
    for name, size in facts["columns"].items():
        lines.append(f"  {name:<16} {human_bytes(size):>9} {size / cache['num_positions']:>9.2f} B a position")
    if facts["ids_per_position"] is not None:
        draws = cache["sampling"]["draws"]
        return "\n".join([*lines, f"{facts['ids_per_position']:,.2f} ids a position among {draws:,} draws"])
    lines.append(
        f"on {facts['sample']['sequences']:,} of {cache['num_sequences']:,} sequences, spread evenly over the cache"
    )
    columns: dict[str, dict[str, str]] = {}
    if facts["mass_outside"] is None:
        lines.append("  mass outside the top K: unknown, the cache stores no tail at temperature 1")
    else:
        columns["mass outside"] = as_percent(facts["mass_outside"])
    if facts["misses"] is not None:
        columns[f"missed of top {facts['misses']['k']}"] = as_percent(facts["misses"]["share_of_pairs"])
        columns["sequences asking"] = as_percent(facts["misses"]["share_of_sequences"])
    lines += table_by_top_k(columns)
    if facts["misses"] is None:
        return "\n".join([*lines, "  give --student to count what it misses"])
    epoch = facts["one_epoch"]
    tiers = ", ".join(f"{tier} {pairs:,}" for tier, pairs in epoch["lookups"].items())
    most = "at most " if epoch["at_most"] else ""
    lines.append(
        f"one epoch of this student as it is: lookups {tiers}; teacher forwards {most}{epoch['teacher_forwards']:,}"
    )
    if epoch["at_most"]:
        lines.append("  live and teacher forwards are upper limits: the lookup log answers some of it")
    return "\n".join(lines)


def as_percent(shares: dict[str, float]) -> dict[str, str]:
    return {top_k: f"{share:.2%}" for top_k, share in shares.items()}


def table_by_top_k(columns: dict[str, dict[str, str]]) -> list[str]:
    """Lines of a table with a row for each K; a column may lack some."""
    rows = sorted({top_k for column in columns.values() for top_k in column}, key=int)
    if not rows:
        return []
    widths = {name: max(12, len(name)) for name in columns}
    header = "".join(f"  {name:>{width}}" for name, width in widths.items())
    lines = [f"  {'K':>6}{header}"]
    for top_k in rows:
        lines.append(f"  {top_k:>6}" + "".join(f"  {columns[name].get(top_k, ''):>{widths[name]}}" for name in columns))
    return lines
