"""What requests share: datasets and their freshness, engines, codebooks, and how all of it ends."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import (
    PATIENCE_S,
    Clock,
    Loader,
    fake_codebook,
    fake_service,
    open_image,
    until,
    write_codebooks,
    write_images,
)
from httpd import Httpd, Served, serve
from rasters import texture, write_tif

from geocentroids_tiler.codebook import save_codebook
from geocentroids_tiler.encoder import encoder_source
from geocentroids_tiler.errors import (
    CodebookNotFoundError,
    EncoderError,
    InputError,
    SourceRefusedError,
    SourceUnavailableError,
    UnsupportedImageError,
)
from geocentroids_tiler.labels import service as service_module
from geocentroids_tiler.labels.service import Service
from geocentroids_tiler.source import ReadOptions

TTL_S = 60.0


@pytest.fixture(scope="module")
def codebooks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_codebooks(tmp_path_factory.mktemp("codebooks"))


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return write_images(tmp_path / "images")


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def make(images: Path, codebooks: Path, clock: Clock) -> Iterator[Callable[..., tuple[Service, Loader]]]:
    made = []

    def make(**settings: Any) -> tuple[Service, Loader]:
        made.append(fake_service(images, codebooks, clock=clock, **({"source_ttl_s": TTL_S} | settings)))
        return made[-1]

    yield make
    for service, _ in made:
        service.close()


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the sources that were opened, in order."""
    names: list[str] = []
    original = service_module.open_dataset

    def counted(source: Any, *args: Any) -> Any:
        names.append(source.url)
        return original(source, *args)

    monkeypatch.setattr(service_module, "open_dataset", counted)
    return names


@pytest.fixture
def httpd() -> Iterator[Httpd]:
    with serve() as server:
        yield server


def tif(folder: Path, seed: int) -> bytes:
    return write_tif(folder / f"{seed}.tif", texture(140, 140, seed), photometric="RGB").read_bytes()


class TestFreshness:
    def test_an_unchanged_file_is_not_opened_again(
        self, make: Callable[..., Any], clock: Clock, opened: list[str]
    ) -> None:
        service, _ = make()
        first = open_image(service, "whole.tif")
        clock.now += 10 * TTL_S
        assert open_image(service, "whole.tif") is first
        assert opened == ["whole.tif"]

    def test_a_changed_file_is_noticed_in_time(self, make: Callable[..., Any], clock: Clock, images: Path) -> None:
        service, _ = make()
        first = open_image(service, "whole.tif")
        engine = service.engine(service.codebook(None)).result(PATIENCE_S)
        before = engine.block(first, first.footprint)
        write_tif(images / "whole.tif", texture(400, 420, seed=9), photometric="RGB")
        os.utime(images / "whole.tif", ns=(1, 1))
        clock.now += TTL_S - 0.01
        assert open_image(service, "whole.tif") is first
        clock.now += 0.01
        second = open_image(service, "whole.tif")
        assert second.identity != first.identity
        after = engine.block(second, second.footprint)
        fresh, _ = make()
        again = open_image(fresh, "whole.tif")
        expected = fresh.engine(fresh.codebook(None)).result(PATIENCE_S).block(again, again.footprint)
        np.testing.assert_array_equal(after.labels, expected.labels)
        assert not np.array_equal(after.labels[:28, :28], before.labels[:28, :28])

    def test_a_remote_source_is_asked_once_in_a_while(
        self, make: Callable[..., Any], clock: Clock, httpd: Httpd, tmp_path: Path, opened: list[str]
    ) -> None:
        service, _ = make()
        url = f"{httpd.url}/a.tif"
        httpd.files["/a.tif"] = Served(tif(tmp_path, 1), {"ETag": '"1"'})
        first = open_image(service, url)
        asked = len(httpd.requests)
        for _ in range(3):
            assert open_image(service, url) is first
        assert len(httpd.requests) == asked, "not asked again within the time"
        clock.now += TTL_S
        assert open_image(service, url) is first
        assert len(httpd.requests) == asked + 1, "asked, not opened"
        httpd.files["/a.tif"] = Served(tif(tmp_path, 2), {"ETag": '"2"'})
        clock.now += TTL_S
        second = open_image(service, url)
        assert second.identity != first.identity
        assert opened == [url, url]

    def test_no_source_is_older_than_the_time_says(
        self, make: Callable[..., Any], clock: Clock, httpd: Httpd, tmp_path: Path
    ) -> None:
        """What one codebook's dataset was told counts from when it was asked, also for another's dataset."""
        service, _ = make()
        url = f"{httpd.url}/a.tif"
        httpd.files["/a.tif"] = Served(tif(tmp_path, 1), {"ETag": '"1"'})
        first = open_image(service, url, "plain")
        httpd.files["/a.tif"] = Served(tif(tmp_path, 2), {"ETag": '"2"'})
        clock.now += TTL_S - 1
        assert open_image(service, url, "blend").identity == first.identity
        clock.now += 1
        assert open_image(service, url, "blend").identity != first.identity
        assert open_image(service, url, "plain").identity != first.identity
        assert service.identity(service.source(url)) != first.identity

    def test_a_confirmed_source_is_as_old_as_the_answer(
        self, make: Callable[..., Any], clock: Clock, httpd: Httpd, tmp_path: Path
    ) -> None:
        service, _ = make()
        url = f"{httpd.url}/a.tif"
        httpd.files["/a.tif"] = Served(tif(tmp_path, 1), {"ETag": '"1"'})
        first = open_image(service, url, "plain")
        clock.now += TTL_S
        open_image(service, url, "blend")  # asks
        httpd.files["/a.tif"] = Served(tif(tmp_path, 2), {"ETag": '"2"'})
        clock.now += TTL_S - 1
        assert open_image(service, url, "plain") is first, "confirmed by what was asked for the other"
        clock.now += 1
        assert open_image(service, url, "plain").identity != first.identity

    def test_time_zero_asks_always(
        self, make: Callable[..., Any], httpd: Httpd, tmp_path: Path, opened: list[str]
    ) -> None:
        service, _ = make(source_ttl_s=0)
        url = f"{httpd.url}/a.tif"
        httpd.files["/a.tif"] = Served(tif(tmp_path, 1), {"ETag": '"1"'})
        first = open_image(service, url)
        asked = len(httpd.requests)
        assert open_image(service, url) is first
        assert len(httpd.requests) == asked + 1

    def test_each_way_to_read_a_source_is_a_dataset(self, make: Callable[..., Any], opened: list[str]) -> None:
        service, _ = make()
        one = open_image(service, "whole.tif")
        other = open_image(service, "whole.tif", bidx=(3, 2, 1))
        assert one.key != other.key
        assert open_image(service, "whole.tif", "plain") is not one
        assert len(opened) == 3


class TestFailedSources:
    def test_a_missing_file(self, make: Callable[..., Any], images: Path) -> None:
        service, _ = make()
        (images / "whole.tif").rename(images / "other.tif")
        with pytest.raises(SourceUnavailableError):
            open_image(service, "whole.tif")
        (images / "other.tif").rename(images / "whole.tif")
        assert open_image(service, "whole.tif").width_px == 420

    @pytest.mark.parametrize("status", [403, 404, 500])
    def test_an_answer_that_is_no_success_is_remembered_for_seconds(
        self, make: Callable[..., Any], clock: Clock, httpd: Httpd, tmp_path: Path, status: int
    ) -> None:
        service, _ = make(failure_ttl_s=2)
        url = f"{httpd.url}/a.tif"
        httpd.files["/a.tif"] = Served(b"no", status=status)
        errors = []
        for _ in range(20):
            with pytest.raises(SourceUnavailableError) as caught:
                open_image(service, url)
            errors.append(caught.value)
        assert {str(error) for error in errors} == {f"cannot open {url!r}"}
        assert len({id(error) for error in errors}) == 20, "a traceback of its own for each"
        assert len(httpd.requests) == 1
        httpd.files["/a.tif"] = Served(tif(tmp_path, 1))
        clock.now += 2
        assert open_image(service, url).width_px == 140

    def test_failures_of_one_way_to_read_a_source_are_not_those_of_another(
        self, make: Callable[..., Any], images: Path
    ) -> None:
        service, _ = make()
        with pytest.raises(UnsupportedImageError, match="bidx"):
            open_image(service, "whole.tif", bidx=(7, 8, 9))
        assert open_image(service, "whole.tif").width_px == 420

    def test_a_file_that_cannot_be_read_is_tried_again(self, make: Callable[..., Any], images: Path) -> None:
        service, _ = make(source_ttl_s=0, failure_ttl_s=0)
        good = (images / "whole.tif").read_bytes()
        (images / "whole.tif").write_bytes(b"II*\0 and nothing else")
        with pytest.raises(SourceUnavailableError):
            open_image(service, "whole.tif")
        (images / "whole.tif").write_bytes(good)
        assert open_image(service, "whole.tif").width_px == 420

    def test_one_that_was_there_and_comes_back(
        self, make: Callable[..., Any], clock: Clock, httpd: Httpd, tmp_path: Path, opened: list[str]
    ) -> None:
        service, _ = make()
        url, served = f"{httpd.url}/a.tif", Served(tif(tmp_path, 1), {"ETag": '"1"'})
        httpd.files["/a.tif"] = served
        first = open_image(service, url)
        clock.now += TTL_S
        del httpd.files["/a.tif"]
        with pytest.raises(SourceUnavailableError):
            open_image(service, url)
        httpd.files["/a.tif"] = served
        clock.now += service.settings.failure_ttl_s
        assert open_image(service, url) is first
        assert opened == [url]

    def test_what_the_policy_forbids(self, make: Callable[..., Any]) -> None:
        service, _ = make()
        with pytest.raises(SourceRefusedError):
            service.dataset("/etc/passwd", ReadOptions(), service.codebook(None))


class TestSharedOpening:
    def test_stampede_opens_once(
        self, make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, opened: list[str]
    ) -> None:
        service, _ = make()
        gate = threading.Event()
        counted = service_module.open_dataset

        def blocked(*args: Any) -> Any:
            assert gate.wait(PATIENCE_S)
            return counted(*args)

        monkeypatch.setattr(service_module, "open_dataset", blocked)
        codebook = service.codebook(None)
        with ThreadPoolExecutor(10) as pool:
            waiting = list(
                pool.map(lambda _: service.dataset("whole.tif", ReadOptions(), codebook), range(40), timeout=PATIENCE_S)
            )
            assert waiting[0].cancel(), "each caller has a future of its own"
            gate.set()
            found = {id(future.result(PATIENCE_S)) for future in waiting[1:]}
        assert len(found) == 1
        assert opened == ["whole.tif"]

    def test_datasets_are_bounded_in_bytes(self, make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(service_module, "DATASET_CACHE_BYTES", 3 * 4096)
        service, _ = make()
        for bidx in ((1, 2, 3), (1, 3, 2), (2, 1, 3), (2, 3, 1), (3, 1, 2)):
            open_image(service, "whole.tif", bidx=bidx)
        assert service._datasets._cache.currsize == 3 * 4096

    def test_collars_count(self, images: Path, make: Callable[..., Any]) -> None:
        pixels = texture(400, 420, seed=1)
        pixels[:, :, :120] = 0
        write_tif(images / "collar.tif", pixels, photometric="RGB")
        service, _ = make()
        collared = open_image(service, "collar.tif")
        assert collared.collars
        cells = sum(collar.inside.size + collar.near.size for collar in collared.collars)
        assert service._datasets._cache.currsize >= cells

    def test_one_that_does_not_fit_is_answered_and_not_kept(
        self, make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, opened: list[str]
    ) -> None:
        monkeypatch.setattr(service_module, "DATASET_CACHE_BYTES", 10)
        service, _ = make()
        for _ in range(2):
            assert open_image(service, "whole.tif").width_px == 420
        assert opened == ["whole.tif"] * 2


class TestEngines:
    def test_loaded_once(self, make: Callable[..., Any]) -> None:
        service, loader = make()
        codebook = service.codebook("plain")
        assert not service.loaded(codebook)
        assert service.engines() == []
        with ThreadPoolExecutor(8) as pool:
            engines = {
                id(future.result(PATIENCE_S)) for future in pool.map(lambda _: service.engine(codebook), "abcdefgh")
            }
        assert len(engines) == 1
        assert loader.loads == 1
        assert service.loaded(codebook)
        assert [engine.codebook.name for engine in service.engines()] == ["plain"]

    def test_a_failed_load_is_tried_again_and_leaves_no_threads(self, images: Path, codebooks: Path) -> None:
        service, loader = fake_service(images, codebooks, failures=1)
        codebook = service.codebook(None)
        with pytest.raises(OSError, match="no such device"):
            service.engine(codebook).result(PATIENCE_S)
        assert not service.loaded(codebook)
        assert str(service.load_failure(codebook)) == "no such device"
        assert service.engines() == []
        service.engine(codebook).result(PATIENCE_S)
        assert loader.loads == 2
        assert service.load_failure(codebook) is None
        service.close()

    def test_a_device_that_fails_when_it_is_measured_leaves_no_threads(
        self, make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        service, _ = make()
        monkeypatch.setattr("fakes.FakeEncoder.encode", lambda *_: 1 / 0)
        before = set(threading.enumerate())
        with pytest.raises(ZeroDivisionError):
            service.engine(service.codebook(None)).result(PATIENCE_S)
        left = [thread.name for thread in set(threading.enumerate()) - before]
        assert not [name for name in left if name.startswith(("geocentroids-read", "geocentroids-device"))]

    def test_speed_is_measured(self, make: Callable[..., Any]) -> None:
        service, _ = make()
        engine = service.engine(service.codebook(None)).result(PATIENCE_S)
        assert 0 < engine.seconds_per_chunk < 10
        assert engine.windows_encoded == 0, "the measurement is not counted"

    def test_two_codebooks_do_not_mix(self, images: Path, tmp_path: Path) -> None:
        """Of one layout, so that chunks have the same indices."""
        one = fake_codebook("blend")
        two = replace(one, centroids=one.centroids[::-1].copy(), tree=None)
        for name, codebook in (("one", one), ("two", two)):
            named = replace(codebook, manifest=codebook.manifest.model_copy(update={"name": name}))
            save_codebook(named, tmp_path / "codebooks" / name, card="x")
        service, _ = fake_service(images, tmp_path / "codebooks")
        blocks = {}
        for name in ("one", "two", "one", "two"):
            dataset = open_image(service, "whole.tif", name)
            engine = service.engine(service.codebook(name)).result(PATIENCE_S)
            labels = engine.block(dataset, dataset.footprint).labels
            np.testing.assert_array_equal(blocks.setdefault(name, labels), labels)
        known = blocks["one"] < 65535
        assert known.mean() > 0.9
        np.testing.assert_array_equal(blocks["two"][known], len(one) - 1 - blocks["one"][known])
        service.close()


class TestCodebooks:
    def test_read_once(self, make: Callable[..., Any]) -> None:
        service, _ = make()
        assert service.known_codebook("plain") is None
        found = service.codebook("plain")
        assert service.codebook("plain") is found is service.known_codebook("plain")
        assert service.codebook(None).name == "blend"

    @pytest.mark.parametrize("name", ["nothing", "../plain", "/", "."])
    def test_unknown(self, make: Callable[..., Any], name: str) -> None:
        service, _ = make()
        with pytest.raises(CodebookNotFoundError, match="plain"):
            service.codebook(name)

    def test_only_the_operator_names_a_folder(self, make: Callable[..., Any], tmp_path: Path) -> None:
        elsewhere = tmp_path / "elsewhere"
        save_codebook(fake_codebook("plain"), elsewhere, card="x")
        service, _ = make(codebook=str(elsewhere))
        assert service.codebook(None).path == elsewhere
        other, _ = make()
        with pytest.raises(CodebookNotFoundError):
            other.codebook(str(elsewhere))

    def test_classes_are_cut_once(self, make: Callable[..., Any]) -> None:
        service, _ = make()
        codebook = service.codebook("plain")
        assert service.known_classes(codebook, 6) is None
        found = service.classes(codebook, 6)
        assert service.classes(codebook, 6) is found is service.known_classes(codebook, 6)
        assert len(found) == 6
        with pytest.raises(InputError):
            service.classes(codebook, 25)
        assert service.known_classes(codebook, 25) is None

    def test_the_source_of_an_encoder(self, make: Callable[..., Any]) -> None:
        service, _ = make()
        codebook = service.codebook("plain")
        source = encoder_source(codebook.manifest.encoder, codebook.manifest.preprocess, codebook.encoder_path)
        assert (source.model, source.onnx_path) == ("owner/encoder", None)
        assert (source.window_patches, source.patch_px, source.allow_download) == (8, 14, False)


class TestClosing:
    def test_running_work_is_finished_and_no_threads_are_left(self, images: Path, codebooks: Path) -> None:
        before = set(threading.enumerate())
        service, loader = fake_service(images, codebooks)
        dataset = open_image(service, "whole.tif")
        engine = service.engine(service.codebook(None)).result(PATIENCE_S)
        gate = loader.made["blend"].gate
        gate.clear()
        running = service.exporting.submit(engine.block, dataset, dataset.footprint)
        until(lambda: engine.device_queue > 0)
        closing = threading.Thread(target=service.close)
        closing.start()
        until(lambda: service.exporting._shutdown)
        gate.set()
        closing.join(PATIENCE_S)
        assert not closing.is_alive()
        assert (running.result(0).labels < 65535).any()
        assert not [t.name for t in set(threading.enumerate()) - before if t.name.startswith("geocentroids")]

    def test_afterwards_nothing_starts(self, make: Callable[..., Any]) -> None:
        service, _ = make()
        dataset = open_image(service, "whole.tif")
        engine = service.engine(service.codebook(None)).result(PATIENCE_S)
        service.close()
        with pytest.raises(EncoderError, match="shutting down"):
            engine.block(dataset, dataset.footprint)
        assert service.dataset("whole.tif", ReadOptions(), service.codebook(None)).result(0) is dataset
        with pytest.raises(RuntimeError, match="shutdown"):
            service.dataset("hole.tif", ReadOptions(), service.codebook(None)).result(PATIENCE_S)
