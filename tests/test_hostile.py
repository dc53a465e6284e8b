"""A server that anybody may send anything to: what it answers, and whom it never talks to."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import httpx
import pytest
from fakes import PATIENCE_S, until
from hostile_app import Attacked, attacked_server
from hostile_cases import CASES, INFO, UNREADABLE, whole_image
from hostile_servers import Listener, file, first_then, listening


@pytest.fixture(scope="module")
def attacked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Attacked]:
    with attacked_server(tmp_path_factory.mktemp("attacked")) as server:
        yield server


@pytest.mark.parametrize("name", CASES)
def test_answers_with_a_sentence_and_reaches_nobody(attacked: Attacked, name: str) -> None:
    world = attacked.world
    world.attacker.routes.clear()
    case = CASES[name](world)
    asked_before, canary_before = len(world.attacker.asked), world.canary.connections
    with httpx.Client(trust_env=False, timeout=PATIENCE_S) as client:
        answer = case.send(client, attacked.url)
    expected = case.status if isinstance(case.status, tuple) else (case.status,)
    assert answer.status_code in expected, answer.text[:500]
    assert world.canary.connections == canary_before, "the canary was reached"
    if answer.status_code != 200:
        detail = answer.json()["detail"]
        assert (case.detail or "") in detail
        assert answer.headers["cache-control"] == "no-store"
        if case.detail == UNREADABLE:
            assert detail == f"cannot open {case.url!r}", "one text for missing, forbidden and unreadable"
    if case.most_asked is not None:
        assert len(world.attacker.asked) - asked_before <= case.most_asked
    for asked in world.attacker.asked[asked_before:]:
        assert not {"authorization", "cookie", "proxy-authorization", "referer"} & set(asked.headers)
        assert asked.headers["accept-encoding"] == "identity"
        assert asked.path.endswith((".ovr", ".msk", ".aux.xml")) is False


def test_there_are_as_many_cases_as_promised() -> None:
    assert len(CASES) >= 40


def test_canary_would_be_heard(attacked: Attacked) -> None:
    """A connection to any of this machine's addresses is counted."""
    before = attacked.world.canary.connections
    for host in ("127.0.0.1", "127.0.0.2", "::1"):
        socket.create_connection((host, attacked.world.canary.port)).close()
    until(lambda: attacked.world.canary.connections >= before + 3)


@pytest.fixture(scope="module")
def patient(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Attacked]:
    """A server that waits for its sources for longer than a test takes."""
    with attacked_server(
        tmp_path_factory.mktemp("patient"), source_timeout_s=PATIENCE_S, source_total_timeout_s=2 * PATIENCE_S
    ) as server:
        yield server


@pytest.mark.parametrize("when", ["from the start", "after the header"])
@pytest.mark.parametrize("hosts", [1, 40])
def test_forty_silent_sources_hold_up_nobody(patient: Attacked, when: str, hosts: int) -> None:
    """Sources that do not answer take no thread that a good one, a local one or a health check needs."""
    world = patient.world
    late = when == "after the header"
    over = threading.Event()

    def silent_until_over(*_: object) -> bool:
        over.wait(2 * PATIENCE_S)
        return False

    with ExitStack() as stack:
        others = [stack.enter_context(listening(Listener())) for _ in range(hosts - 1)]
        servers = [world.attacker, *others]
        sources = []
        for i in range(40):
            name = f"/silent-{when}-{hosts}-{i}.tif".replace(" ", "-")
            first = file(world.good, f'"{name[1:]}"')
            servers[i % hosts].routes[name] = first_then(first, silent_until_over) if late else silent_until_over
            sources.append(f"http://127.0.0.1:{servers[i % hosts].port}{name}")
        good = stack.enter_context(listening(Listener()))
        good.routes["/good.tif"] = file(world.good, f'"{when}-{hosts}"')
        limits = httpx.Limits(max_connections=60)
        client = stack.enter_context(httpx.Client(trust_env=False, timeout=2 * PATIENCE_S, limits=limits))
        pool = stack.enter_context(ThreadPoolExecutor(40))
        stack.callback(over.set)  # before the pool is waited for, whatever happens
        path = whole_image() if late else INFO
        waiting = [pool.submit(client.get, patient.url + path, params={"url": source}) for source in sources]
        until(lambda: sum(len(server.asked) for server in servers) >= (2 if late else 1) * min(8, hosts * 8))
        for asked, url in (
            ("/healthz", None),
            (whole_image(), "whole.tif"),
            (whole_image(), f"http://127.0.0.1:{good.port}/good.tif"),
            ("/healthz", None),
        ):
            answer = client.get(patient.url + asked, params={} if url is None else {"url": url})
            assert answer.status_code == 200, answer.text
        assert [future.result().text for future in waiting if future.done()] == []
        over.set()
        assert {future.result().status_code for future in waiting} == {404}
