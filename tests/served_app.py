"""A server with a fake encoder in a process of its own, told by its standard input when the encoder may go on.

Prints `port N`, then `run` each time the encoder begins a run. Started by test_drain.py.
"""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from typing import Any

from fakes import fake_service
from telling_server import serve_and_tell

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
    serve_and_tell(create_app(service=service), log_level="warning")


if __name__ == "__main__":
    main()
