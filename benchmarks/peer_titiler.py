"""The peer of `serving.py`: plain TiTiler, with nothing but its own COG routes.

uvicorn peer_titiler:app
"""

from fastapi import FastAPI
from titiler.core.errors import DEFAULT_STATUS_CODES, add_exception_handlers
from titiler.core.factory import TilerFactory

app = FastAPI()
app.include_router(TilerFactory(router_prefix="/cog").router, prefix="/cog")
add_exception_handlers(app, DEFAULT_STATUS_CODES)


@app.get("/readyz")
async def readyz() -> dict[str, str]:
    """Answer as soon as the server does."""
    return {"status": "ok"}
