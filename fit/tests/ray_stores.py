"""What the object stores of a cluster hold, asked for again and again while something runs."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

PERIOD_S = 0.05


@dataclass(frozen=True)
class Store:
    """The object store of one node at one time.

    Attributes:
        used_bytes: that objects take, those included that may be dropped.
        pinned_bytes: of objects that may not be dropped.
        created_bytes: of all objects created there so far.
        spilled_bytes: written to disk so far.
        fallback_bytes: of objects that had no room in memory.
    """

    node: str
    used_bytes: int
    pinned_bytes: int
    created_bytes: int
    spilled_bytes: int
    fallback_bytes: int


def look(address: str) -> list[Store]:
    """Return the stores of all nodes that answer."""
    import grpc
    from ray._private.internal_api import node_stats
    from ray._private.state import GlobalState
    from ray._raylet import GcsClientOptions

    state = GlobalState()
    state._initialize_global_state(
        GcsClientOptions.create(address, None, allow_cluster_id_nil=True, fetch_cluster_id_if_nil=False)
    )
    stores = []
    for node in state.node_table():
        if node["Alive"]:
            try:
                found = node_stats(node["NodeManagerAddress"], node["NodeManagerPort"], False).store_stats
            except grpc.RpcError:  # it has just ended
                continue
            stores.append(
                Store(
                    node["NodeID"],
                    found.object_store_bytes_used,
                    found.object_store_bytes_primary_copy,
                    found.cumulative_created_bytes,
                    found.spilled_bytes_total,
                    found.object_store_bytes_fallback,
                )
            )
    return stores


@contextmanager
def watched(address: str) -> Iterator[list[Store]]:
    """Look at the stores while a block runs; yields a list that grows."""
    seen: list[Store] = []
    over = threading.Event()

    def watch() -> None:
        while not over.wait(PERIOD_S):
            seen.extend(look(address))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()
        seen.extend(look(address))
