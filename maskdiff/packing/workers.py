"""Worker processes, started afresh: a map over jobs whose results come in order, whatever the number of processes.

Not multiprocessing: its spawned processes import the main module again, so they would load PyTorch once each, and a
script without an `if __name__ == "__main__"` would start itself over and over. Never forked: OpenMP hangs then.
"""

import os
import pickle
import queue
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from maskdiff.errors import UserError

Job = TypeVar("Job")
Result = TypeVar("Result")

_START = "import sys; sys.path[:] = sys.argv[1:]; from maskdiff.packing.worker_main import serve; serve()"


def available() -> int:
    """The number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def ordered_map(
    function: Callable[[Job], Result],  # of a module that is cheap to import
    jobs: Iterable[Job],
    workers: int,
) -> Iterator[Result]:
    """Applies a function to every job, in `workers` processes; yields the results in the order of the jobs.

    With one worker everything runs in this process. Raises UserError where a process dies.
    """
    if workers <= 1:
        yield from map(function, jobs)
        return
    processes: list[subprocess.Popen] = []
    idle: queue.SimpleQueue[subprocess.Popen] = queue.SimpleQueue()
    pending: deque[Future] = deque()

    def call(job: Job) -> Any:
        process = idle.get()
        try:
            return _ask(process, function, job)
        finally:
            idle.put(process)

    with ThreadPoolExecutor(workers) as threads:  # one thread waits for each process
        try:
            for _ in range(workers):
                processes.append(_start())
                idle.put(processes[-1])
            for job in jobs:
                pending.append(threads.submit(call, job))
                if len(pending) > 3 * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
            for process in processes:
                process.kill()
                process.communicate()


def _start() -> subprocess.Popen:
    paths = [os.path.abspath(path) for path in sys.path]
    env = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    # a session of its own: Ctrl-C reaches this process alone, which then ends the workers
    return subprocess.Popen(
        [sys.executable, "-c", _START, *paths],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=env,
        start_new_session=True,
    )


def _ask(process: subprocess.Popen, function: Callable[[Job], Result], job: Job) -> Result:
    assert process.stdin is not None and process.stdout is not None
    try:
        pickle.dump((function, job), process.stdin, protocol=5)
        process.stdin.flush()
        good, result = pickle.load(process.stdout)
    except (EOFError, BrokenPipeError, pickle.UnpicklingError):
        status = process.wait()
        hint = "out of memory? use fewer workers" if status == -9 else "see above"
        raise UserError(f"a worker process ended with status {status} ({hint})") from None
    if not good:
        raise RuntimeError(f"a worker process failed:\n{result}")
    return result
