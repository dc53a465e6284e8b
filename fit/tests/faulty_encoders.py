"""An encoder whose process ends, for nodes that can import this folder."""

from __future__ import annotations

import os

from geocentroids_fit.node_encoder import NodeEncoder, Outcome, SampleJob


class Ends(NodeEncoder):
    """Ends whenever it is given one image, and once when it is given another."""

    def sample(self, name: str, identity: str | None, job: SampleJob) -> Outcome:
        assert job.folder is not None
        once = job.folder.parent / "ended.once"
        if name == "1.tif" or (name == "3.tif" and not once.exists()):
            if name == "3.tif":
                once.touch()
            os._exit(1)
        return super().sample(name, identity, job)
