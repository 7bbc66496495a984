"""A real cluster on this machine: a scheduler and workers, processes that speak TCP, each in a folder of its own."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

ROOT = Path(__file__).parents[1]


class Cluster:
    """Processes of a scheduler and its workers."""

    def __init__(self, folder, worker_ttl):
        self.folder, self.processes = folder, {}
        self.environment = {
            **os.environ,
            # The package under test, from wherever these processes run.
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]),
            "DASK_DISTRIBUTED__SCHEDULER__WORKER_TTL": worker_ttl,
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
        }
        words = ["--host", "127.0.0.1", "--port", "0", "--dashboard-address", "127.0.0.1:0"]
        words += ["--scheduler-file", str(folder / "scheduler.json"), "--preload", "count_bytes"]
        self.scheduler = self._start("scheduler", "distributed.cli.dask_scheduler", words)
        self._wait_for((folder / "scheduler.json").is_file)
        self.address = json.loads((folder / "scheduler.json").read_text())["address"]

    def _start(self, name, module, words):
        place = self.folder / name
        place.mkdir(exist_ok=True)
        with (place / "log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-W", "ignore", "-m", module, *words],
                cwd=place,
                env=self.environment,
                stdout=log,
                stderr=log,
            )

    def _wait_for(self, condition, seconds=60):
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, self.logs()
            time.sleep(0.02)

    def start_worker(self, name, n_threads=1):
        """A worker without a nanny, so that the process that is killed is the one that works."""
        words = [
            self.address,
            "--host",
            "127.0.0.1",
            "--nthreads",
            str(n_threads),
            "--no-nanny",
            "--no-dashboard",
        ]
        words += ["--name", f"{name}-{time.monotonic_ns()}", "--memory-limit", "0", "--death-timeout", "60"]
        words += ["--local-directory", str(self.folder / name)]
        self.processes[name] = self._start(name, "distributed.cli.dask_worker", words)

    def signal(self, name, which):
        self.processes[name].send_signal(which)

    def logs(self):
        return "\n".join(
            f"--- {log.parent.name}\n{log.read_text()[-3000:]}" for log in self.folder.glob("*/log")
        )

    def stop(self):
        for process in [*self.processes.values(), self.scheduler]:
            with suppress(ProcessLookupError):
                process.send_signal(signal.SIGCONT)
            process.kill()
        for process in [*self.processes.values(), self.scheduler]:
            process.wait()


@contextmanager
def cluster_of(folder, n_workers=3, *, n_threads=1, worker_ttl="5 minutes"):
    """A scheduler with so many worker processes; ``folder`` is theirs, each has one below it as its working directory."""
    folder.mkdir(parents=True, exist_ok=True)
    cluster = Cluster(folder, worker_ttl)
    try:
        for number in range(n_workers):
            cluster.start_worker(f"worker-{number}", n_threads)
        yield cluster
    finally:
        cluster.stop()
