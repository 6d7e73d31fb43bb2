"""Which of several workers this process is: as told, or as torchrun, Slurm or Kubernetes say in the environment."""

import re
from collections.abc import Mapping

from workers.errors import InputError
from workers.teacher.dump import Worker


def this_worker(told: str | None, lease_seconds: float, environment: Mapping[str, str]) -> Worker:
    """The worker of ``--worker I/N``, or of the environment, or the only one.

    Raises:
        InputError: not I/N with 0 <= I < N, or an environment that says so little or so strange things.
    """
    index, count = _from_text(told) if told is not None else _from_environment(environment)
    return Worker(index, count, lease_seconds)


def _from_text(told: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", told.strip())
    if match is None or int(match[1]) >= int(match[2]):
        raise InputError(f"--worker {told}: write I/N, I from 0 to N - 1, for instance --worker 0/4.")
    return int(match[1]), int(match[2])


def _from_environment(environment: Mapping[str, str]) -> tuple[int, int]:
    def number(name: str, default: int | None = None) -> int:
        text = environment.get(name, "" if default is None else str(default))
        if not text.isdecimal():
            raise InputError(f"{name}={text} in the environment is no number: give --worker I/N instead.")
        return int(text)

    if "RANK" in environment and "WORLD_SIZE" in environment:
        found = number("RANK"), number("WORLD_SIZE")
    elif "SLURM_JOB_ID" in environment:
        # Tasks of one srun, in each job of an array; either alone is the other with one member. A batch script that
        # starts no srun is one process, however many tasks it might start.
        in_step = "SLURM_STEP_ID" in environment
        task, tasks = (number("SLURM_PROCID", 0), number("SLURM_NTASKS", 1)) if in_step else (0, 1)
        first, step = number("SLURM_ARRAY_TASK_MIN", 0), number("SLURM_ARRAY_TASK_STEP", 1)
        job = (number("SLURM_ARRAY_TASK_ID", first) - first) // max(step, 1)
        found = job * tasks + task, number("SLURM_ARRAY_TASK_COUNT", 1) * tasks
    elif "JOB_COMPLETION_INDEX" in environment:
        # Kubernetes says which one, not of how many; the number only spreads the workers over the shards.
        index = number("JOB_COMPLETION_INDEX")
        found = index, index + 1
    else:
        found = 0, 1
    if not 0 <= found[0] < found[1]:
        raise InputError(
            f"the environment says that this is worker {found[0]} of {found[1]}, counted from 0: give --worker I/N."
        )
    return found
