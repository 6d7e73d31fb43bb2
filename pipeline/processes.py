"""Workers of a dump as processes of this machine, each with its own share of the GPUs and of the CPU's threads."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import tomli_w
import torch

from pipeline.progress import say
from pipeline.stopping import signals_held
from workers.errors import InputError
from workers.teacher.config import DumpConfig

_MOST_RESTARTS = 3
"""Of one worker. One that crashed may have met a passing fault, and its GPU should not idle for the rest of the dump;
one that ended with an ``error:`` would say the same again and is not restarted."""
FINISHED_SECONDS = 5.0
"""For workers to end by themselves once the cache is finished; those that do not wait for something."""
_GRACE_SECONDS = 20.0
_ALIKE_SECONDS = 10.0


class Failures:
    """Why workers ended for good. What all of them say is said once, as the launcher's error."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._reasons: dict[str, str] = {}
        """By worker."""
        self._unsaid: dict[str, float] = {}
        """By reason, since when."""

    def __bool__(self) -> bool:
        return bool(self._reasons)

    def add(self, index: int, reason: str) -> None:
        if reason not in self._reasons.values():
            self._unsaid[reason] = time.monotonic()
        self._reasons[f"worker {index}/{self._count}"] = reason

    def say(self, after_seconds: float = _ALIKE_SECONDS) -> None:
        """Say what has been waiting for so long that others do not seem to fail alike.

        Raises:
            InputError: all workers have failed; with what the first one said.
        """
        all_failed = len(self._reasons) == self._count
        first = next(iter(self._reasons.values()), "")
        for reason, since in list(self._unsaid.items()):
            if not all_failed and time.monotonic() - since < after_seconds:
                continue
            del self._unsaid[reason]
            if not all_failed or reason != first:
                names = ", ".join(name for name, said in self._reasons.items() if said == reason)
                say(f"{names} stopped{'' if all_failed else ', the others go on'}: {reason}")
        if all_failed:
            raise InputError(first)


class ProcessWorkers:
    """Ended by leaving the context, whatever of them has been started.

    Raises:
        InputError: there are fewer GPUs here than the workers need.
    """

    def __init__(self, config: DumpConfig, cache_dir: Path, device: torch.device) -> None:
        assert config.worker.count is not None
        self._config = config
        self._cache_dir = cache_dir
        self._count = config.worker.count
        self._environments = environments(config, device, os.environ)
        self._running: dict[int, subprocess.Popen[bytes]] = {}
        self._restarts: Counter[int] = Counter()
        self._failures = Failures(self._count)
        self._folder: Path | None = None

    def __enter__(self) -> Self:
        return self

    def start(self) -> None:
        with signals_held():
            self._folder = Path(tempfile.mkdtemp(prefix="teacher-dump-"))
        of_one = self._config.model_dump(mode="json", exclude_unset=True, exclude={"worker"})
        of_one["worker"] = {"lease_seconds": self._config.worker.lease_seconds}
        (self._folder / "config.toml").write_text(tomli_w.dumps(of_one), encoding="utf-8")
        for index in range(self._count):
            self._start(index)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with signals_held():
            if kind is None:
                self._wait(FINISHED_SECONDS)
                self._failures.say(after_seconds=0)
            for process in self._running.values():
                process.terminate()
                process.send_signal(signal.SIGCONT)  # one that is paused would not hear of it
            self._wait(FINISHED_SECONDS if kind is None else _GRACE_SECONDS)
            for process in self._running.values():
                process.kill()
                process.wait()
            if self._folder and not self._failures and not self._restarts:
                shutil.rmtree(self._folder, ignore_errors=True)

    def num_living(self) -> int:
        for index, process in list(self._running.items()):
            code = process.poll()
            if code is None:
                continue
            del self._running[index]
            if code:
                self._deal_with(index, code)
        self._failures.say()
        return len(self._running)

    def _deal_with(self, index: int, code: int) -> None:
        """Start a crashed worker again, or note why there is one less."""
        name, last = f"worker {index}/{self._count}", self._last_words(index, code)
        if last.startswith("error: "):
            self._failures.add(index, last.removeprefix("error: "))
            return
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"crashed ({last})"
        if self._restarts[index] == _MOST_RESTARTS:
            self._failures.add(
                index, f"{name} {how}, and {_MOST_RESTARTS} times before; what it said is in {self._log(index)}."
            )
            return
        self._restarts[index] += 1
        say(
            f"{name} {how}; the others take over its shards, and it is started again "
            f"({self._restarts[index]} of {_MOST_RESTARTS} times). What it said is in {self._log(index)}."
        )
        self._start(index)

    def _start(self, index: int) -> None:
        assert self._folder is not None
        command = [
            *(sys.executable, "-P", "-m", "pipeline", "teacher-dump"),  # -P: no folder named pipeline stands in the way
            *("--config", str(self._folder / "config.toml"), "--out", str(self._cache_dir)),
            *("--worker", f"{index}/{self._count}"),
        ]
        with signals_held(), self._log(index).open("ab") as log:
            self._running[index] = subprocess.Popen(
                command,
                env=self._environments[index],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log,
                process_group=0,  # Ctrl-C reaches this process alone, which ends the workers once and in order
            )

    def _wait(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        for index, process in list(self._running.items()):
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
                del self._running[index]

    def _log(self, index: int) -> Path:
        assert self._folder is not None
        return self._folder / f"worker-{index}.log"

    def _last_words(self, index: int, code: int) -> str:
        lines = self._log(index).read_text(encoding="utf-8", errors="replace").strip().splitlines()
        if code == 1:  # an expected error; libraries may say more while the process ends
            lines = [line for line in lines if line.startswith("error: ")] or lines
        return lines[-1] if lines else "it said nothing"


def environments(config: DumpConfig, device: torch.device, environment: Mapping[str, str]) -> list[dict[str, str]]:
    """The environment of each worker: GPUs of its own, and its part of the CPU's threads unless they are told."""
    count = config.worker.count or 1
    threads = str(max(1, num_cores() // count))
    found = [
        {"OMP_NUM_THREADS": threads} | dict(environment) | {"PYTHONPATH": _import_path(environment)}
        for _ in range(count)
    ]
    if device.type != "cuda":
        return found
    if config.engine.device not in ("auto", "cuda"):
        raise InputError(
            f"--device {config.engine.device} is one device, and --launcher processes gives each worker its own: leave "
            f"--device out, and say in CUDA_VISIBLE_DEVICES which GPUs to use."
        )
    told = environment.get("CUDA_VISIBLE_DEVICES")
    visible = [str(index) for index in range(torch.cuda.device_count())] if told is None else told.split(",")
    each = gpus_per_worker(config)
    if count * each > len(visible):
        raise InputError(
            f"--workers {count} with {each} GPUs each need {count * each}, and this process sees {len(visible)}: give "
            f"--workers {max(1, len(visible) // each)}."
        )
    for index, variables in enumerate(found):
        variables["CUDA_VISIBLE_DEVICES"] = ",".join(visible[index * each : (index + 1) * each])
    return found


def num_cores() -> int:
    """Of this machine, for this process."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def package_folder() -> str:
    """What to import from to have the version of this package that is at work here."""
    return str(Path(__file__).absolute().parent.parent)


def _import_path(environment: Mapping[str, str]) -> str:
    return os.pathsep.join(filter(None, [package_folder(), environment.get("PYTHONPATH")]))


def gpus_per_worker(config: DumpConfig) -> int:
    """As many as its engine spreads the teacher over."""
    return config.engine.tensor_parallel * config.engine.pipeline_parallel
