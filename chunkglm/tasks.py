"""Running tasks on the scheduler that is in force: threads of this process, or a cluster through its client.

On a cluster nothing but the tasks, small results and messages passes through client and scheduler. A task is let go as soon
as it has finished, so that a worker that dies later takes nothing with it that would be done again.
"""

from __future__ import annotations

import sys
import threading
import time
import uuid
from contextlib import contextmanager, suppress
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import dask
import dask.array
from dask.base import compute_as_if_collection
from dask.callbacks import Callback

from chunkglm.errors import ClusterError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    Progress = Callable[[int, int], None]

# dask annotates a part of what it exports.
_Array: Any = dask.array.Array
_compute_keys: Any = compute_as_if_collection

SECONDS_TO_SETTLE = 20.0
"""That are waited at most, after a failure, for tasks that workers are at."""


def active_client() -> Any | None:
    """Find the client of the cluster that dask would compute on.

    Returns
    -------
    distributed.Client or None
        By dask's own rule: what ``scheduler`` is configured to, else the client that was made last. Without looking for
        one by importing distributed, which takes longer than many a computation.
    """
    distributed: Any = sys.modules.get("distributed")
    if distributed is None or not hasattr(distributed, "get_client"):
        return None
    scheduler = dask.config.get("scheduler", None)
    if isinstance(scheduler, str) and scheduler.lower() in {"distributed", "dask.distributed"}:
        scheduler = None
    if scheduler is None:
        try:
            found = distributed.get_client()
        except ValueError:
            return None
    else:
        found = getattr(scheduler, "__self__", scheduler)
    # One for coroutines is refused by dask itself, in its words.
    return found if isinstance(found, distributed.Client) and not found.asynchronous else None


def _distributed() -> Any:
    """The package: where there is a client, it is loaded."""
    return sys.modules["distributed"]


def run_tasks(graph: Any, keys: Sequence[Any], *, progress: Progress | None = None) -> None:
    """Run tasks for what they do, on the scheduler that dask is set to.

    Parameters
    ----------
    graph : mapping
        A dask graph of arrays; it is optimized as one.
    keys : sequence
        The tasks to run, with all that they need. What they return is dropped.
    progress : callable, optional
        Called with the number of these tasks that have finished, and of all.

    Raises
    ------
    ClusterError
        If a cluster, or too many of its workers, are lost. Any other exception is that of a task.
    """
    client = active_client()
    if client is None:
        with _Counting(keys, progress):
            _compute_keys(_Array, graph, list(keys))
        return
    with _out_of_the_pool():
        futures = client.get(_Array.__dask_optimize__(graph, list(keys)), list(keys), sync=False)
        for done, _ in enumerate(_finished(client, futures), start=1):
            if progress is not None:
                progress(done, len(keys))


def run_calls(
    client: Any, function: Callable[..., Any], items: Sequence[Mapping[str, Any]]
) -> Iterator[tuple[int, Any]]:
    """Call a function on the workers of a cluster.

    Parameters
    ----------
    client : distributed.Client
    function : callable
        That can be imported there.
    items : sequence of mapping
        Arguments of each call, by their names.

    Yields
    ------
    number, result
        Of each call, as they finish. Results are small.

    Raises
    ------
    ClusterError
        See :func:`run_tasks`.
    """
    # Each is done anew, whatever was done before.
    name = f"{function.__name__.strip('_')}-{uuid.uuid4().hex}"
    futures = [
        client.submit(_call, function, dict(item), key=f"{name}-{number}")
        for number, item in enumerate(items)
    ]
    numbers = {future.key: number for number, future in enumerate(futures)}
    for future in _finished(client, futures):
        result = future.result()
        yield numbers[future.key], result


class Task(NamedTuple):
    """What is known of a task within it: the worker, and its key."""

    worker: Any
    key: Any

    def refuse_if_taken_back(self) -> None:
        """Stop a long task that nobody waits for any more.

        Raises
        ------
        ClusterError
        """
        state = self.worker.state.tasks.get(self.key)
        if state is None or state.state == "cancelled":
            raise ClusterError(
                "The task was taken back: the command that asked for it was stopped or is gone."
            )

    def tell(self, topic: str, news: Any) -> None:
        """Send a message to who listens: see :func:`listening`."""
        self.worker.log_event(topic, news)


def current_task() -> Task:
    """The task that this thread is in."""
    worker = _distributed().get_worker()
    return Task(worker, worker.get_current_task())


@contextmanager
def listening(client: Any, topic: str, hear: Callable[[Any], None]) -> Iterator[None]:
    """Call a function, from one other thread, with every message of a topic."""
    # The thread that brings them is the client's own, which may not wait for anything.
    news: SimpleQueue[tuple[Any] | None] = SimpleQueue()

    def listen() -> None:
        while (one := news.get()) is not None:
            hear(one[0])

    thread = threading.Thread(target=listen, name="chunkglm-listen", daemon=True)
    thread.start()
    client.subscribe_topic(topic, lambda event: news.put((event[1],)))
    try:
        yield
    finally:
        with suppress(OSError, RuntimeError):
            client.unsubscribe_topic(topic)
        news.put(None)
        thread.join()


def _call(function: Callable[..., Any], item: Mapping[str, Any]) -> Any:
    return function(**item)


def _finished(client: Any, futures: Sequence[Any]) -> Iterator[Any]:
    """The futures as they finish, each let go behind its turn; whatever is raised, no task goes on behind it."""
    left = {future.key: future for future in futures}
    futures = ()
    try:
        for future in _distributed().as_completed(list(left.values())):
            if future.status != "finished":
                _raise_error(future)
            yield future
            left.pop(future.key).release()
    finally:
        if left:
            _cancel(client, left)


def _raise_error(future: Any) -> None:
    try:
        future.result()
    except _distributed().KilledWorker as error:
        raise ClusterError(
            f"A task was given up: every worker that took it up was lost, {error.last_worker.address} the last of them. Mostly "
            "that is the memory limit of the machine or of the batch system: give fewer threads to a worker or more memory. "
            "What was finished is kept; run the same command again to go on."
        ) from error
    except _distributed().CancelledError as error:
        raise ClusterError(
            "The cluster was lost: its scheduler ended or let go of the work. What was finished is kept; start a scheduler and "
            "workers, and run the same command again to go on."
        ) from error


def _cancel(client: Any, left: dict[Any, Any]) -> None:
    """Take tasks back, and wait for those that workers are at, as far as these can be reached."""
    names = {key[0] if isinstance(key, tuple) else key for key in left}
    over = threading.Event()

    def settle() -> None:
        # The client may be gone, or a worker.
        with suppress(Exception):
            client.cancel(list(left.values()))
            while not over.is_set() and any(client.run(_n_at_work, names, on_error="ignore").values()):
                time.sleep(0.05)

    # In a thread, as a worker that is stopped does not answer.
    waiting = threading.Thread(target=settle, name="chunkglm-settle", daemon=True)
    waiting.start()
    waiting.join(SECONDS_TO_SETTLE)
    over.set()


def _n_at_work(names: set[Any], dask_worker: Any) -> int:
    """Number of tasks of these names that a worker is at, taken back or not."""
    tasks = dask_worker.state.executing | dask_worker.state.long_running
    # The name of a task that was fused with others has theirs in it.
    return sum(any(name in str(task.key) for name in names) for task in tasks)


@contextmanager
def _out_of_the_pool() -> Iterator[None]:
    """A task that waits for others leaves its thread to them."""
    try:
        _distributed().get_worker()
        _distributed().secede()
    except (ValueError, KeyError):
        # No task, or one that has done so already.
        yield
        return
    try:
        yield
    finally:
        _distributed().rejoin()


class _Counting(Callback):  # type: ignore[misc, unused-ignore]
    """Tells how many of some tasks of a computation in this process are finished."""

    def __init__(self, keys: Sequence[Any], progress: Progress | None) -> None:
        cast("Any", super()).__init__(posttask=self._advance)
        self._keys, self._progress = set(keys), progress
        self._done = 0

    def _advance(self, key: Any, result: Any, dsk: Any, state: Any, worker: Any) -> None:  # noqa: ARG002  (dask's signature)
        if self._progress is not None and key in self._keys:
            self._done += 1
            self._progress(self._done, len(self._keys))
