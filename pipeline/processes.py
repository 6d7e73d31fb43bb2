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

import tomli_w
import torch

from pipeline.progress import say
from workers.errors import InputError
from workers.teacher.config import DumpConfig

_MOST_RESTARTS = 3
"""Of one worker. One that crashed may have met a passing fault, and its GPU should not idle for the rest of the dump;
one that ended with an ``error:`` would say the same again and is not restarted."""
_GRACE_SECONDS = 20.0


class ProcessWorkers:
    """Started by entering, ended by leaving the context.

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
        self._failures: list[str] = []
        self._folder = Path()

    def __enter__(self) -> "ProcessWorkers":
        self._folder = Path(tempfile.mkdtemp(prefix="teacher-dump-"))
        of_one = self._config.model_dump(mode="json", exclude_unset=True, exclude={"worker"})
        of_one["worker"] = {"lease_seconds": self._config.worker.lease_seconds}
        (self._folder / "config.toml").write_text(tomli_w.dumps(of_one), encoding="utf-8")
        for index in range(self._count):
            self._start(index)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self._wait()
        for process in self._running.values():
            process.terminate()
        self._wait()
        for process in self._running.values():
            process.kill()
            process.wait()
        if not self._failures and not self._restarts:
            shutil.rmtree(self._folder, ignore_errors=True)

    def num_living(self) -> int:
        for index, process in list(self._running.items()):
            code = process.poll()
            if code is None:
                continue
            del self._running[index]
            if code:
                self._deal_with(index, code)
        if not self._running and len(self._failures) == self._count:
            raise InputError(self._failures[0])
        return len(self._running)

    def _deal_with(self, index: int, code: int) -> None:
        """Start a crashed worker again, or note why there is one less."""
        name, last = f"worker {index}/{self._count}", self._last_words(index)
        if last.startswith("error: "):
            self._fail(name, last.removeprefix("error: "))
            return
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"crashed ({last})"
        if self._restarts[index] == _MOST_RESTARTS:
            self._fail(name, f"{name} {how}, and {_MOST_RESTARTS} times before; what it said is in {self._log(index)}.")
            return
        self._restarts[index] += 1
        say(
            f"{name} {how}; the others take over its shards, and it is started again "
            f"({self._restarts[index]} of {_MOST_RESTARTS} times). What it said is in {self._log(index)}."
        )
        self._start(index)

    def _fail(self, name: str, reason: str) -> None:
        if self._running and reason not in self._failures:
            say(f"{name} stopped, the others go on: {reason}")
        self._failures.append(reason)

    def _start(self, index: int) -> None:
        command = [
            *(sys.executable, "-P", "-m", "pipeline", "teacher-dump"),  # -P: no folder named pipeline stands in the way
            *("--config", str(self._folder / "config.toml"), "--out", str(self._cache_dir)),
            *("--worker", f"{index}/{self._count}"),
        ]
        with self._log(index).open("ab") as log:
            self._running[index] = subprocess.Popen(
                command,
                env=self._environments[index],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log,
                process_group=0,  # Ctrl-C reaches this process alone, which ends the workers once and in order
            )

    def _wait(self) -> None:
        deadline = time.monotonic() + _GRACE_SECONDS
        for index, process in list(self._running.items()):
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
                del self._running[index]

    def _log(self, index: int) -> Path:
        return self._folder / f"worker-{index}.log"

    def _last_words(self, index: int) -> str:
        lines = self._log(index).read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return lines[-1] if lines else "it said nothing"


def environments(config: DumpConfig, device: torch.device, environment: Mapping[str, str]) -> list[dict[str, str]]:
    """The environment of each worker: GPUs of its own, and its part of the CPU's threads unless they are told."""
    count = config.worker.count or 1
    threads = str(max(1, len(os.sched_getaffinity(0)) // count))
    found = [{"OMP_NUM_THREADS": threads} | dict(environment) for _ in range(count)]
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


def gpus_per_worker(config: DumpConfig) -> int:
    """As many as its engine spreads the teacher over."""
    return config.engine.tensor_parallel * config.engine.pipeline_parallel
