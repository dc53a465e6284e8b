"""From any images to COGs on the ground grid, which fitting and serving read without resampling them again."""

from __future__ import annotations

import fcntl
import json
import math
import multiprocessing
import os
import shutil
import signal
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import chain, count
from pathlib import Path
from typing import Any, cast

import rasterio
from pydantic import ValidationError
from pyproj import CRS
from rasterio.errors import NotGeoreferencedWarning
from tqdm import tqdm

from geocentroids_fit.files import digest_of, write_json
from geocentroids_fit.ground_cog import (
    COG_OPTIONS,
    GDAL_ERRORS,
    GDAL_OPTIONS,
    PATCH_PX,
    Compress,
    Recipe,
    detail,
    place_image,
    reading,
    write_cog,
    writing,
)
from geocentroids_fit.images import leave_out
from geocentroids_tiler.codebook import PreprocessSection, validation_problems
from geocentroids_tiler.errors import GeocentroidsError, InputError, SourceUnavailableError, UnsupportedImageError
from geocentroids_tiler.source import Dataset, ReadOptions, Source, source_identity

REPORT_FILE = "prepare.json"
RUNNING = "running"
"""A file in the folder of work: where it is gone, workers stop. Removing one works on a full disk too."""
FORMAT = "geocentroids-prepared/1"
"""To be raised when the same image and parameters give other pixels: all images are then prepared anew."""
TAG = "GEOCENTROIDS_PREPARED"
"""Of an output: the digest of all that it depends on, and its line of the report."""
_FORMATS = (
    "bil bip bmp bsq ecw ers gif gpkg gtif gtiff img j2k jp2 jpeg jpg jpx kap mbtiles mrf nitf ntf pix png ppm sid "
    "tif tiff vrt webp"
)
SUFFIXES = frozenset(f".{name}" for name in _FORMATS.split())
"""Of formats in which GDAL reads RGB imagery."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """An image that was prepared.

    Attributes:
        name: of the image, relative to the folder.
        output: of the COG, relative to the folder of outputs.
        identity: of the image's content: modification time and size of its file, and of those beside it.
        width_px: columns of the COG.
        height_px: rows of it.
        gsd_before_m: metres on the ground per pixel of the image.
        crs_before: CRS of the image.
        crs: CRS of the COG.
        resampling: from the image's pixels to the COG's.
    """

    name: str
    output: str
    identity: str
    width_px: int
    height_px: int
    gsd_before_m: float
    crs_before: str
    crs: str
    resampling: str


@dataclass(frozen=True, slots=True)
class Skipped:
    """An image that could not be prepared, and why, in one sentence."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class PrepareReport:
    """What became of a folder of images, in the order of their names.

    Attributes:
        prepared: images that have a COG now.
        skipped: images that have none.
        reused: how many COGs had been finished by an earlier run.
    """

    prepared: tuple[Prepared, ...]
    skipped: tuple[Skipped, ...]
    reused: int


class _StoppedError(Exception):
    """The run has ended while this image was under way."""


_Result = tuple[Prepared | Skipped, bool]
"""What became of an image, and whether an earlier run had finished it."""


def prepare(
    folder: Path,
    out: Path,
    *,
    exclude: Sequence[str] = (),
    gsd_m: float = 0.25,
    compress: Compress = "jpeg",
    bidx: tuple[int, int, int] | None = None,
    rescale: tuple[float, float] | None = None,
    workers: int | None = None,
    progress: bool = True,
    say: Callable[[str], object] = lambda line: None,
) -> PrepareReport:
    """Turn every image below a folder into a COG of one gsd on the ground grid, with a mask that says what is data.

    Files with the suffix of an image format are images, other files and hidden ones are ignored. An image that cannot
    be used is skipped; ``prepare.json`` in ``out`` says why. Outputs appear when they are complete, and one whose image
    and parameters are still the same is kept, so a run that was ended goes on where it was.

    Args:
        folder: images in any format that GDAL reads, at any depth.
        out: where the COGs go, under the names of the images; created if need be.
        exclude: patterns such as ``*/mask/*``; a path relative to ``folder`` that matches one is left out.
        gsd_m: metres on the ground per pixel of the COGs.
        compress: ``jpeg`` (YCbCr, quality 90) or ``lossless``.
        bidx: bands (from 1) of red, green and blue; None: by their colour interpretation.
        rescale: values that become 0 and 255; None: only 8-bit images are used.
        workers: processes, each with one image at a time; None: one per CPU. 1 starts none. More are started afresh,
            so a script calls this under ``if __name__ == "__main__"``.
        progress: whether a progress bar is drawn.
        say: told in one line about each image that is skipped, and each COG that has no image any more.

    Raises:
        InputError: if there is no image, a parameter cannot be used, or the disk is full.
    """
    _check_folders(folder, out)
    recipe = _recipe(gsd_m, compress, ReadOptions(bidx, rescale))
    if workers is not None and workers < 1:
        raise InputError(f"workers is {workers}; it must be at least 1")
    names = list_rasters(folder, exclude)
    outputs = output_names(names)
    results = {}
    with _work_folder(out) as work, tqdm(total=len(names), unit="image", disable=not progress) as bar:
        run = _Run(folder.resolve(), out, work, recipe)
        for name, result in _results(run, outputs, min(workers or os.cpu_count() or 1, len(names))):
            results[name] = result
            bar.update()
    images = [results[name][0] for name in names]
    report = PrepareReport(
        prepared=tuple(image for image in images if isinstance(image, Prepared)),
        skipped=tuple(image for image in images if isinstance(image, Skipped)),
        reused=sum(reused for _, reused in results.values()),
    )
    content = {"format": FORMAT, "parameters": recipe.parameters, **asdict(report)}
    content.pop("reused")  # the same images give the same file, however many runs they took
    write_json(out / REPORT_FILE, content)
    for skipped in report.skipped:
        say(f"{skipped.name}: skipped: {skipped.reason}")
    for path in sorted(set(out.rglob("*.tif")) - {out / image.output for image in report.prepared}):
        say(f"{path}: is not made of any of these images; remove it if it should not be fitted on")
    return report


def list_rasters(folder: Path, exclude: Sequence[str] = ()) -> list[str]:
    """Return the images below a folder, as sorted paths relative to it.

    Raises:
        InputError: if there is no such folder or no image is left.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; name a folder of images")
    paths = (path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    found = sorted(path.relative_to(folder).as_posix() for path in paths)
    shown = [name for name in found if not any(part.startswith(".") for part in Path(name).parts)]
    for name in shown:
        if not name.isprintable():  # GDAL opens UTF-8 only, and a report has lines
            raise InputError(f"{folder} holds {name!r}, a name with control characters or not in UTF-8; rename it")
    hint = f"images are files that end in {' '.join(sorted(SUFFIXES))}"
    return leave_out(folder, shown, exclude, "image", hint)


def output_names(names: Iterable[str]) -> dict[str, str]:
    """Return for each image the name of its COG: its own with the suffix ``.tif``, or ``a.png.tif`` beside ``a.tif``.

    Names differ in more than upper and lower case, which not every disk tells apart.
    """
    taken: set[str] = set()
    outputs = {}
    for name in sorted(names, key=lambda name: (not name.endswith(".tif"), name)):
        candidates = chain([Path(name).with_suffix(".tif").as_posix()], (f"{name}{'_' * n}.tif" for n in count()))
        outputs[name] = next(candidate for candidate in candidates if candidate.lower() not in taken)
        taken.add(outputs[name].lower())
    return outputs


def _check_folders(folder: Path, out: Path) -> None:
    inner, outer = out.resolve(), folder.resolve()
    if inner.is_relative_to(outer) or outer.is_relative_to(inner):
        raise InputError(f"{out} and {folder} lie inside each other; choose a folder of outputs apart from the images")


def _recipe(gsd_m: float, compress: Compress, options: ReadOptions) -> Recipe:
    if compress not in COG_OPTIONS:
        raise InputError(f"compress is {compress!r}; accepted: {' or '.join(COG_OPTIONS)}")
    if options.rescale is not None and not -math.inf < options.rescale[0] < options.rescale[1] < math.inf:
        raise InputError(f"rescale is {options.rescale}; the first value must be below the second")
    try:
        preprocess = PreprocessSection(gsd_m=gsd_m, window_patches=1, margin_patches=0, stride_patches=1)
    except ValidationError as error:
        raise InputError(f"images cannot be prepared: {validation_problems(error)}") from error
    return Recipe(preprocess, compress, options)


@contextmanager
def _work_folder(out: Path) -> Iterator[Path]:
    """Yield an empty folder inside ``out`` for this run alone; what a killed run left in it is removed."""
    work = out / ".prepare"
    with writing(out):
        work.mkdir(parents=True, exist_ok=True)
        lock = (work / "lock").open("w")
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"another run prepares images into {out}; wait for it or choose another folder") from error
        for left in work.iterdir():
            if left.is_dir():
                shutil.rmtree(left)
        try:
            with writing(out):
                (work / RUNNING).touch()
            yield work
        finally:
            shutil.rmtree(work, ignore_errors=True)


def _results(run: _Run, outputs: dict[str, str], workers: int) -> Iterator[tuple[str, _Result]]:
    """Yield each image with what became of it, as it is finished; the first failure to write ends the run.

    Workers are processes because threads share GDAL's cache of blocks: one flushes what another has written, takes the
    blame for a full disk, or waits for it for ever.
    """
    if workers == 1:
        yield from ((name, run.image(name, output)) for name, output in outputs.items())
        return
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker) as pool:
        futures = {pool.submit(run.image, name, output): name for name, output in outputs.items()}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BrokenProcessPool as error:
            raise InputError(
                "a worker was ended from outside, perhaps because memory ran out; run the same command again with "
                "fewer workers; finished images are kept"
            ) from error
        finally:
            (run.work / RUNNING).unlink(missing_ok=True)
            pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    """End this process when the run does, however it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if parent := multiprocessing.parent_process():

        def follow() -> None:
            parent.join()
            os._exit(1)

        threading.Thread(target=follow, daemon=True).start()


@dataclass(frozen=True)
class _Run:
    """What the images of a run have in common."""

    folder: Path
    out: Path
    work: Path
    recipe: Recipe

    def image(self, name: str, output: str) -> _Result:
        """Prepare an image unless that is done."""
        try:
            with rasterio.Env(**GDAL_OPTIONS), warnings.catch_warnings():
                warnings.simplefilter("ignore", NotGeoreferencedWarning)  # it is why the image will be skipped
                with reading():
                    raster = rasterio.open(self.folder / name)
                with raster:
                    return self._opened(raster, name, output)
        except (SourceUnavailableError, UnsupportedImageError) as error:
            if _tag_of(self.out / output):
                (self.out / output).unlink()  # made of what the image was before
            return Skipped(name, _reason(error)), False

    def _opened(self, raster: Any, name: str, output: str) -> _Result:
        target = self.out / output
        identity = ";".join(source_identity(Source(file, Path(file))) for file in raster.files)
        key = digest_of([FORMAT, self.recipe.parameters, name, output, identity])
        if done := _finished(target, key):
            return done, True
        dataset = place_image(raster, self.folder / name, name, identity, self.recipe)
        record = _record(dataset, name, output)
        tags = {TAG: json.dumps({"key": key, **asdict(record)})}
        with writing(target), tempfile.TemporaryDirectory(dir=self.work) as own:
            write_cog(raster, dataset, Path(own), target, self.recipe, tags, self._go_on)
        return record, False

    def _go_on(self) -> None:
        if not (self.work / RUNNING).exists():
            raise _StoppedError


def _reason(error: GeocentroidsError) -> str:
    """Return why an image is skipped, in one line."""
    text = detail(error)
    return f"it cannot be read ({text})" if isinstance(error, SourceUnavailableError) else text


def _finished(target: Path, key: str) -> Prepared | None:
    """Return the record of an output if it was made of the same image with the same parameters."""
    tag = _tag_of(target)
    if tag is None or tag.pop("key") != key:
        return None
    return Prepared(**tag)


def _tag_of(target: Path) -> dict[str, Any] | None:
    """Return what an output says of itself; None where there is none, or it is not one of ours."""
    try:
        with rasterio.open(target) as raster:
            return cast(dict[str, Any], json.loads(raster.tags()[TAG]))
    except (*GDAL_ERRORS, KeyError, ValueError):
        return None


def _record(dataset: Dataset, name: str, output: str) -> Prepared:
    rows, cols = dataset.footprint.shape
    return Prepared(
        name=name,
        output=output,
        identity=dataset.identity,
        width_px=cols * PATCH_PX,
        height_px=rows * PATCH_PX,
        gsd_before_m=round(dataset.gsd_m, 6),
        crs_before=_crs_name(dataset.crs),
        crs=_crs_name(dataset.grid.crs),
        resampling=dataset.preprocess.resampling,
    )


def _crs_name(crs: CRS) -> str:
    return ":".join(crs.to_authority() or (crs.name,))
