"""A server with a fake encoder in a process of its own, told by its standard input when the encoder may go on.

Prints `port N`, then `run` each time the encoder begins a run. Started by test_drain.py.
"""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from typing import Any

import uvicorn
from fakes import fake_service

from geocentroids_tiler.app import create_app


def main() -> None:
    images, codebooks, store = (Path(argument) for argument in sys.argv[1:])
    service, loader = fake_service(images, codebooks, label_store_dir=store)
    service.engine(service.codebook(None)).result()
    encoder = loader.made["blend"]
    encoder.gate.clear()
    encode = encoder.encode

    def told(windows: Any) -> Any:
        print("run", flush=True)
        return encode(windows)

    encoder.encode = told  # type: ignore[method-assign]

    def listen() -> None:
        sys.stdin.readline()
        encoder.gate.set()

    threading.Thread(target=listen, daemon=True).start()
    server = uvicorn.Server(uvicorn.Config(create_app(service=service), port=0, log_level="warning"))
    startup = server.startup

    async def started(*args: Any, **kwargs: Any) -> None:
        await startup(*args, **kwargs)
        print("port", server.servers[0].sockets[0].getsockname()[1], flush=True)

    server.startup = started  # type: ignore[method-assign]
    server.run()


if __name__ == "__main__":
    main()
