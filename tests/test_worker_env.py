"""Which worker a process is, by what torchrun, Slurm and Kubernetes put in its environment."""

import pytest

from pipeline.worker import this_worker
from workers.errors import InputError
from workers.teacher.dump import Worker

SRUN = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0"}
ARRAY = {"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "7"}


def array(task_id: int, first: int, step: int, number: int) -> dict[str, str]:
    """A job of ``sbatch --array``."""
    values = {"ID": task_id, "MIN": first, "STEP": step, "COUNT": number, "MAX": first + step * (number - 1)}
    return ARRAY | {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in values.items()}


@pytest.mark.parametrize(
    ("environment", "worker"),
    [
        ({}, (0, 1)),
        ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, (3, 8)),
        ({"RANK": "3"}, (0, 1)),
        # One task of several that srun started, and a batch script, which is one process whatever it may start.
        (SRUN | {"SLURM_PROCID": "2", "SLURM_NTASKS": "4"}, (2, 4)),
        ({"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, (0, 1)),
        # Arrays 0-3, 1-4, 10,14,18,22 (10-22:4), and one job of several tasks each.
        (array(2, 0, 1, 4), (2, 4)),
        (array(4, 1, 1, 4), (3, 4)),
        (array(18, 10, 4, 4), (2, 4)),
        (array(1, 0, 1, 2) | {"SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_NTASKS": "4"}, (5, 8)),
        # torchrun inside a Slurm job knows best.
        (SRUN | {"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "RANK": "9", "WORLD_SIZE": "16"}, (9, 16)),
        ({"JOB_COMPLETION_INDEX": "0"}, (0, 1)),
        ({"JOB_COMPLETION_INDEX": "5"}, (5, 6)),
    ],
)
def test_the_environment_says_which_worker(environment: dict[str, str], worker: tuple[int, int]) -> None:
    assert this_worker(None, 60.0, environment) == Worker(*worker, lease_seconds=60.0)


@pytest.mark.parametrize("told", ["0/1", "3/4", " 2/3 "])
def test_what_is_told_beats_the_environment(told: str) -> None:
    index, count = told.split("/")
    assert this_worker(told, 5.0, {"RANK": "nonsense", "WORLD_SIZE": "8"}) == Worker(int(index), int(count), 5.0)


@pytest.mark.parametrize("told", ["", "1", "4/4", "5/4", "-1/4", "1/-4", "1.5/4", "a/b", "1/0", "0/0", "1/4/8", "²/4"])
def test_what_is_told_wrongly_is_one_clear_error(told: str) -> None:
    with pytest.raises(InputError, match=r"^--worker .*: write I/N, I from 0 to N - 1, for instance --worker 0/4\.$"):
        this_worker(told, 60.0, {})


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "one", "WORLD_SIZE": "4"}, "RANK=one in the environment is no number: give --worker I/N instead."),
        ({"RANK": "0", "WORLD_SIZE": ""}, "WORLD_SIZE= in the environment is no number"),
        ({"RANK": "-1", "WORLD_SIZE": "4"}, "RANK=-1 in the environment is no number"),
        ({"RANK": "²", "WORLD_SIZE": "4"}, "RANK=² in the environment is no number"),
        ({"RANK": "4", "WORLD_SIZE": "4"}, "this is worker 4 of 4, counted from 0: give --worker I/N."),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "this is worker 0 of 0"),
        (SRUN | {"SLURM_PROCID": "x"}, "SLURM_PROCID=x in the environment is no number"),
        (SRUN | {"SLURM_NTASKS": "0"}, "this is worker 0 of 0"),
        (array(9, 0, 1, 4), "this is worker 9 of 4"),
        (array(1, 3, 1, 4), "this is worker -2 of 4"),
        ({"JOB_COMPLETION_INDEX": ""}, "JOB_COMPLETION_INDEX= in the environment is no number"),
    ],
)
def test_an_environment_of_nonsense_is_one_clear_error(environment: dict[str, str], message: str) -> None:
    with pytest.raises(InputError) as error:
        this_worker(None, 60.0, environment)
    assert message in str(error.value)
