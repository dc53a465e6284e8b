"""K-Means beside faiss and scikit-learn: time, peak memory and objective from the same start.

Features are synthetic: float16, on disk, a mixture of groups of unequal size whose variance falls from dimension to
dimension. Each program runs in a process of its own. Ours reads the files as it goes and also labels every feature;
faiss gets float32 in memory, and the time of loading it is not counted.

    python benchmarks/kmeans.py
    python benchmarks/kmeans.py --sklearn --features 20000 --dim 64 --k 64
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import faiss
import numpy as np

from geocentroids_fit.cluster import kmeans

GROUPS = 2000
PARTS = 16
ROWS = 65_536


@dataclass(frozen=True)
class Report:
    """What a process used: wall time, peak memory, and of it what is not mapped from files."""

    seconds: float
    peak_mib: float
    anonymous_mib: float


def make_features(folder: Path, features: int, dim: int) -> None:
    """Write the parts: variance falls with the dimension, groups have sizes like those of words in a text."""
    rng = np.random.default_rng(0)
    scale = (1 + np.arange(dim, dtype=np.float32)) ** -0.5
    centers = rng.standard_normal((GROUPS, dim), np.float32) * scale + rng.standard_normal(dim, np.float32)
    share = 1 / (10 + np.arange(GROUPS))
    for number, count in enumerate(np.diff(np.linspace(0, features, PARTS + 1).astype(int))):
        part = np.lib.format.open_memmap(folder / f"part{number:02d}.npy", "w+", np.float16, (int(count), dim))
        for start in range(0, len(part), ROWS):
            block = part[start : start + ROWS]
            group = rng.choice(GROUPS, len(block), p=share / share.sum())
            block[:] = centers[group] + rng.standard_normal(block.shape, np.float32) * scale
        part.flush()


def open_parts(folder: Path) -> list[np.ndarray]:
    return [np.load(path, mmap_mode="r", allow_pickle=False) for path in sorted(folder.glob("part*.npy"))]


def objective(parts: list[np.ndarray], centroids: np.ndarray) -> float:
    """Return the sum of squared distances: nearest centroids by faiss, distances from them in float64."""
    index = faiss.IndexFlatL2(centroids.shape[1])
    index.add(centroids)
    total = 0.0
    for part in parts:
        for start in range(0, len(part), ROWS):
            rows = part[start : start + ROWS].astype(np.float32)
            own = index.search(rows, 1)[1][:, 0]
            total += float(np.square(rows - centroids[own]).sum(dtype=np.float64))
    return total


def run(program: str, folder: Path, iterations: int, tolerance: float) -> None:
    """Fit with one program, in a process of its own; write its centroids and its report."""
    parts, start = open_parts(folder), np.load(folder / "start.npy", allow_pickle=False)
    k, dim = start.shape
    peak_kib = [0]
    threading.Thread(target=watch_memory, args=(peak_kib,), daemon=True).start()
    if program == "ours":
        began = time.perf_counter()
        options = {"init": start, "max_iterations": iterations, "tolerance": tolerance, "device": "cpu"}
        centroids = kmeans(parts, k, progress=False, **options).centroids
    elif program == "faiss":
        data = np.empty((sum(map(len, parts)), dim), np.float32)
        np.concatenate(parts, out=data)
        began = time.perf_counter()
        peer = faiss.Kmeans(dim, k, niter=iterations, max_points_per_centroid=len(data))
        peer.train(data, init_centroids=start)
        centroids = peer.centroids
    else:
        from sklearn.cluster import KMeans

        data = np.concatenate(parts).astype(np.float32)
        began = time.perf_counter()
        lloyd = KMeans(k, init=start, n_init=1, max_iter=iterations, tol=tolerance, algorithm="lloyd").fit(data)
        centroids = lloyd.cluster_centers_
    seconds = time.perf_counter() - began
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    np.save(folder / f"{program}.npy", centroids)
    (folder / f"{program}.json").write_text(json.dumps(asdict(Report(seconds, peak_mib, peak_kib[0] / 1024))))


def watch_memory(peak_kib: list[int]) -> None:
    """Keep the most anonymous memory seen in ``peak_kib``."""
    while True:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        peak_kib[0] = max(peak_kib[0], int(status.split("RssAnon:")[1].split()[0]))
        time.sleep(0.05)


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--k", type=int, default=1024)
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--tolerance", type=float, default=0, help="of ours and scikit-learn; 0: all iterations")
    parser.add_argument("--sklearn", action="store_true", help="compare with scikit-learn in place of faiss")
    parser.add_argument("--run", nargs=2, metavar=("PROGRAM", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        run(arguments.run[0], Path(arguments.run[1]), arguments.iterations, arguments.tolerance)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_features(folder, arguments.features, arguments.dim)
        parts = open_parts(folder)
        rows = np.sort(np.random.default_rng(1).choice(len(parts[0]), arguments.k, replace=False))
        np.save(folder / "start.npy", parts[0][rows].astype(np.float32))
        print(
            f"{arguments.features} x {arguments.dim} float16, k {arguments.k}, {arguments.iterations} iterations, "
            f"{os.cpu_count()} cores"
        )
        peer = "sklearn" if arguments.sklearn else "faiss"
        results: dict[str, tuple[Report, float]] = {}
        options = ["--iterations", str(arguments.iterations), "--tolerance", str(arguments.tolerance)]
        for program in ("ours", peer):
            subprocess.run([sys.executable, __file__, "--run", program, name, *options], check=True)
            report = Report(**json.loads((folder / f"{program}.json").read_text()))
            results[program] = report, objective(parts, np.load(folder / f"{program}.npy", allow_pickle=False))
            print(
                f"{program}: {report.seconds:.1f} s, objective {results[program][1]:.6g}, peak memory "
                f"{report.peak_mib:.0f} MiB, of it not mapped from files {report.anonymous_mib:.0f} MiB",
                flush=True,
            )
        (ours, low), (theirs, high) = results["ours"], results[peer]
        print(
            f"ours / {peer}: time {ours.seconds / theirs.seconds:.3f}, objective {low / high:.5f}, "
            f"memory {ours.peak_mib / theirs.peak_mib:.3f}"
        )


if __name__ == "__main__":
    main()
