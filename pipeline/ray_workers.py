"""Workers of a dump as actors of a Ray cluster. Ray places and restarts them; the leases share out the shards."""

import math
import os
import socket
from contextlib import chdir, suppress
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

from cache_schema.errors import CacheError
from cache_schema.lease_files import LEASES_NAME
from pipeline.processes import FINISHED_SECONDS, Failures, gpus_per_worker, package_folder
from pipeline.progress import say
from pipeline.stopping import signals_held, sigterm_handler_kept
from workers.errors import InputError
from workers.teacher.config import DumpConfig
from workers.teacher.directory import finished_manifest
from workers.teacher.dump import Worker

_MOST_RESTARTS = 3
"""Of one actor; while one starts again, the others take over its shards."""
_CONNECT_SECONDS = 10.0


class RayWorkers:
    """Ended by leaving the context, whatever of them has been started.

    Raises:
        InputError: Ray is not installed.
    """

    def __init__(self, config: DumpConfig, cache_dir: Path) -> None:
        try:
            self._ray: Any = import_module("ray")
        except ImportError:
            raise InputError("--launcher ray needs Ray: pip install 'logit-cache[ray]'.") from None
        assert config.worker.count is not None
        self._config = config
        self._cache_dir = cache_dir.absolute()
        self._count = config.worker.count
        self._address = config.worker.ray_address or os.environ.get("RAY_ADDRESS") or "local"
        self._marker = self._cache_dir / LEASES_NAME / f"launched-by-{os.getpid()}-on-{socket.gethostname()}"
        self._actors: list[Any] = []
        self._running: dict[Any, int] = {}
        self._failures = Failures(self._count)

    def __enter__(self) -> Self:
        return self

    def start(self) -> None:
        """Start the actors; Ray may let some wait for a place.

        Raises:
            InputError: the cluster does not answer, or does not have what the workers take.
        """
        self._connect()
        demand = self._demand()
        try:
            actor = self._ray.remote(DumpActor).options(
                max_restarts=_MOST_RESTARTS, max_task_retries=_MOST_RESTARTS, **demand
            )
        except ValueError as error:
            raise InputError(
                f"Ray refuses what each worker is to take ({error}): see worker.ray_cpus, worker.ray_gpus and "
                f"worker.ray_resources."
            ) from None
        with signals_held():
            self._start(actor)

    def _start(self, actor: Any) -> None:
        self._marker.parent.mkdir(parents=True, exist_ok=True)
        self._marker.touch()
        text = self._config.model_dump_json(exclude_unset=True, exclude={"worker"})
        lease_seconds = self._config.worker.lease_seconds
        for index in range(self._count):
            self._actors.append(actor.remote())
            task = self._actors[index].dump.remote(
                text, str(self._cache_dir), str(self._marker), str(Path.cwd()), index, self._count, lease_seconds
            )
            self._running[task] = index

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with signals_held():
            if kind is None:
                self._ended(FINISHED_SECONDS)
                self._failures.say(after_seconds=0)
            for task in self._running:
                self._ray.cancel(task)  # else Ray says that it tries again
            for actor in self._actors:
                self._ray.kill(actor, no_restart=True)
            self._ray.shutdown()
            if self._actors:
                self._remove_marker()

    def _remove_marker(self) -> None:
        self._marker.unlink(missing_ok=True)
        for folder in (self._marker.parent, self._cache_dir):
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()

    def num_living(self) -> int:
        for task in self._ended(0):
            self._look_at(task, self._running.pop(task))
        self._failures.say()
        return len(self._running)

    def _look_at(self, task: Any, index: int) -> None:
        try:
            reason: str | None = self._ray.get(task)
        except self._ray.exceptions.RayActorError:
            reason = f"its process died {_MOST_RESTARTS + 1} times; Ray's logs say why."
        except self._ray.exceptions.RayTaskError as error:
            reason = f"it crashed ({error.cause!r}); Ray's logs say where."
        if reason is not None:
            self._failures.add(index, reason)

    def _ended(self, timeout: float) -> list[Any]:
        if not self._running:
            return []
        ended, _ = self._ray.wait(list(self._running), num_returns=len(self._running), timeout=timeout)
        return list(ended)

    @property
    def _is_own(self) -> bool:
        return self._address == "local"

    def _connect(self) -> None:
        _require_answer(self._address)
        # Ray counts CPUs and does not bind them: more workers than cores share them, and none waits for a place.
        num_cpus = max(os.cpu_count() or 1, math.ceil(self._count * self._config.worker.ray_cpus))
        of_its_own = {"num_cpus": num_cpus, "include_dashboard": False} if self._is_own else {}
        try:
            # Actors import from the folder that is current here before they look elsewhere.
            with sigterm_handler_kept(), chdir(package_folder()):
                self._ray.init(self._address, log_to_driver=False, logging_level="ERROR", **of_its_own)
        except (ConnectionError, RuntimeError, ValueError) as error:
            place = "on this machine" if self._is_own else f"at {self._address}"
            raise InputError(f"no Ray cluster {place} ({error}): see worker.ray_address and RAY_ADDRESS.") from None

    def _demand(self) -> dict[str, Any]:
        """What each actor takes of the cluster; says so where there is not enough for all of them yet."""
        worker, there = self._config.worker, self._ray.cluster_resources()
        gpus, others = worker.ray_gpus, worker.ray_resources or {}
        if gpus is None:
            uses_one = self._config.engine.device != "cpu" and there.get("GPU", 0) > 0
            gpus = float(gpus_per_worker(self._config)) if uses_one else 0.0
        for name, each in {"CPU": worker.ray_cpus, "GPU": gpus, **others}.items():
            if each * self._count <= there.get(name, 0):
                continue
            taken = f"{self._count} workers take {each * self._count:g} {name} of the Ray cluster"
            if self._is_own:
                raise InputError(
                    f"{taken}, which is this machine alone and has {there.get(name, 0):g}: lower --workers or what "
                    f"each takes (worker.ray_gpus, worker.ray_resources), or give worker.ray_address."
                )
            say(f"{taken}, which has {there.get(name, 0):g}: some wait until it has more.")
        return {"num_cpus": worker.ray_cpus, "num_gpus": gpus, "resources": others}


def _require_answer(address: str) -> None:
    """Ask first whether anything listens there: Ray itself tries for minutes."""
    try:
        parts = urlsplit(address if "://" in address else f"//{address}")
        place = parts.hostname, parts.port
    except ValueError:
        return
    if place[0] is None or place[1] is None:  # "auto" and the like, which Ray looks up
        return
    try:
        socket.create_connection((place[0], place[1]), timeout=_CONNECT_SECONDS).close()
    except OSError as error:
        raise InputError(f"no Ray cluster at {address} ({error}): see worker.ray_address and RAY_ADDRESS.") from None


class DumpActor:
    """One worker. Its process is Ray's, on whatever node Ray chose."""

    def dump(
        self, config: str, cache_dir: str, marker: str, folder: str, index: int, count: int, lease_seconds: float
    ) -> str | None:
        """Dump until the cache is finished; what a user can cause and cure is returned, for all else is a crash.

        Args:
            config: of the dump, as JSON.
            marker: a file that the launcher made in the cache directory.
            folder: where the launcher was started; relative paths are of there.
        """
        from pipeline.teacher_dump import prepare, run

        with suppress(OSError):  # where it is not there, a relative path is refused when it is read
            os.chdir(folder)
        settled, out = DumpConfig.model_validate_json(config), Path(cache_dir)
        try:
            if finished_manifest(out) is None and not Path(marker).exists():
                return (
                    f"{cache_dir} on {socket.gethostname()} is not the directory the launcher sees: give --out on a "
                    f"file system that all nodes of the Ray cluster share."
                )
            run(prepare(settled), settled, out, Worker(index, count, lease_seconds))
        except (CacheError, InputError) as error:
            return str(error)
        return None
