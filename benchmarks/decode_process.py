"""What it would cost to decode images in processes of their own, with limits, instead of in the server's threads.

    python benchmarks/decode_process.py [--windows 96]

Windows of one COG are read by two threads of this process, and by two other processes that send the pixels back.
Printed: windows a second, and the memory of one such process. Fetching is left out: the bytes are local, though a
process without credentials and network would have to be handed them too.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from pathlib import Path

from remote_read import write_cog

from geocentroids_tiler.codebook import Codebook
from geocentroids_tiler.grid import ChunkIndex
from geocentroids_tiler.hub import find_codebook
from geocentroids_tiler.source import (
    CellCache,
    Dataset,
    ReadOptions,
    WindowPixels,
    open_dataset,
    read_windows,
    resolve_source,
    source_identity,
)

AT_ONCE = 2
BATCH = 8
ROUNDS = 5
Batch = list[ChunkIndex]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=96)
    options = parser.parse_args()
    codebook = find_codebook("nano", Path())
    with tempfile.TemporaryDirectory() as folder:
        for compress in ("jpeg", "deflate"):
            path = write_cog(Path(folder) / f"{compress}.tif", compress)
            dataset = opened(path, codebook)
            batches = [*split(dataset, options.windows, codebook)]
            spawn = multiprocessing.get_context("spawn")
            with ThreadPoolExecutor(AT_ONCE) as threads, ProcessPoolExecutor(AT_ONCE, spawn) as processes:
                print(f"{path.name}: {options.windows} windows, batches of {BATCH}, {AT_ONCE} at once")
                in_threads, apart = compare(threads, processes, partial(read, dataset, codebook), batches)
                peak = max(processes.map(peak_mib, range(2 * AT_ONCE)))
                count = options.windows
                print(f"  threads {count / in_threads:.0f} windows/s, processes {count / apart:.0f} windows/s")
                print(f"  time of processes / threads {apart / in_threads:.2f}, memory of a process {peak:.0f} MiB")


def compare(
    threads: Executor, processes: Executor, work: Callable[[Batch], list[WindowPixels]], batches: Sequence[Batch]
) -> tuple[float, float]:
    """Return the median seconds that each pool takes, measured in turns."""
    took: dict[Executor, list[float]] = {threads: [], processes: []}
    for _ in range(ROUNDS + 1):  # the first starts the processes
        for pool, seconds in took.items():
            start = time.perf_counter()
            list(pool.map(work, batches))
            seconds.append(time.perf_counter() - start)
    return statistics.median(took[threads][1:]), statistics.median(took[processes][1:])


def opened(path: Path, codebook: Codebook) -> Dataset:
    source = resolve_source(path.name, path.parent)
    return open_dataset(source, source_identity(source), ReadOptions(), codebook)


def split(dataset: Dataset, count: int, codebook: Codebook) -> list[Batch]:
    chunks = list(dataset.footprint.chunks(codebook.manifest.preprocess.stride_patches))[:count]
    return [chunks[i : i + BATCH] for i in range(0, len(chunks), BATCH)]


def read(dataset: Dataset, codebook: Codebook, batch: Batch) -> list[WindowPixels]:
    return read_windows(dataset, batch, codebook.manifest.encoder.patch_px, CellCache(32 * 2**20))


def peak_mib(_: int) -> float:
    time.sleep(0.1)  # so that each process is asked
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
