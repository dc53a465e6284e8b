"""Cold tiles on several encoders, simulated: what routing by image costs in waiting, and what it saves in windows.

    python benchmarks/scaling_simulation.py [--tiles-s 1000] [--windows-s 4000] [--seconds 120]

Arithmetic says how many encoders a load needs on average. It does not say how long a viewport waits when some images
are looked at more than others and each has one owner. Here viewports arrive at random (Poisson), each at a random
place of one image, and ask for the windows under 24 tiles, as far as these have no labels yet. Images: all equally
popular, by Zipf's law, or an event: ten large ones that everybody looks at. Owner: all windows of an image go to one
encoder, which computes each once. Anywhere: each viewport goes to the encoder with the shortest queue, and windows
that another one has begun are computed again unless their labels are in the store by then. Encoders work at a fixed
rate, first come first served.
"""

from __future__ import annotations

import argparse
import hashlib
from dataclasses import dataclass

import numpy as np

VIEW_CHUNKS = (15, 10)
"""Chunks under a viewport of 6 x 4 tiles of zoom 18 at 30 degrees, with chunks of 56 m."""
SIDE_CHUNKS, EVENT_SIDE_CHUNKS, EVENT_IMAGES = 18, 64, 10
"""Chunks a side of an image of 1 km2, and of one of 13 km2."""


@dataclass(frozen=True)
class Load:
    """What is asked for.

    Attributes:
        views_s: viewports that arrive in a second.
        seconds: for how long.
        images: how many there are.
        side_chunks: of an image.
        skew: exponent of Zipf's law; 0: all alike.
    """

    views_s: float
    seconds: float
    images: int
    side_chunks: int
    skew: float


@dataclass(frozen=True)
class Outcome:
    """What a simulation found.

    Attributes:
        p50_s: median wait of a viewport for its last label.
        p95_s: of one viewport in twenty.
        busiest: share of the time that the busiest encoder works.
        mean: share of the time that an encoder works.
        computed: windows computed.
        needed: distinct windows asked for.
    """

    p50_s: float
    p95_s: float
    busiest: float
    mean: float
    computed: int
    needed: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiles-s", type=float, default=1000, help="cold tiles asked for in a second")
    parser.add_argument("--windows-s", type=float, default=4000, help="windows/s of an encoder")
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    views_s = options.tiles_s / 24
    print(f"{options.tiles_s:g} tiles/s in {views_s:.1f} viewports/s, encoders of {options.windows_s:g} windows/s\n")
    print("| encoders | popularity | routing | p50 | p95 | busiest | mean | computed again |")
    print("|---|---|---|---|---|---|---|---|")
    for encoders in (2, 3, 4, 8):
        for name, images, side, skew in (
            ("all alike", options.images, SIDE_CHUNKS, 0.0),
            ("Zipf", options.images, SIDE_CHUNKS, 1.0),
            ("an event", EVENT_IMAGES, EVENT_SIDE_CHUNKS, 0.0),
        ):
            for routing in ("owner", "anywhere"):
                load = Load(views_s, options.seconds, images, side, skew)
                found = simulate(np.random.default_rng(options.seed), encoders, options.windows_s, load, routing)
                again = found.computed / max(1, found.needed) - 1
                print(
                    f"| {encoders} | {name} | {routing} | {found.p50_s:.2f} s | {found.p95_s:.2f} s | "
                    f"{found.busiest:.0%} | {found.mean:.0%} | {again:.1%} |"
                )


def simulate(rng: np.random.Generator, encoders: int, windows_s: float, load: Load, routing: str) -> Outcome:
    """Simulate viewports that arrive for a time, and what they wait for."""
    count = rng.poisson(load.views_s * load.seconds)
    arrivals = np.sort(rng.uniform(0, load.seconds, count))
    weights = 1 / np.arange(1, load.images + 1) ** load.skew
    chosen = rng.choice(load.images, count, p=weights / weights.sum())
    corners = rng.integers(0, load.side_chunks - min(VIEW_CHUNKS), (count, 2))
    free_at = np.zeros(encoders)
    busy_s = np.zeros(encoders)
    ready: dict[tuple[int, int, int], float] = {}  # when a window's label is there, wherever it was computed
    own: list[dict[tuple[int, int, int], float]] = [{} for _ in range(encoders)]
    waits, computed = np.zeros(count), 0
    for i, (at, image) in enumerate(zip(arrivals, chosen, strict=True)):
        row, col = corners[i]
        windows = [
            (int(image), r, c)
            for r in range(row, min(load.side_chunks, row + VIEW_CHUNKS[1]))
            for c in range(col, min(load.side_chunks, col + VIEW_CHUNKS[0]))
        ]
        encoder = owner(int(image), encoders) if routing == "owner" else int(np.argmin(free_at))
        known = own[encoder]
        stored = [ready[w] for w in windows if w in ready and (w in known or ready[w] <= at)]
        missing = [w for w in windows if w not in known and not (w in ready and ready[w] <= at)]
        start = max(at, free_at[encoder])
        work_s = len(missing) / windows_s
        end = start + work_s if missing else at
        for w in missing:
            known[w] = end
            ready[w] = min(ready.get(w, np.inf), end)
        computed += len(missing)
        free_at[encoder] = max(free_at[encoder], end)
        busy_s[encoder] += work_s
        waits[i] = max([end, *stored]) - at
    whole_s = max(load.seconds, float(free_at.max()))
    return Outcome(
        p50_s=float(np.quantile(waits, 0.5)),
        p95_s=float(np.quantile(waits, 0.95)),
        busiest=float(busy_s.max() / whole_s),
        mean=float(busy_s.mean() / whole_s),
        computed=computed,
        needed=len(ready),
    )


def owner(image: int, encoders: int) -> int:
    """Return the encoder of an image by rendezvous hashing."""
    scores = [hashlib.sha256(f"{image}/{encoder}".encode()).digest() for encoder in range(encoders)]
    return scores.index(max(scores))


if __name__ == "__main__":
    main()
