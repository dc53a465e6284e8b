"""A server in a process of its own that tells its port on its standard output."""

from __future__ import annotations

from typing import Any

import uvicorn
from fastapi import FastAPI


def serve_and_tell(app: FastAPI, **options: Any) -> None:
    """Serve an application on any free port until the process is told to end; print `port N` once it listens.

    Args:
        app: what is served.
        **options: of uvicorn.
    """
    server = uvicorn.Server(uvicorn.Config(app, port=0, **options))
    startup = server.startup

    async def started(*args: Any, **kwargs: Any) -> None:
        await startup(*args, **kwargs)
        print("port", server.servers[0].sockets[0].getsockname()[1], flush=True)

    server.startup = started  # type: ignore[method-assign]
    server.run()
