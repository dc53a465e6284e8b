"""How requests are served: again from memory, in time or not at all, and for as long as the client is there."""

from __future__ import annotations

import asyncio
import logging
import re
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import morecantile
import numpy as np
import pytest
from fakes import PATIENCE_S, Clock, fake_service, open_image, until, write_codebooks, write_images
from fastapi import Depends, FastAPI, HTTPException
from starlette.testclient import TestClient
from titiler.core.factory import TilerFactory

from geocentroids_tiler.app import create_app
from geocentroids_tiler.labels import engine as engine_module
from geocentroids_tiler.labels.service import Service
from geocentroids_tiler.tiler import GeocentroidsExtension

API = "/cog/geocentroids"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def codebooks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_codebooks(tmp_path_factory.mktemp("codebooks"))


class App:
    """An application with a fake encoder, asked by a test client or, without one, message by message."""

    def __init__(self, images: Path, codebooks: Path, **settings: Any) -> None:
        self.clock = Clock()
        self.service, self.loader = fake_service(images, codebooks, clock=self.clock, **settings)
        self.app = create_app(service=self.service)
        self.client = TestClient(self.app)
        engine = self.service.engine(self.service.codebook(None)).result(PATIENCE_S)
        self.engine, self.encoder = engine, self.loader.made["blend"]
        self.encoder.forget()
        while self.encoder.entered.acquire(blocking=False):
            pass

    def tile(self, **query: Any) -> Any:
        return self.client.get(self.path(), params={"url": "whole.tif"} | query)

    def path(self, z: int = 17) -> str:
        dataset = open_image(self.service, "whole.tif", "blend")
        west, south, east, north = dataset.geographic_bounds
        tile = morecantile.tms.get("WebMercatorQuad").tile((west + east) / 2, (south + north) / 2, z)
        return f"{API}/tiles/WebMercatorQuad/{z}/{tile.x}/{tile.y}.png"

    async def asked(
        self, path: str, gone: asyncio.Event, query: str = "url=whole.tif", client: str = "10.0.0.1"
    ) -> list[dict[str, Any]]:
        """Ask for a path as a client that goes away when it is told to; return what was sent to it."""
        sent: list[dict[str, Any]] = []
        body = [{"type": "http.request", "body": b"", "more_body": False}]

        async def receive() -> dict[str, Any]:
            if body:
                return body.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "GET",
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": query.encode(),
            "root_path": "",
            "headers": [(b"host", b"test")],
            "client": (client, 1),
            "server": ("test", 80),
        }
        await self.app(scope, receive, send)
        return sent


@pytest.fixture
def make(images: Path, codebooks: Path) -> Iterator[Callable[..., App]]:
    made: list[App] = []

    def make(**settings: Any) -> App:
        made.append(App(images, codebooks, **settings))
        return made[-1]

    yield make
    for app in made:
        app.encoder.gate.set()
        app.service.close()


class TestHotTiles:
    def test_the_same_answer_without_looking_for_a_route(
        self, make: Callable[..., App], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        app = make()
        first = app.tile()
        assert "cache" not in first.headers["server-timing"]
        monkeypatch.setattr(app.app.router, "app", None)  # what looks for routes is not reached any more
        again = app.tile()
        assert again.headers["server-timing"] == "cache;desc=hit"
        assert again.content == first.content
        different = {"server-timing", "x-request-id"}
        assert {k: v for k, v in again.headers.items() if k not in different} == {
            k: v for k, v in first.headers.items() if k not in different
        }

    def test_not_modified(self, make: Callable[..., App]) -> None:
        app = make()
        etag = app.tile().headers["etag"]
        answer = app.client.get(app.path(), params={"url": "whole.tif"}, headers={"If-None-Match": f'"x", {etag}'})
        assert answer.status_code == 304
        assert answer.headers["etag"] == etag
        assert answer.content == b""
        assert "content-type" not in answer.headers
        other = app.client.get(app.path(), params={"url": "whole.tif"}, headers={"If-None-Match": '"x"'})
        assert other.status_code == 200

    def test_for_pages_of_other_origins(self, make: Callable[..., App]) -> None:
        app = make()
        for _ in range(2):
            answer = app.client.get(app.path(), params={"url": "whole.tif"}, headers={"Origin": "https://example.com"})
            assert answer.headers["access-control-allow-origin"] == "*"

    def test_until_its_source_has_to_be_asked_again(
        self, make: Callable[..., App], images: Path, tmp_path: Path
    ) -> None:
        app = make(source_ttl_s=60)
        (images / "changing.tif").write_bytes((images / "whole.tif").read_bytes())
        first = app.tile(url="changing.tif")
        app.clock.now += 59
        assert app.tile(url="changing.tif").headers["server-timing"] == "cache;desc=hit"
        (images / "changing.tif").write_bytes((images / "hole.tif").read_bytes())
        assert app.tile(url="changing.tif").content == first.content
        app.clock.now += 1
        second = app.tile(url="changing.tif")
        assert second.headers["etag"] != first.headers["etag"]
        assert second.content != first.content
        (images / "changing.tif").unlink()
        app.clock.now += 60
        assert app.tile(url="changing.tif").status_code == 404

    def test_every_parameter_counts(self, make: Callable[..., App]) -> None:
        app = make()
        plain, merged = app.tile(), app.tile(classes=3)
        assert app.tile().content == plain.content
        assert app.tile(classes=3).content == merged.content != plain.content
        assert app.client.post(app.path(), params={"url": "whole.tif"}).status_code == 405

    def test_nothing_that_is_not_a_tile(self, make: Callable[..., App]) -> None:
        app = make(tile_cache_bytes=0)
        assert "cache" not in app.tile().headers["server-timing"]
        assert "cache" not in app.tile().headers["server-timing"], "none is kept"

    def test_dependencies_of_a_host_are_asked_each_time(self, make: Callable[..., App]) -> None:
        app = make()
        host, asked = FastAPI(), []

        def key(token: str = "") -> None:
            asked.append(token)
            if token != "secret":
                raise HTTPException(401)

        factory = TilerFactory(router_prefix="/cog", extensions=[GeocentroidsExtension(service=app.service)])
        host.include_router(factory.router, prefix="/cog", dependencies=[Depends(key)])
        client = TestClient(host)
        query = {"url": "whole.tif", "token": "secret"}
        assert client.get(app.path(), params=query).status_code == 200
        assert client.get(app.path(), params=query).headers["server-timing"].endswith("cache;desc=hit")
        assert client.get(app.path(), params={"url": "whole.tif"}).status_code == 401
        assert asked == ["secret", "secret", ""]


class TestTimingAndLog:
    def test_parts_of_a_tile(self, make: Callable[..., App]) -> None:
        timing = make().tile().headers["server-timing"]
        names = re.findall(r"(\w+);dur=\d+\.\d", timing)
        assert names == ["open", "place", "labels", "draw"]
        assert re.sub(r"\w+;dur=\d+\.\d", "", timing) == ", , , "

    def test_an_id_for_each_request(self, make: Callable[..., App]) -> None:
        app = make()
        ids = [app.client.get("/healthz").headers["x-request-id"] for _ in range(3)]
        assert len(set(ids)) == 3
        assert all(re.fullmatch(r"[0-9a-f]{16}", one) for one in ids)
        assert app.client.get("/healthz", headers={"X-Request-ID": "mine-1"}).headers["x-request-id"] == "mine-1"
        for forged in ("a b", "x" * 65, "a\tb"):
            assert app.client.get("/healthz", headers={"X-Request-ID": forged}).headers["x-request-id"] != forged

    def test_a_line_for_each_request(self, make: Callable[..., App], caplog: pytest.LogCaptureFixture) -> None:
        app = make()
        with caplog.at_level(logging.INFO, "geocentroids_tiler.access"):
            tile = app.tile(classes=3)
            app.client.get("/nothing/%0Ahere?token=secret")
        first, second = (record.getMessage() for record in caplog.records if record.name.endswith("access"))
        size = len(tile.content)
        assert re.fullmatch(
            rf"testclient GET {re.escape(app.path())} 200 {size} B \d+\.\d ms {tile.headers['x-request-id']}", first
        )
        assert "GET /nothing/%0Ahere 404 " in second, "as it came, without a line break and without the query"
        assert "secret" not in caplog.text

    def test_counted_by_status(self, make: Callable[..., App]) -> None:
        app = make()
        for path in ("/healthz", "/healthz", "/none"):
            app.client.get(path)
        samples = [s for m in app.service.meters.requests.collect() for s in m.samples if s.name.endswith("_total")]
        counted = {sample.labels["status"]: sample.value for sample in samples}
        assert (counted["200"], counted["404"]) == (2, 1)


class TestClientsThatGo:
    def test_its_windows_are_given_up(self, make: Callable[..., App]) -> None:
        app = make(read_threads=1)
        path = app.path()
        app.encoder.gate.clear()

        async def scene() -> list[dict[str, Any]]:
            gone = asyncio.Event()
            request = asyncio.create_task(app.asked(path, gone))
            await asyncio.to_thread(app.encoder.await_run)
            gone.set()
            return await asyncio.wait_for(request, PATIENCE_S)

        sent = asyncio.run(scene())
        assert sent[0]["status"] == 499
        assert app.engine.windows_given_up > 0
        assert app.service.meters.cancelled._value.get() == 1
        app.encoder.gate.set()
        until(lambda: app.engine.windows_waiting == 0)
        assert len(app.encoder.encoded) <= app.encoder.batch_windows + 1  # one that was on its way to the device
        assert app.tile().status_code == 200, "who asks next gets it"
        assert set(app.encoder.encoded.values()) == {1}

    def test_a_mate_gets_the_tile(self, make: Callable[..., App]) -> None:
        app = make()
        path = app.path()
        app.encoder.gate.clear()

        async def scene() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
            gone, never = asyncio.Event(), asyncio.Event()
            one = asyncio.create_task(app.asked(path, gone))
            two = asyncio.create_task(app.asked(path, never, client="10.0.0.2"))
            await asyncio.to_thread(app.encoder.await_run)
            gone.set()
            first = await asyncio.wait_for(one, PATIENCE_S)
            app.encoder.gate.set()
            return first, await asyncio.wait_for(two, PATIENCE_S)

        gone, stayed = asyncio.run(scene())
        assert gone[0]["status"] == 499
        assert stayed[0]["status"] == 200
        assert stayed[1]["body"] == app.tile().content
        assert set(app.encoder.encoded.values()) == {1}

    @pytest.mark.parametrize("kind", ["export", "point"])
    def test_who_asked_for_something_else(self, make: Callable[..., App], kind: str) -> None:
        app = make(read_threads=1)
        bounds = open_image(app.service, "whole.tif", "blend").geographic_bounds
        point = f"{API}/point/{(bounds[0] + bounds[2]) / 2},{(bounds[1] + bounds[3]) / 2}"
        path = f"{API}/bbox/-180,-85,180,85.png" if kind == "export" else point
        app.encoder.gate.clear()

        async def scene() -> list[dict[str, Any]]:
            gone = asyncio.Event()
            request = asyncio.create_task(app.asked(path, gone))
            await asyncio.to_thread(app.encoder.await_run)
            gone.set()
            return await asyncio.wait_for(request, PATIENCE_S)

        assert asyncio.run(scene())[0]["status"] == 499
        assert app.service.meters.cancelled._value.get() == 1
        app.encoder.gate.set()
        until(lambda: app.engine.windows_waiting == 0)
        whole = len(list(open_image(app.service, "whole.tif", "blend").footprint.chunks(3)))
        assert len(app.encoder.encoded) < whole

    def test_an_export_does_not_hold_up_the_end(self, make: Callable[..., App]) -> None:
        app = make()
        app.encoder.gate.clear()

        async def scene() -> int:
            request = asyncio.create_task(app.asked(f"{API}/bbox/-180,-85,180,85.png", asyncio.Event()))
            await asyncio.to_thread(app.encoder.await_run)
            app.service.closing.set()
            app.encoder.gate.set()
            return int((await asyncio.wait_for(request, PATIENCE_S))[0]["status"])

        assert asyncio.run(scene()) == 503

    def test_no_task_is_left(self, make: Callable[..., App]) -> None:
        app = make()
        path = app.path()

        async def scene() -> set[Any]:
            await app.asked(path, asyncio.Event())
            await asyncio.sleep(0)
            return asyncio.all_tasks() - {asyncio.current_task()}

        assert asyncio.run(scene()) == set()


class TestTooMuch:
    def busy(self, app: App, answer: Any) -> None:
        assert answer.status_code == 503
        assert answer.headers["cache-control"] == "no-store"
        assert int(answer.headers["retry-after"]) >= 1
        assert "try again" in answer.json()["detail"]

    def test_a_full_queue(self, make: Callable[..., App]) -> None:
        app = make(queue_windows=3)
        path = app.path(15)  # all of the image
        app.encoder.gate.clear()

        async def scene() -> list[dict[str, Any]]:
            gone = asyncio.Event()
            request = asyncio.create_task(app.asked(path, gone))
            await asyncio.to_thread(app.encoder.await_run)
            await asyncio.to_thread(until, lambda: app.engine.windows_waiting >= 3)
            self.busy(app, await asyncio.to_thread(app.tile))
            box = await asyncio.to_thread(
                app.client.get, f"{API}/bbox/-180,-85,180,85.png", params={"url": "whole.tif"}
            )
            self.busy(app, box)
            assert (await asyncio.to_thread(app.client.get, "/healthz")).status_code == 200
            app.encoder.gate.set()
            return await asyncio.wait_for(request, PATIENCE_S)

        assert asyncio.run(scene())[0]["status"] == 200
        assert app.tile().status_code == 200
        assert app.service.meters.rejected._value.get() == 2

    def test_a_deadline(self, make: Callable[..., App]) -> None:
        app = make(request_timeout_s=0.05, export_timeout_s=0.05)
        app.encoder.gate.clear()
        self.busy(app, app.tile())
        bounds = open_image(app.service, "whole.tif", "blend").geographic_bounds
        point = f"{API}/point/{(bounds[0] + bounds[2]) / 2},{(bounds[1] + bounds[3]) / 2}"
        self.busy(app, app.client.get(point, params={"url": "whole.tif"}))
        self.busy(app, app.client.get(f"{API}/bbox/-180,-85,180,85.tif", params={"url": "whole.tif"}))
        app.encoder.gate.set()
        until(lambda: app.engine.windows_waiting == 0)
        assert app.service.meters.timed_out._value.get() == 3


class TestBelowMinzoom:
    def test_labels_in_memory_are_shown_all_the_same(self, make: Callable[..., App]) -> None:
        app = make(tile_budget_s=1e-9)
        path = app.path(14)
        empty = app.client.get(path, params={"url": "whole.tif"})
        assert empty.headers["x-geocentroids-empty"].startswith("below-minzoom")
        dataset = open_image(app.service, "whole.tif", "blend")
        app.engine.block(dataset, dataset.footprint)
        app.encoder.forget()
        shown = app.client.get(path, params={"url": "whole.tif"})
        assert "x-geocentroids-empty" not in shown.headers
        assert np.ptp(np.frombuffer(shown.content, np.uint8)) > 0
        assert not app.encoder.runs

        plenty = make(tile_budget_s=600)
        assert plenty.client.get(path, params={"url": "whole.tif"}).content == shown.content


class TestViewports:
    def test_a_later_look_goes_first(self, make: Callable[..., App], monkeypatch: pytest.MonkeyPatch) -> None:
        app = make()
        now = [0.0]
        viewports = app.service.viewports
        monkeypatch.setattr(viewports, "_clock", lambda: now[0])
        first = viewports.rank("a", 1)
        now[0] += 0.9
        second = viewports.rank("a", 1)
        now[0] += 0.9
        third = viewports.rank("a", 1)
        assert first > second > third, "in the order they were asked for"
        assert {rank[0] for rank in (first, second, third)} == {first[0]}, "as long as one follows the other closely"
        other, zoomed = viewports.rank("b", 1), viewports.rank("a", 2)
        assert first < other < zoomed
        now[0] += 1.1
        assert viewports.rank("a", 1) > zoomed
        assert viewports.next() > viewports.rank("a", 1)

    def test_the_first_tile_of_a_burst_is_finished_first(
        self, make: Callable[..., App], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Also where its chunks need windows that no other tile asks for."""
        monkeypatch.setattr(engine_module, "READ_AHEAD_RUNS", 1000)
        app = make(batch_windows=1)
        monkeypatch.setattr(app.service.viewports, "_clock", lambda: 0.0)
        path = app.path(20)
        zoom, x = re.findall(r"/(\d+)/(\d+)/\d+\.png", path)[0]
        paths = [path.replace(f"/{zoom}/{x}/", f"/{zoom}/{int(x) + i}/") for i in (0, 1, -1)]
        app.encoder.gate.clear()

        async def scene() -> list[str]:
            finished: list[str] = []

            async def one(path: str) -> None:
                await app.asked(path, asyncio.Event())
                finished.append(path)

            requests = []
            for count, path in enumerate(paths, 1):
                requests.append(asyncio.create_task(one(path)))
                await asyncio.to_thread(until, partial(_asked, app, count))
            await asyncio.to_thread(app.encoder.await_run)
            # All windows are read and wait for the device, but the one that is on it.
            await asyncio.to_thread(until, lambda: 0 < app.engine.windows_waiting <= app.engine.device_queue + 1)
            app.encoder.gate.set()
            await asyncio.wait_for(asyncio.gather(*requests), PATIENCE_S)
            return finished

        assert asyncio.run(scene()) == paths


def _asked(app: App, count: int) -> bool:
    return sum(viewport.requests for viewport in app.service.viewports._known.values()) == count


def test_tiles_of_two_factories_share_one_cache(make: Callable[..., App]) -> None:
    app = make()
    service: Service = app.service
    cache = service.caches["tiles"]
    factory = TilerFactory(router_prefix="/two", extensions=[GeocentroidsExtension(service=service)])
    host = FastAPI()
    host.include_router(factory.router, prefix="/two")
    app.tile()
    answer = TestClient(host).get(app.path().replace("/cog/", "/two/"), params={"url": "whole.tif"})
    assert answer.headers["server-timing"].endswith("cache;desc=hit")
    assert service.caches["tiles"] is cache


def test_threads_end(images: Path, codebooks: Path) -> None:
    before = set(threading.enumerate())
    app = App(images, codebooks)
    app.tile()
    app.service.close()
    left = [thread.name for thread in set(threading.enumerate()) - before if thread.name.startswith("geocentroids")]
    assert left == []


class TestKeptLabels:
    def test_broken_ones_are_turned_away_once_and_then_computed(
        self, make: Callable[..., App], tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        app = make(labels_dir=tmp_path / "labels", tile_budget_s=1e-9)
        dataset = open_image(app.service, "whole.tif", "blend")
        codebook = app.service.codebook(None)
        assert app.service.kept is not None
        whole = app.engine.block(dataset, dataset.footprint)
        with app.service.kept.writer(dataset, codebook, app.engine.device_name) as writer:
            writer.write(whole)
            writer.finish()
        app.clock.now += 10
        low = app.path(14)
        shown = app.client.get(low, params={"url": "whole.tif"})
        assert "x-geocentroids-empty" not in shown.headers
        kept = app.service.kept.find(dataset, codebook)
        assert kept is not None
        (kept.folder / "labels.tif").write_bytes(b"II*\0 and nothing else")
        again = app.client.get(low, params={"url": "whole.tif", "classes": 5})
        assert (again.status_code, again.headers["retry-after"]) == (503, "1")
        assert app.tile(classes=5).status_code == 200
