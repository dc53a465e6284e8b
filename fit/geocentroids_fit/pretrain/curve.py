"""The losses of a training as a picture."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

NOT_LOSSES = ("step", "learning_rate", "seconds")


def draw_curve(log: Path, picture: Path) -> None:
    """Draw each loss of a log over the steps, as PNG."""
    lines = list(_lines(log))
    if not lines:
        return
    steps = {line["step"]: line for line in lines}  # a training that went on may have done some steps twice
    names = list(dict.fromkeys(name for line in lines for name in line if name not in NOT_LOSSES))
    figure = Figure(figsize=(8, 2.2 * len(names)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(names), 1, sharex=True, squeeze=False)[:, 0]
    for axis, name in zip(axes, names, strict=True):
        points = sorted((step, line[name]) for step, line in steps.items() if name in line)
        axis.plot([step for step, _ in points], [value for _, value in points])
        axis.set_ylabel(name)
        axis.grid(alpha=0.3)
    axes[-1].set_xlabel("step")
    figure.savefig(picture)


def _lines(log: Path) -> Iterator[dict[str, Any]]:
    """Yield what is in a log; a line that was not finished when the training was ended is left out."""
    if not log.is_file():
        return
    for line in log.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            continue
