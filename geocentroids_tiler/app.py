"""The application that ``geocentroids serve`` runs: TiTiler's COG routes, ours beside them, the viewer, and health."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Annotated, Any

import attrs
from fastapi import APIRouter, FastAPI, Path
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from pydantic import BaseModel
from rio_tiler.io import Reader
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from titiler.core.errors import DEFAULT_STATUS_CODES, add_exception_handlers
from titiler.core.factory import TilerFactory, TMSFactory

from geocentroids_tiler import __version__
from geocentroids_tiler.access import AccessMiddleware, is_protected
from geocentroids_tiler.docs_page import add_docs
from geocentroids_tiler.errors import GeocentroidsError
from geocentroids_tiler.handlers import NoStoreRoute
from geocentroids_tiler.hot import HotTiles, HotTilesMiddleware
from geocentroids_tiler.hub import list_codebooks
from geocentroids_tiler.labels.service import Service
from geocentroids_tiler.layers import find_codebook, run
from geocentroids_tiler.limits import LimitsMiddleware
from geocentroids_tiler.metrics import exposition
from geocentroids_tiler.params import ReadParams, path_param
from geocentroids_tiler.refusals import refusal
from geocentroids_tiler.request_log import RequestLogMiddleware
from geocentroids_tiler.responses import CodebookInfo, codebook_info
from geocentroids_tiler.security_headers import HeaderSet, SecurityHeadersMiddleware
from geocentroids_tiler.settings import Settings
from geocentroids_tiler.source import check_structure, open_raster
from geocentroids_tiler.stock import stock_route
from geocentroids_tiler.stock_params import BoundedPartParams
from geocentroids_tiler.tiler import GeocentroidsExtension

PREFIX = "/cog"


class ErrorAnswer(BaseModel):
    """What every error says."""

    detail: str


def _described(descriptions: dict[int, str]) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": ErrorAnswer, "description": text} for status, text in descriptions.items()}


ERROR_RESPONSES = _described(
    {
        400: "Something in the request cannot be used.",
        401: "A key or a signature is needed.",
        404: "There is no such image, codebook or place.",
        409: "The image changed while it was read.",
        413: "The body is too large.",
        414: "Path and query are too long.",
        422: "A parameter is missing or out of bounds, or the image is not one that can be classified.",
        429: "Too many requests of one client are under way; see Retry-After.",
        431: "The headers are too large.",
        500: "Something is wrong with the server or its codebook.",
        503: "Too much is under way, or it takes too long; see Retry-After.",
    }
)
"""Errors that may be answered on any route; the first ones of all are answered before a route is looked for."""


def create_app(settings: Settings | None = None, service: Service | None = None) -> FastAPI:
    """Build the application.

    Args:
        settings: what the operator chose; read from the environment if not given.
        service: shared state, made from ``settings`` if not given; its own settings hold.
    """
    service = service or Service(settings or Settings())
    settings = service.settings

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.engine(service.codebook(None))  # loads in the background; /readyz tells when it is done
        if service.jobs is not None:
            service.jobs.start()
        yield
        service.close()

    app = FastAPI(
        title="geocentroids-tiler",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        responses=ERROR_RESPONSES,
    )
    app.state.service = service
    hot = HotTiles(service.clock)
    # Each one added stands before those added earlier: the last sees a request first.
    app.add_middleware(HotTilesMiddleware, hot=hot)
    if is_protected(settings):
        app.add_middleware(AccessMiddleware, settings=settings, prefix=PREFIX)
    app.add_middleware(LimitsMiddleware, settings=settings)
    app.add_middleware(
        CORSMiddleware,
        allow_origins=settings.cors_origins,
        allow_methods=["GET", "POST", "OPTIONS"],
        allow_headers=["*"],
        expose_headers=[
            "ETag",
            "X-Geocentroids-Empty",
            "X-Geocentroids-Missing",
            "Server-Timing",
            "X-Request-ID",
            "Retry-After",
        ],
    )
    app.add_middleware(SecurityHeadersMiddleware, frame_ancestors=settings.frame_ancestors)
    app.add_middleware(RequestLogMiddleware, meters=service.meters)
    extension = GeocentroidsExtension(settings=settings, service=service, hot=hot)
    cog = TilerFactory(
        router=APIRouter(route_class=stock_route(settings)),
        router_prefix=PREFIX,
        path_dependency=path_param,
        reader=_policy_reader(service),
        img_part_dependency=BoundedPartParams,
        add_viewer=False,  # its scripts come from a host of others; ours do not
        extensions=[extension],
    )
    app.include_router(cog.router, prefix=PREFIX, tags=["COG"])
    app.include_router(TMSFactory(router=APIRouter(route_class=NoStoreRoute)).router, tags=["TileMatrixSets"])
    app.include_router(_codebooks_router(service), prefix="/geocentroids", tags=["Codebooks"])
    app.include_router(_health_router(service), tags=["Health"])
    factory = extension.factory

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def home(request: Request, url: str | None = None, codebook: str | None = None) -> HTMLResponse:
        """Return the viewer."""
        return factory.viewer_page(request, "WebMercatorQuad", url, codebook)

    add_exception_handlers(app, DEFAULT_STATUS_CODES)
    app.add_exception_handler(GeocentroidsError, _answer_error)
    app.add_exception_handler(Exception, _crash_answer(settings))
    if settings.docs:
        add_docs(app, settings.frame_ancestors)
    return app


class CodebookEntry(BaseModel):
    """A codebook that is installed, or known and not installed."""

    name: str
    title: str | None = None
    version: str | None = None
    classes: int | None = None
    installed: bool
    default: bool
    error: str | None = None


class CodebookList(BaseModel):
    """Codebooks of this server."""

    codebooks: list[CodebookEntry]


def _codebooks_router(service: Service) -> APIRouter:
    router = APIRouter(route_class=NoStoreRoute)

    @router.get("/codebooks")
    async def codebooks() -> CodebookList:
        """List the codebooks that are installed."""
        found = await run(service.working, list_codebooks, service.settings.codebooks_dir)
        return CodebookList(
            codebooks=[
                CodebookEntry(
                    name=entry.name,
                    title=entry.title,
                    version=entry.version,
                    classes=entry.classes,
                    installed=entry.path is not None,
                    default=entry.name == service.settings.codebook,
                    error=entry.error,
                )
                for entry in found
            ]
        )

    @router.get("/codebooks/{name}")
    async def codebook(name: Annotated[str, Path(max_length=64)]) -> CodebookInfo:
        """Describe one codebook."""
        return codebook_info(await run(service.working, service.codebook, name))

    return router


def _health_router(service: Service) -> APIRouter:
    router = APIRouter()
    headers = {"Cache-Control": "no-store"}

    @router.get("/healthz")
    async def healthz() -> JSONResponse:
        """Answer as long as the process lives."""
        return JSONResponse({"status": "ok"}, headers=headers)

    @router.get("/readyz", responses={503: {"description": "The default codebook's encoder is not loaded yet."}})
    async def readyz() -> JSONResponse:
        """Answer 200 once the default codebook's encoder has run; a store that is away only makes tiles slower."""
        try:
            codebook = await find_codebook(service, ReadParams())
            ready = service.loaded(codebook)
            reason = str(service.load_failure(codebook) or "the encoder is loading")
        except GeocentroidsError as error:
            ready, reason = False, str(error)
        body = {"status": "ok"} if ready else {"status": "not ready", "detail": reason}
        if ready and (away := [store.name for store in service.stores() if store.away]):
            body["detail"] = f"labels are computed: {', '.join(away)} away"
        return JSONResponse(body, 200 if ready else 503, headers=headers)

    @router.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Return Prometheus metrics."""
        content = await run(service.working, exposition, service)
        return Response(content, media_type="text/plain; version=0.0.4; charset=utf-8", headers=headers)

    return router


def _policy_reader(service: Service) -> type[Reader]:
    """Return a rio-tiler reader that opens what our policy allows, as our own routes do."""

    @attrs.define(slots=False)
    class PolicyReader(Reader):
        def __attrs_post_init__(self) -> None:
            source = service.source(self.input or "")
            self.dataset = self._ctx_stack.enter_context(open_raster(source, service.identity(source)))
            check_structure(self.dataset)
            super().__attrs_post_init__()  # type: ignore[no-untyped-call]

    return PolicyReader


async def _answer_error(_: Request, error: Exception) -> JSONResponse:
    return refusal(error if isinstance(error, GeocentroidsError) else GeocentroidsError(str(error)))


def _crash_answer(settings: Settings) -> Callable[[Request, Exception], Awaitable[JSONResponse]]:
    """Return what answers where nothing else did: outside all middleware, and without the error's text."""
    complete = HeaderSet(settings.frame_ancestors).complete

    async def answer(_: Request, error: Exception) -> JSONResponse:
        response = refusal(GeocentroidsError("something went wrong in the server; its log says what"))
        response.raw_headers = complete(response.status_code, response.raw_headers)
        return response

    return answer
