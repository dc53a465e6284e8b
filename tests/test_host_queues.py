"""Work on files of many hosts: none takes all threads, and everything ends."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor

import pytest
from fakes import PATIENCE_S, until

from geocentroids_tiler.labels.host_queues import HostQueues


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as pool:
        yield pool


def idle(queues: HostQueues) -> bool:
    return not queues._running and not queues._waiting


def test_no_host_has_more_than_its_share_and_the_others_go_on(pool: ThreadPoolExecutor) -> None:
    queues, gate = HostQueues(pool, 2), threading.Event()
    started: list[int] = []

    def held(number: int) -> int:
        started.append(number)
        gate.wait(PATIENCE_S)
        return number

    slow = [queues.submit("slow", lambda number=number: held(number)) for number in range(6)]  # type: ignore[misc]
    until(lambda: len(started) == 2)
    assert queues.submit("other", lambda: "other").result(PATIENCE_S) == "other"
    assert queues.submit(None, lambda: "local").result(PATIENCE_S) == "local"
    assert sorted(started) == [0, 1]
    gate.set()
    assert [future.result(PATIENCE_S) for future in slow] == list(range(6))
    until(lambda: idle(queues))


def test_an_error_ends_its_own_only(pool: ThreadPoolExecutor) -> None:
    queues = HostQueues(pool, 1)

    def fail() -> None:
        raise OSError("gone")

    futures: list[Future[object]] = [queues.submit("host", fail), queues.submit("host", lambda: 1)]
    with pytest.raises(OSError, match="gone"):
        futures[0].result(PATIENCE_S)
    assert futures[1].result(PATIENCE_S) == 1
    until(lambda: idle(queues))


@pytest.mark.parametrize("hosts", [("one", "one", "one"), ("one", "two", None)])
def test_all_end_when_the_pool_does(hosts: tuple[str | None, ...]) -> None:
    pool, gate, entered = ThreadPoolExecutor(1), threading.Event(), threading.Event()
    queues = HostQueues(pool, 1)
    futures = [queues.submit(hosts[0], lambda: entered.set() or gate.wait(PATIENCE_S))]
    futures += [queues.submit(host, lambda: None) for host in hosts[1:]]
    assert entered.wait(PATIENCE_S)
    pool.shutdown(wait=False, cancel_futures=True)
    gate.set()
    assert futures[0].result(PATIENCE_S)
    for future in futures[1:]:
        with pytest.raises((CancelledError, RuntimeError)):
            future.result(PATIENCE_S)
    with pytest.raises(RuntimeError, match="shutdown"):
        queues.submit("late", lambda: None).result(PATIENCE_S)
    until(lambda: idle(queues))
