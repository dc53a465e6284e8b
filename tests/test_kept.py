"""Labels kept on disk: the files against rasterio, reading against the engine and numpy, and what breaks."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from click.testing import CliRunner
from fakes import Clock, fake_service, open_image, write_codebooks, write_images
from numpy.typing import NDArray
from pyproj import CRS
from rasters import texture, write_tif

from geocentroids_tiler.cli import main
from geocentroids_tiler.codebook import NODATA_LABEL
from geocentroids_tiler.commands import as_served
from geocentroids_tiler.errors import KeptLabelsError, StorageFullError
from geocentroids_tiler.grid import PatchRange
from geocentroids_tiler.labels import kept as kept_module
from geocentroids_tiler.labels.engine import LabelBlock, LabelEngine
from geocentroids_tiler.labels.file_lock import FileLock
from geocentroids_tiler.labels.kept import BROKEN_FOR_S, LOOK_EVERY_S, KeptBlock, KeptDataset, KeptLabels, kept_id
from geocentroids_tiler.labels.service import Service
from geocentroids_tiler.settings import Settings
from geocentroids_tiler.source import Dataset, ReadOptions

SIMILARITY = 1e-6
"""Averages of float32 against those of float64. Measured: 6e-8."""
DEVICE = "fake/cpu/fp64"
PLENTY_BYTES = 2**40


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def service(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    service, _ = fake_service(images, write_codebooks(tmp_path_factory.mktemp("codebooks")))
    yield service
    service.close()


@pytest.fixture(scope="module")
def engine(service: Service) -> LabelEngine:
    return service.engine(service.codebook(None)).result()


@pytest.fixture(scope="module")
def dataset(service: Service) -> Dataset:
    return open_image(service, "hole.tif")


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def kept(tmp_path: Path, clock: Clock) -> KeptLabels:
    return KeptLabels(tmp_path / "labels", PLENTY_BYTES, clock)


def keep(kept: KeptLabels, dataset: Dataset, engine: LabelEngine, block: LabelBlock | None = None) -> KeptDataset:
    """Keep labels of a dataset, in strips of an odd height."""
    block = engine.block(dataset, dataset.footprint) if block is None else block
    area = dataset.footprint
    assert block.patches == area
    with kept.writer(dataset, engine.codebook, DEVICE) as writer:
        for start in range(0, area.shape[0], 11):
            stop = min(area.shape[0], start + 11)
            part = PatchRange(area.row_start + start, area.row_start + stop, area.col_start, area.col_stop)
            writer.write(LabelBlock(part, block.labels[start:stop], block.similarity[start:stop]))
        return writer.finish()


def made_up(dataset: Dataset, shape: tuple[int, int], side: int = 1) -> tuple[Dataset, LabelBlock]:
    """Return a dataset of another size with labels in squares of ``side``, some of them without data."""
    rng = np.random.default_rng(7)
    area = PatchRange(-1754283, -1754283 + shape[0], 160011, 160011 + shape[1])
    cells = tuple(-(-size // side) for size in shape)
    labels = rng.integers(0, 5, cells).astype(np.uint16)
    labels[rng.random(cells) < 0.2] = NODATA_LABEL
    labels = labels.repeat(side, 0).repeat(side, 1)[: shape[0], : shape[1]]
    similarity = np.where(labels == NODATA_LABEL, np.nan, rng.random(shape)).astype(np.float32)
    return replace(dataset, footprint=area), LabelBlock(area, labels, similarity)


def equal_blocks(found: Any, labels: NDArray[Any], similarity: NDArray[Any]) -> None:
    np.testing.assert_array_equal(found.labels, labels)
    np.testing.assert_array_equal(found.similarity.view(np.uint32), similarity.view(np.uint32), "bit for bit")


class TestFiles:
    def test_against_rasterio(self, kept: KeptLabels, dataset: Dataset, engine: LabelEngine, service: Service) -> None:
        large, block = made_up(dataset, (700, 530))
        found = keep(kept, large, engine, block)
        assert sorted(path.name for path in found.folder.iterdir()) == ["labels.tif", "record.json", "similarity.tif"]
        assert found.folder == kept.folder / kept_id(large, engine.codebook)
        left, _, _, top = large.grid.bounds_of(large.footprint)
        for name, dtype in (("labels.tif", "uint16"), ("similarity.tif", "float32")):
            with rasterio.open(found.folder / name) as raster:
                assert raster.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
                assert raster.dtypes == (dtype,)
                assert raster.block_shapes == [(256, 256)]
                assert raster.overviews(1) == [2, 4]
                assert raster.shape == (700, 532), "whole pixels of the smallest overview"
                assert (raster.transform.a, raster.transform.e) == (3.5, -3.5)
                assert (raster.transform.c, raster.transform.f) == (left, top)
                assert CRS.from_wkt(raster.crs.to_wkt()).equals(large.grid.crs)
                assert raster.tags()["GEOCENTROIDS_SOURCE"] == "hole.tif"
                assert raster.tags()["GEOCENTROIDS_IDENTITY"] == large.identity
                assert json.loads(raster.tags()["GEOCENTROIDS_OPTIONS"]) == {"bidx": None, "rescale": None}
                assert raster.tags()["GEOCENTROIDS_DEVICE"] == DEVICE
                assert raster.tags()["GEOCENTROIDS_DIGEST"] == engine.codebook.digest
                pixels = raster.read(1)
                if name == "labels.tif":
                    assert raster.nodata == NODATA_LABEL
                    np.testing.assert_array_equal(pixels[:, :530], block.labels)
                    assert (pixels[:, 530:] == NODATA_LABEL).all()
                else:
                    assert np.isnan(raster.nodata)
                    np.testing.assert_array_equal(pixels[:, :530], block.similarity)
                    assert np.isnan(pixels[:, 530:]).all()
        assert all(path.stat().st_mode & 0o044 == 0o044 for path in [found.folder, *found.folder.iterdir()])

    def test_labels_alone(self, kept: KeptLabels, dataset: Dataset, engine: LabelEngine) -> None:
        found = keep(kept, dataset, engine)
        (found.folder / "similarity.tif").unlink()
        whole = engine.block(dataset, dataset.footprint)
        read = found.read(dataset.footprint, similarity=False)
        np.testing.assert_array_equal(read.labels, whole.labels)
        assert read.similarity.shape == whole.labels.shape
        assert np.isnan(read.similarity).all()
        with pytest.raises(KeptLabelsError):
            found.read(dataset.footprint)

    def test_record(self, kept: KeptLabels, dataset: Dataset, engine: LabelEngine) -> None:
        found = keep(kept, dataset, engine)
        record = json.loads((found.folder / "record.json").read_text())
        assert record["format"] == "geocentroids-labels/1"
        assert (record["url"], record["identity"], record["device"]) == ("hole.tif", dataset.identity, DEVICE)
        assert record["codebook"] == "blend"
        assert record["codebook_digest"] == engine.codebook.digest
        assert record["rows"] == [dataset.footprint.row_start, dataset.footprint.row_stop]
        assert record["labels_bytes"] == (found.folder / "labels.tif").stat().st_size
        assert found.footprint == dataset.footprint

    def test_the_key_depends_on_all_that_labels_depend_on(self, dataset: Dataset, service: Service) -> None:
        codebook = service.codebook(None)
        source = replace(dataset.source, url="other.tif")
        others = [
            kept_id(dataset, codebook),
            kept_id(dataset, service.codebook("plain")),
            kept_id(replace(dataset, source=source), codebook),
            kept_id(replace(dataset, identity="1-2"), codebook),
            kept_id(replace(dataset, options=ReadOptions(bidx=(3, 2, 1))), codebook),
            kept_id(replace(dataset, options=ReadOptions(rescale=(0, 9))), codebook),
        ]
        assert len(set(others)) == len(others)
        assert others[-1] == kept_id(replace(dataset, options=ReadOptions(rescale=(0.0, 9.0))), codebook)
        assert others[0] == kept_id(replace(dataset, geographic_bounds=(0.0, 0.0, 1.0, 1.0)), codebook)


def cells_of(block: KeptBlock, row: Any, col: Any) -> tuple[Any, Any]:
    """Return row and column in a block of the cells that hold patches."""
    return (row - block.patches.row_start) // block.factor, (col - block.patches.col_start) // block.factor


class TestRead:
    @pytest.mark.parametrize("image", ["whole.tif", "hole.tif", "degrees.tif"])
    def test_patches_are_what_the_engine_gives(
        self, kept: KeptLabels, service: Service, engine: LabelEngine, image: str
    ) -> None:
        dataset = open_image(service, image)
        found = keep(kept, dataset, engine)
        a = dataset.footprint
        for patches in (
            a,
            PatchRange(a.row_start + 3, a.row_start + 4, a.col_start + 5, a.col_start + 17),
            PatchRange(a.row_start - 7, a.row_stop + 9, a.col_start - 2, a.col_stop + 31),
            PatchRange(a.row_start - 7, a.row_start + 2, a.col_stop - 2, a.col_stop + 1),
            PatchRange(a.row_stop, a.row_stop + 4, a.col_start, a.col_stop),
            PatchRange(-3, 3, -5, 5),
        ):
            expected, read = engine.block(dataset, patches), found.read(patches)
            assert (read.patches, read.factor) == (patches, 1)
            equal_blocks(read, expected.labels, expected.similarity)
        assert (engine.block(dataset, a).labels != NODATA_LABEL).mean() > 0.5

    @pytest.mark.parametrize("shape", [(700, 530), (309, 40), (5, 1030)])
    def test_cells_of_one_label(
        self, kept: KeptLabels, dataset: Dataset, engine: LabelEngine, shape: tuple[int, int]
    ) -> None:
        """Squares of the largest cells: each overview has them exactly, those at the far edge too."""
        _, probe = made_up(dataset, shape)
        side = 2 ** max(0, int(np.ceil(np.log2(max(shape) / 256))))
        large, block = made_up(dataset, shape, side)
        found = keep(kept, large, engine, block)
        assert found.factors == tuple(2**i for i in range(side.bit_length()))
        assert found.factors[-1] == side > 1
        a = large.footprint
        for factor in found.factors:
            read = found.read(a, factor)
            assert (read.patches.row_start, read.patches.col_start) == (a.row_start, a.col_start)
            assert read.labels.shape == tuple(-(-size // factor) for size in shape)
            np.testing.assert_array_equal(read.labels, block.labels[::factor, ::factor])
            np.testing.assert_array_equal(np.isnan(read.similarity), read.labels == NODATA_LABEL)
        assert probe.labels.shape == shape

    def test_cells_are_the_mode_of_their_quarters(
        self, kept: KeptLabels, dataset: Dataset, engine: LabelEngine
    ) -> None:
        large, block = made_up(dataset, (1040, 777))
        found = keep(kept, large, engine, block)
        assert found.factors == (1, 2, 4, 8)
        finer = found.read(large.footprint)
        for factor in found.factors[1:]:
            read = found.read(large.footprint, factor)
            rows, cols = read.labels.shape
            shape = (2 * rows, 2 * cols)
            quarters = np.full(shape, NODATA_LABEL, np.uint16)
            averaged = np.full(shape, np.nan)
            quarters[: finer.labels.shape[0], : finer.labels.shape[1]] = finer.labels
            averaged[: finer.labels.shape[0], : finer.labels.shape[1]] = finer.similarity
            four = quarters.reshape(rows, 2, cols, 2).transpose(0, 2, 1, 3).reshape(rows, cols, 4)
            counts = (four[..., None] == four[..., None, :]).sum(axis=-1) * (four != NODATA_LABEL)
            own = np.where(four == read.labels[..., None], counts, 0).max(axis=-1)
            np.testing.assert_array_equal(own, counts.max(axis=-1))
            np.testing.assert_array_equal(read.labels == NODATA_LABEL, (four == NODATA_LABEL).all(axis=-1))
            values = averaged.reshape(rows, 2, cols, 2).transpose(0, 2, 1, 3).reshape(rows, cols, 4)
            has = ~np.isnan(values)
            with np.errstate(invalid="ignore"):
                mean = np.where(has, values, 0).sum(axis=-1) / has.sum(axis=-1)
            np.testing.assert_allclose(read.similarity, mean, atol=SIMILARITY)
            with rasterio.open(found.folder / "labels.tif", overview_level=found.factors.index(factor) - 1) as raster:
                np.testing.assert_array_equal(read.labels, raster.read(1)[:rows, :cols])
            finer = read

    @pytest.mark.parametrize("factor", [1, 2, 4])
    def test_any_rectangle_is_a_part_of_the_whole(
        self, kept: KeptLabels, dataset: Dataset, engine: LabelEngine, factor: int
    ) -> None:
        large, block = made_up(dataset, (700, 530))
        found = keep(kept, large, engine, block)
        a = large.footprint
        margin = 64
        whole = found.read(
            PatchRange(a.row_start - margin, a.row_stop + margin, a.col_start - margin, a.col_stop + margin), factor
        )
        rng = np.random.default_rng(factor)
        seen = 0
        for _ in range(40):
            row, col = rng.integers(-50, 700), rng.integers(-50, 530)
            rows, cols = rng.integers(1, 60, 2)
            patches = PatchRange(
                int(a.row_start + row),
                int(min(a.row_start + row + rows, a.row_stop + margin)),
                int(a.col_start + col),
                int(min(a.col_start + col + cols, a.col_stop + margin)),
            )
            read = found.read(patches, factor)
            assert patches == patches.intersect(read.patches)
            assert read.patches.shape == tuple(size * factor for size in read.labels.shape)
            assert max(np.subtract(read.patches.shape, patches.shape)) <= 2 * (factor - 1)
            at = np.ix_(np.arange(patches.row_start, patches.row_stop), np.arange(patches.col_start, patches.col_stop))
            here, there = cells_of(read, *at), cells_of(whole, *at)
            equal_blocks(
                LabelBlock(patches, read.labels[here], read.similarity[here]),
                whole.labels[there],
                whole.similarity[there],
            )
            seen += int((read.labels != NODATA_LABEL).sum())
        assert seen > 500

    def test_factors(self, kept: KeptLabels, dataset: Dataset, engine: LabelEngine) -> None:
        small = keep(kept, dataset, engine)
        assert small.factors == (1,)
        with pytest.raises(ValueError, match=r"factor is 2; accepted: \(1,\)"):
            small.read(dataset.footprint, 2)
        large = keep(kept, *_swap(made_up(dataset, (700, 1500)), engine))
        assert large.factors == (1, 2, 4, 8)
        assert [large.factor_for(n) for n in (0.1, 1, 3.9, 4, 7.99, 8, 16, 1e6)] == [1, 1, 1, 2, 2, 4, 8, 8]

    def test_by_several_threads(self, kept: KeptLabels, dataset: Dataset, engine: LabelEngine) -> None:
        large, block = made_up(dataset, (700, 530))
        found = keep(kept, large, engine, block)
        a = large.footprint
        parts = [PatchRange(a.row_start + i, a.row_start + i + 90, a.col_start, a.col_stop) for i in range(0, 600, 9)]
        with ThreadPoolExecutor(8) as pool:
            for part, read in zip(parts, pool.map(found.read, parts), strict=True):
                at = part.within(a)
                equal_blocks(read, block.labels[at], block.similarity[at])


def _swap(made: tuple[Dataset, LabelBlock], engine: LabelEngine) -> tuple[Dataset, LabelEngine, LabelBlock]:
    return made[0], engine, made[1]


class TestFind:
    def test_after_a_restart(
        self, kept: KeptLabels, clock: Clock, dataset: Dataset, engine: LabelEngine, service: Service
    ) -> None:
        assert kept.find(dataset, engine.codebook) is None
        made = keep(kept, dataset, engine)
        again = kept.find(dataset, engine.codebook)
        assert again is not None, "at once where it was kept"
        assert again == made
        other = KeptLabels(kept.folder, PLENTY_BYTES, clock).find(dataset, engine.codebook)
        assert other is not None
        assert (other.record, other.version) == (made.record, made.version)
        assert kept.find(dataset, service.codebook("plain")) is None
        assert kept.find(replace(dataset, identity="1-2"), engine.codebook) is None

    def test_is_cheap(
        self,
        kept: KeptLabels,
        clock: Clock,
        dataset: Dataset,
        engine: LabelEngine,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        keep(kept, dataset, engine)
        opened, looked = [], []
        load, look = kept_module.load_kept, kept_module._signature
        monkeypatch.setattr(kept_module, "load_kept", lambda *args: opened.append(args) or load(*args))
        monkeypatch.setattr(kept_module, "_signature", lambda folder: looked.append(folder) or look(folder))
        for _ in range(100):
            assert kept.find(dataset, engine.codebook) is not None
        assert (len(opened), len(looked)) == (1, 1)
        for _ in range(20):
            clock.now += LOOK_EVERY_S
            assert kept.find(dataset, engine.codebook) is not None
        assert (len(opened), len(looked)) == (1, 21), "unchanged, so not opened again"

    def test_memory_is_bounded(
        self, kept: KeptLabels, dataset: Dataset, engine: LabelEngine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for i in range(kept_module.MAX_KNOWN + 10):
            kept.find(replace(dataset, identity=str(i)), engine.codebook)
        assert len(kept._known) == kept_module.MAX_KNOWN

    def test_what_another_process_keeps_or_removes_is_seen_soon(
        self, kept: KeptLabels, clock: Clock, dataset: Dataset, engine: LabelEngine
    ) -> None:
        assert kept.find(dataset, engine.codebook) is None
        other = KeptLabels(kept.folder, PLENTY_BYTES)
        made = keep(other, dataset, engine)
        assert kept.find(dataset, engine.codebook) is None, "remembered"
        assert kept.find(dataset, engine.codebook, fresh=True) is not None
        clock.now += LOOK_EVERY_S
        assert kept.find(dataset, engine.codebook) is not None
        shutil.rmtree(made.folder)
        clock.now += LOOK_EVERY_S
        assert kept.find(dataset, engine.codebook) is None
        made = keep(other, dataset, engine)
        clock.now += LOOK_EVERY_S
        found = kept.find(dataset, engine.codebook)
        assert found is not None
        assert found.version == made.version

    def test_labels_made_anew_have_another_version(
        self, kept: KeptLabels, dataset: Dataset, engine: LabelEngine
    ) -> None:
        first = keep(kept, dataset, engine)
        shutil.rmtree(first.folder)
        assert keep(kept, dataset, engine).version != first.version


def _edit_record(folder: Path, **changes: Any) -> None:
    record = json.loads((folder / "record.json").read_text())
    (folder / "record.json").write_text(json.dumps(record | changes))


BREAKAGES: dict[str, Callable[[Path], object]] = {
    "labels cut off": lambda folder: os.truncate(folder / "labels.tif", 900),
    "a byte missing": lambda folder: os.truncate(
        folder / "similarity.tif", (folder / "similarity.tif").stat().st_size - 1
    ),
    "no similarity": lambda folder: (folder / "similarity.tif").unlink(),
    "no record": lambda folder: (folder / "record.json").unlink(),
    "not JSON": lambda folder: (folder / "record.json").write_bytes(b"\xff{"),
    "another format": lambda folder: _edit_record(folder, format="geocentroids-labels/2"),
    "a member missing": lambda folder: (folder / "record.json").write_text('{"url": "hole.tif"}'),
    "another dataset": lambda folder: _edit_record(folder, url="whole.tif"),
    "another place": lambda folder: _edit_record(folder, rows=[0, 30]),
    "not a raster": lambda folder: (folder / "labels.tif").write_bytes(bytes((folder / "labels.tif").stat().st_size)),
    "swapped": lambda folder: shutil.copy(folder / "similarity.tif", folder / "labels.tif"),
}


class TestBroken:
    @pytest.mark.parametrize("how", BREAKAGES)
    def test_counts_as_absent_and_is_told_once(
        self,
        kept: KeptLabels,
        clock: Clock,
        dataset: Dataset,
        engine: LabelEngine,
        caplog: pytest.LogCaptureFixture,
        how: str,
    ) -> None:
        made = keep(kept, dataset, engine)
        intact = made.folder.with_name("intact")
        shutil.copytree(made.folder, intact)
        BREAKAGES[how](made.folder)
        for _ in range(5):
            assert kept.find(dataset, engine.codebook) is None
            clock.now += LOOK_EVERY_S
        clock.now += BROKEN_FOR_S
        assert kept.find(dataset, engine.codebook) is None
        (told,) = caplog.records
        assert told.levelno == logging.WARNING
        assert str(made.folder) in told.getMessage()
        shutil.rmtree(made.folder)
        intact.rename(made.folder)
        clock.now += LOOK_EVERY_S
        assert kept.find(dataset, engine.codebook) is not None, "repaired"

    def test_found_and_then_unreadable(
        self,
        kept: KeptLabels,
        clock: Clock,
        dataset: Dataset,
        engine: LabelEngine,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        keep(kept, dataset, engine)
        found = kept.find(dataset, engine.codebook)
        assert found is not None
        path = found.folder / "labels.tif"
        content = path.read_bytes()
        path.write_bytes(content[:-700] + bytes([content[-700] ^ 255]) + content[-699:])
        for _ in range(3):
            with pytest.raises(KeptLabelsError, match=r"'hole\.tif' cannot be read") as error:
                found.read(dataset.footprint)
            assert str(kept.folder) not in str(error.value)
            assert kept.find(dataset, engine.codebook) is None
        assert len(caplog.records) == 1
        path.write_bytes(content)
        clock.now += BROKEN_FOR_S
        again = kept.find(dataset, engine.codebook)
        assert again is not None, "tried again after a while"
        equal_blocks(again.read(dataset.footprint), *_both(engine.block(dataset, dataset.footprint)))

    def test_is_replaced(
        self, kept: KeptLabels, dataset: Dataset, engine: LabelEngine, caplog: pytest.LogCaptureFixture
    ) -> None:
        made = keep(kept, dataset, engine)
        os.truncate(made.folder / "labels.tif", 900)
        again = keep(kept, dataset, engine)
        assert kept.find(dataset, engine.codebook) == again
        assert any("is replaced" in record.getMessage() for record in caplog.records)
        assert list(kept.folder.iterdir()) == [made.folder]


def _both(block: LabelBlock) -> tuple[NDArray[Any], NDArray[Any]]:
    return block.labels, block.similarity


class TestWriting:
    def test_a_failure_leaves_nothing(self, kept: KeptLabels, dataset: Dataset, engine: LabelEngine) -> None:
        block = engine.block(dataset, dataset.footprint)
        with suppress(ZeroDivisionError), kept.writer(dataset, engine.codebook, DEVICE) as writer:
            writer.write(block)
            raise ZeroDivisionError
        with kept.writer(dataset, engine.codebook, DEVICE) as writer:
            writer.write(block)
        assert list(kept.folder.iterdir()) == []
        assert kept.find(dataset, engine.codebook) is None

    def test_nothing_is_seen_before_it_is_complete(
        self, kept: KeptLabels, dataset: Dataset, engine: LabelEngine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen = []
        rename = Path.rename

        def spy(path: Path, target: Path) -> Path:
            beside = sorted(path.parent.parent.glob(".making-*"))
            seen.append((beside, kept.find(dataset, engine.codebook, fresh=True)))
            return rename(path, target)

        monkeypatch.setattr(Path, "rename", spy)
        keep(kept, dataset, engine)
        ((beside, found),) = seen
        assert found is None
        assert len(beside) == 2
        assert not any(path.exists() for path in beside)

    def test_the_first_to_finish_stays(self, kept: KeptLabels, dataset: Dataset, engine: LabelEngine) -> None:
        block = engine.block(dataset, dataset.footprint)
        with kept.writer(dataset, engine.codebook, DEVICE) as writer:
            writer.write(block)
            first = keep(kept, dataset, engine)
            assert writer.finish().version == first.version
        assert list(kept.folder.iterdir()) == [first.folder]

    def test_leftovers_of_the_dead_are_removed_and_work_of_the_living_is_not(
        self, kept: KeptLabels, dataset: Dataset, engine: LabelEngine
    ) -> None:
        kept.folder.mkdir()
        for name in ("dead", "living"):
            (kept.folder / f".making-{name}").mkdir()
            (kept.folder / f".making-{name}" / "labels").write_bytes(b"x")
        (kept.folder / ".making-dead.lock").touch()
        with FileLock.wait_for(kept.folder / ".making-living.lock"):
            made = keep(kept, dataset, engine)
            assert {path.name for path in kept.folder.iterdir()} == {
                made.folder.name,
                ".making-living",
                ".making-living.lock",
            }

    def test_room(self, tmp_path: Path, dataset: Dataset, engine: LabelEngine) -> None:
        rows, cols = dataset.footprint.shape
        needed = 6 * rows * cols
        kept = KeptLabels(tmp_path / "labels", needed)
        assert kept.used_bytes() == 0
        kept.check_room(dataset)
        with pytest.raises(StorageFullError, match=f"may take {needed} bytes; 1 of the {needed} bytes"):
            kept.check_room(dataset, 1)
        made = keep(kept, dataset, engine)
        used = sum(path.stat().st_size for path in made.folder.iterdir())
        assert kept.used_bytes() == used > 0
        with pytest.raises(StorageFullError, match=f"may take {needed} bytes; {used} of the {needed} bytes"):
            kept.check_room(dataset)


class TestLocks:
    def test_between_threads_and_after_removal(self, tmp_path: Path) -> None:
        path = tmp_path / "lock"
        first = FileLock.take(path)
        assert first is not None
        assert FileLock.take(path) is None
        got: list[FileLock] = []
        waiting = threading.Thread(target=lambda: got.append(FileLock.wait_for(path)))
        waiting.start()
        first.release(remove=True)
        waiting.join()
        assert path.exists(), "whoever waited has a lock that others see"
        assert FileLock.take(path) is None
        got[0].release()
        last = FileLock.take(path)
        assert last is not None
        last.release(remove=True)
        assert not path.exists()

    def test_between_processes(self, tmp_path: Path) -> None:
        path = tmp_path / "lock"
        program = (
            "import sys; from pathlib import Path; from geocentroids_tiler.labels.file_lock import FileLock\n"
            "lock = FileLock.take(Path(sys.argv[1])); print(lock is not None, flush=True); sys.stdin.read()"
        )
        with subprocess.Popen(
            [sys.executable, "-c", program, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "True\n"
            assert FileLock.take(path) is None
            process.kill()
            process.wait()
            lock = FileLock.take(path)
            assert lock is not None, "a killed process holds nothing"
            lock.release()


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image in a folder below a server's root."""
    folder = tmp_path_factory.mktemp("root") / "town"
    folder.mkdir()
    return write_tif(folder / "image.tif", texture(300, 300))


class TestClassify:
    @pytest.fixture(autouse=True)
    def _environment(self, monkeypatch: pytest.MonkeyPatch, image: Path) -> None:
        monkeypatch.setenv("GEOCENTROIDS_ROOT", str(image.parent.parent))
        monkeypatch.delenv("GEOCENTROIDS_LABELS_DIR", raising=False)

    def run(self, *arguments: object) -> str:
        result = CliRunner().invoke(main, [str(argument) for argument in arguments])
        assert result.exit_code == 0, result.output
        return result.stderr

    def found(self, image: Path, folder: Path) -> tuple[KeptDataset | None, Service]:
        """Look with the eyes of a server."""
        service = Service(Settings(root=image.parent.parent, labels_dir=folder))
        dataset = open_image(service, "town/image.tif")
        assert service.kept is not None
        return service.kept.find(dataset, service.codebook(None)), service

    def test_a_server_finds_them(self, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        folder = tmp_path / "labels"
        said = self.run("classify", image, tmp_path / "labels.tif", "--labels", folder)
        assert f"Keeping the labels of 'town/image.tif' in {folder}" in said
        kept, service = self.found(image, folder)
        service.close()
        assert kept is not None
        with rasterio.open(tmp_path / "labels.tif") as raster:
            labels = raster.read(1)
        np.testing.assert_array_equal(kept.read(kept.footprint).labels, labels)
        assert len(np.unique(labels)) > 3
        monkeypatch.setenv("GEOCENTROIDS_LABELS_DIR", str(folder))
        assert "are kept already" in self.run("classify", image)
        assert '"labels": "kept"' in CliRunner().invoke(main, ["info", str(image), "--json"]).stdout
        assert sorted(path.name for path in folder.iterdir()) == [kept.folder.name]

    def test_without_a_file(self, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("GEOCENTROIDS_LABELS_DIR", str(tmp_path / "labels"))
        self.run("classify", image)
        kept, service = self.found(image, tmp_path / "labels")
        with closing(service):
            assert kept is not None
            dataset = open_image(service, "town/image.tif")
            engine = service.engine(service.codebook(None)).result()
            expected = engine.block(dataset, dataset.footprint)
            equal_blocks(kept.read(dataset.footprint), expected.labels, expected.similarity)

    def test_merged_labels_are_not_kept(self, image: Path, tmp_path: Path) -> None:
        self.run("classify", image, tmp_path / "labels.tif", "--classes", 8, "--labels", tmp_path / "labels")
        assert not (tmp_path / "labels").exists()
        result = CliRunner().invoke(main, ["classify", str(image), "--classes", "8", "--labels", str(tmp_path)])
        assert (result.exit_code, "DST is missing" in result.stderr) == (1, True)
        result = CliRunner().invoke(main, ["classify", str(image)])
        assert (result.exit_code, "DST is missing" in result.stderr) == (1, True)

    def test_what_changed_meanwhile_is_not_kept(
        self, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        finish = LabelBlock.paste

        def touch(block: LabelBlock, *args: Any) -> None:
            os.utime(image, ns=(1, 1))
            finish(block, *args)

        monkeypatch.setattr(LabelBlock, "paste", touch)
        stat = image.stat()
        result = CliRunner().invoke(main, ["classify", str(image), "--labels", str(tmp_path / "labels")])
        os.utime(image, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        assert result.exit_code == 1
        assert "'town/image.tif' changed while it was labelled" in result.stderr
        assert list((tmp_path / "labels").iterdir()) == []

    def test_no_room(self, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("GEOCENTROIDS_LABEL_FILES_BYTES", "100")
        result = CliRunner().invoke(main, ["classify", str(image), "--labels", str(tmp_path / "labels")])
        assert result.exit_code == 1
        assert "0 of the 100 bytes for labels" in result.stderr


def test_a_file_is_named_as_the_server_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    (root / "a").mkdir(parents=True)
    outside.mkdir()
    for path in (root / "a" / "in.tif", outside / "out.tif"):
        path.touch()
    (root / "link.tif").symlink_to(root / "a" / "in.tif")
    (root / "away.tif").symlink_to(outside / "out.tif")
    (tmp_path / "alias").symlink_to(root)
    monkeypatch.chdir(root / "a")
    assert as_served(root / "a" / "in.tif", root) == (root, "a/in.tif")
    assert as_served(Path("in.tif"), root) == (root, "a/in.tif")
    assert as_served(Path("../a/in.tif"), tmp_path / "alias") == (tmp_path / "alias", "a/in.tif")
    assert as_served(root / "link.tif", root) == (root, "link.tif")
    assert as_served(outside / "out.tif", root) == (outside, "out.tif")
    assert as_served(root / "away.tif", root)[0] == outside, "a server does not follow links out of its root"
    assert as_served(root / "a" / "in.tif", None) == (root / "a", "in.tif")
