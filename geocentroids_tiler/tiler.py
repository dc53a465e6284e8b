"""The TiTiler extension: routes under the factory's prefix, wired to the service. Wiring only."""

# No "from __future__ import annotations" here: FastAPI has to see the factory's types in the routes' annotations.
import hashlib
import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any
from urllib.parse import urlencode

import attrs
from fastapi import APIRouter, Depends, HTTPException, Path, Query
from fastapi.responses import HTMLResponse, Response
from morecantile import Tile, TileMatrixSet
from starlette.requests import Request
from titiler.core.dependencies import DatasetPathParams
from titiler.core.factory import FactoryExtension, TilerFactory
from titiler.core.models.mapbox import TileJSON
from titiler.core.resources.responses import XMLResponse
from titiler.extensions.wmts import DEFAULT_TEMPLATES as WMTS_TEMPLATES

from geocentroids_tiler import viewer
from geocentroids_tiler.access import SIGNATURE_PARAMETERS
from geocentroids_tiler.area import region_of_bbox
from geocentroids_tiler.codebook import NODATA_LABEL, Codebook
from geocentroids_tiler.descriptions import describe, label_at
from geocentroids_tiler.errors import InputError
from geocentroids_tiler.grid import parse_crs
from geocentroids_tiler.grounds import open_layer
from geocentroids_tiler.handlers import (
    MISSING_HEADER,
    ExemplarFormat,
    NoStoreRoute,
    RasterFormat,
    exemplar,
    export,
    read_feature,
    read_geojson,
    region_of_feature,
    statistics_of,
    while_connected,
    zooms_of,
)
from geocentroids_tiler.hot import HotTiles
from geocentroids_tiler.jobs_api import JobRoutes
from geocentroids_tiler.labels.service import Service
from geocentroids_tiler.layers import find_classes, find_codebook, find_layer, run
from geocentroids_tiler.params import (
    LayerParams,
    ReadParams,
    StyleParams,
    TileSize,
    classes_param,
    layer_params,
    path_param,
    read_params,
    style_params,
)
from geocentroids_tiler.render import MEDIA_TYPE, ImageFormat
from geocentroids_tiler.responses import (
    ExemplarInfo,
    ExemplarLink,
    Footprints,
    ImageInfo,
    Legend,
    MosaicInfo,
    PointInfo,
    footprints,
    legend,
    point_info,
)
from geocentroids_tiler.settings import Settings
from geocentroids_tiler.tile_answers import ServerTiming, TileAnswers, TileRequest
from geocentroids_tiler.tiles import Extent, check_zoom
from geocentroids_tiler.wmts import capabilities

PREFIX = "/geocentroids"

_OGC_PARAMETERS = {"service", "request", "acceptversions", "sections", "updatesequence", "acceptformats", "version"}
_NOT_FOR_WMTS_TILES = {"tile_format", "use_epsg", "tilesize"} | _OGC_PARAMETERS
"""Parameters of the capabilities that are no parameters of tiles; a WMTS tile has the size that its matrix states."""

_TILE_ANSWER: dict[str, Any] = {
    "response_class": Response,
    "responses": {
        200: {"content": {"image/png": {}, "image/webp": {}}, "description": "The tile."},
        304: {"description": "The tile is the one that the client has."},
    },
}
_NOT_FOR_EXEMPLARS = {"url", "bidx", "rescale"} | SIGNATURE_PARAMETERS
"""Parameters of an image; an exemplar belongs to the codebook, and is open to all."""

_EXEMPLAR_MEDIA_TYPE: Mapping[ExemplarFormat, str] = {"webp": "image/webp", "json": "application/json"}
_EXEMPLAR_ANSWER: dict[str, Any] = {
    "response_class": Response,
    "responses": {
        200: {"model": ExemplarInfo, "content": {"image/webp": {}}, "description": "The picture, or what it shows."},
        304: {"description": "It is the one that the client has."},
        404: {"description": "The class has no exemplar."},
    },
}
_RASTER_ANSWER: dict[str, Any] = {
    "response_class": Response,
    "responses": {
        200: {"content": {"image/tiff; application=geotiff": {}, "image/png": {}}, "description": "The labels."}
    },
}


def _body(*kinds: str) -> dict[str, Any]:
    """Describe a body that the route reads itself, so that members unknown to us stay and errors are plain."""
    schema = {
        "type": "object",
        "required": ["type"],
        "properties": {"type": {"enum": list(kinds)}},
        "description": "GeoJSON with polygons in longitude and latitude.",
    }
    content = {media_type: {"schema": schema} for media_type in ("application/geo+json", "application/json")}
    return {"requestBody": {"required": True, "content": content}}


@attrs.define
class GeocentroidsExtension(FactoryExtension):
    """Adds ``/geocentroids/...`` to a ``TilerFactory``.

    Attributes:
        settings: what an operator can choose; read from the environment if not given.
        service: shared state; give one service to all extensions and routers of a process.
        hot: learns which tiles were answered, for a ``HotTilesMiddleware`` if there is one.
        factory: the routes, once registered.
    """

    settings: Settings = attrs.field(factory=Settings)
    service: Service = attrs.field(default=attrs.Factory(lambda self: Service(self.settings), takes_self=True))
    hot: HotTiles = attrs.field(factory=HotTiles)

    factory: "ClassTilerFactory" = attrs.field(init=False)

    def register(self, factory: TilerFactory) -> None:  # type: ignore[override]
        """Register the routes."""
        path_dependency = factory.path_dependency
        name = factory.name or factory.router_prefix.strip("/").replace("/", ".")
        self.factory = ClassTilerFactory(
            service=self.service,
            hot=self.hot,
            router=APIRouter(prefix=PREFIX, route_class=NoStoreRoute),
            router_prefix=factory.router_prefix,
            name=f"{name}.geocentroids".lstrip("."),
            supported_tms=factory.supported_tms,
            # TiTiler's own dependency is synchronous: with it every tile would wait for a thread.
            path_dependency=path_param if path_dependency is DatasetPathParams else path_dependency,
            extensions=[JobRoutes(self.service)],
        )
        # The routes themselves, not an included router, so that the factory's route_dependencies reach them.
        factory.router.routes.extend(self.factory.router.routes)


@attrs.define(kw_only=True)
class ClassTilerFactory(TilerFactory):
    """Routes for classes in place of TiTiler's routes for pixels, under the same names and parameters."""

    service: Service
    hot: HotTiles = attrs.field(factory=HotTiles)
    tiles: TileAnswers = attrs.field(init=False)
    _sets: dict[str, TileMatrixSet] = attrs.field(init=False, factory=dict)

    def __attrs_post_init__(self) -> None:
        """Let TiTiler register the routes."""
        self.tiles = TileAnswers(self.service, self.hot)
        super().__attrs_post_init__()  # type: ignore[no-untyped-call]

    def register_routes(self) -> None:
        """Register every route of this factory."""
        self.tile()
        self.tilejson()
        self.wmts()
        self.map_viewer()
        self.info()
        self.footprints()
        self.point()
        self.part()
        self.statistics()
        self.legend()
        self.exemplar()

    def _route(self, operation: str, answer: Mapping[str, Any] = MappingProxyType({})) -> dict[str, Any]:
        return {"operation_id": f"{self.operation_prefix}{operation}", **answer}

    def _tms_path(self) -> Any:
        return Path(description="Identifier of a TileMatrixSet.", json_schema_extra={"enum": self.supported_tms.list()})

    def _tms(self, name: str) -> TileMatrixSet:
        if name not in self.supported_tms.list():
            raise InputError(f"{name!r} is not a TileMatrixSet here; accepted: {', '.join(self.supported_tms.list())}")
        if name not in self._sets:  # each ``get`` makes a copy
            self._sets[name] = self.supported_tms.get(name)
        return self._sets[name]

    async def _check_look(self, codebook: Codebook, look: StyleParams) -> None:
        """Raise InputError if tiles cannot be drawn that way."""
        look.style(codebook)
        await find_classes(self.service, codebook, look.classes)

    def _exemplar_link(self, request: Request) -> ExemplarLink:
        """Return what gives the address of a class's exemplar, with the parameters of the request that matter to it."""
        query = urlencode([item for item in request.query_params.multi_items() if item[0] not in _NOT_FOR_EXEMPLARS])
        address = self.url_for(request, "exemplar", label="{label}", format="webp") + (f"?{query}" if query else "")
        before, after = address.split("{label}", 1)
        return lambda label: f"{before}{label}{after}"

    def tile(self) -> None:
        """Register /tiles."""
        service = self.service

        @self.router.get("/tiles/{tileMatrixSetId}/{z}/{x}/{y}", **self._route("getTile", _TILE_ANSWER))
        @self.router.get(
            "/tiles/{tileMatrixSetId}/{z}/{x}/{y}.{format}", **self._route("getTileWithFormat", _TILE_ANSWER)
        )
        async def tile(
            request: Request,
            tileMatrixSetId: Annotated[str, self._tms_path()],
            z: Annotated[int, Path(ge=-20, le=40)],
            x: Annotated[int, Path(ge=-(2**40), le=2**40)],
            y: Annotated[int, Path(ge=-(2**40), le=2**40)],
            format: ImageFormat = "png",
            tilesize: TileSize = 256,
            url: str = Depends(self.path_dependency),
            read: LayerParams = Depends(layer_params),
            look: StyleParams = Depends(style_params),
        ) -> Response:
            """Return a tile in which every patch of ground has the colour of its class."""
            timing = ServerTiming()
            tms = self._tms(tileMatrixSetId)
            check_zoom(tms, z)
            codebook = await find_codebook(service, read)
            style = look.style(codebook)
            classes = await find_classes(service, codebook, look.classes)
            layer = await find_layer(service, url, read, codebook)
            wanted = TileRequest(
                tms, Tile(x, y, z), tilesize, format, layer, read, codebook, classes, look.classes, style
            )
            return await self.tiles.answer(request, wanted, timing)

    def tilejson(self) -> None:
        """Register /tilejson.json."""
        service = self.service

        @self.router.get(
            "/{tileMatrixSetId}/tilejson.json",
            response_model=TileJSON,
            response_model_exclude_none=True,
            **self._route("getTileJSON"),
        )
        async def tilejson(
            request: Request,
            tileMatrixSetId: Annotated[str, self._tms_path()],
            tile_format: ImageFormat = "png",
            tilesize: TileSize = 512,
            url: str = Depends(self.path_dependency),
            read: LayerParams = Depends(layer_params),
            look: StyleParams = Depends(style_params),
        ) -> TileJSON:
            """Return the TileJSON document of an image's classes."""
            tms = self._tms(tileMatrixSetId)
            found = await open_layer(service, url, read)
            codebook = found.codebook
            await self._check_look(codebook, look)
            minzoom, maxzoom = zooms_of(service, found.layer, codebook, found.seconds_per_chunk, tms)
            query = [(name, value) for name, value in request.query_params.multi_items() if name != "tile_format"]
            if "tilesize" not in request.query_params:
                query.append(("tilesize", str(tilesize)))
            tiles = self.url_for(
                request, "tile", tileMatrixSetId=tileMatrixSetId, z="{z}", x="{x}", y="{y}", format=tile_format
            )
            return TileJSON(
                name=url.rsplit("/", 1)[-1],
                description=codebook.manifest.title,
                attribution=codebook.manifest.attribution or None,
                legend=self.url_for(request, "legend") + f"?{urlencode(query)}",
                tiles=[f"{tiles}?{urlencode(query)}"],
                bounds=list(found.layer.geographic_bounds),
                minzoom=max(0, minzoom),
                maxzoom=maxzoom,
            )

    def wmts(self) -> None:
        """Register /WMTSCapabilities.xml."""
        service = self.service

        @self.router.get(
            "/WMTSCapabilities.xml",
            response_class=XMLResponse,
            responses={200: {"content": {"application/xml": {}}, "description": "The capabilities."}},
            **self._route("getWMTS"),
        )
        async def wmts(
            request: Request,
            tile_format: ImageFormat = "png",
            use_epsg: Annotated[bool, Query(description="Name coordinate systems by EPSG code, for ArcMap.")] = False,
            url: str = Depends(self.path_dependency),
            read: LayerParams = Depends(layer_params),
            look: StyleParams = Depends(style_params),
        ) -> Response:
            """Return the WMTS capabilities of an image's classes: a layer for each TileMatrixSet that holds it."""
            found = await open_layer(service, url, read)
            await self._check_look(found.codebook, look)
            query = [item for item in request.query_params.multi_items() if item[0].lower() not in _NOT_FOR_WMTS_TILES]

            def tiles_url(tms: str) -> str:
                place = {"z": "{TileMatrix}", "x": "{TileCol}", "y": "{TileRow}"}
                return self.url_for(request, "tile", tileMatrixSetId=tms, format=tile_format, **place)

            context = await run(
                service.working,
                capabilities,
                Extent.of(found.layer, found.codebook.manifest.preprocess),
                [self.supported_tms.get(name) for name in self.supported_tms.list()],
                found.seconds_per_chunk,
                service.settings.tile_budget_s,
                service.settings.mosaic_opened,
                tiles_url,
                urlencode(query),
                MEDIA_TYPE[tile_format],
                use_epsg,
            )
            return WMTS_TEMPLATES.TemplateResponse(request, "wmts.xml", context, media_type="application/xml")

    def map_viewer(self) -> None:
        """Register /map.html and the viewer's files."""

        @self.router.get(
            "/{tileMatrixSetId}/map.html",
            response_class=HTMLResponse,
            **self._route("getMapViewer"),
        )
        async def map_viewer(
            request: Request,
            tileMatrixSetId: Annotated[str, self._tms_path()],
            url: Annotated[str | None, Query(max_length=4096, description="Image to open.")] = None,
            codebook: Annotated[str | None, Query(max_length=64, description="Codebook to use.")] = None,
        ) -> HTMLResponse:
            """Return the viewer."""
            self._tms(tileMatrixSetId)
            return self.viewer_page(request, tileMatrixSetId, url, codebook)

        @self.router.get("/viewer/{name}", include_in_schema=False)
        async def viewer_file(request: Request, name: str) -> Response:
            """Return a script, a style or another file of the viewer."""
            found = viewer.asset(name)
            if found is None:
                raise HTTPException(404, f"the viewer has no file {name!r}")
            headers = {"Cache-Control": "public, max-age=300", "Vary": "Accept-Encoding"}
            if "gzip" in request.headers.get("accept-encoding", ""):
                headers["Content-Encoding"] = "gzip"
                return Response(found.gzipped, media_type=found.media_type, headers=headers)
            return Response(found.content, media_type=found.media_type, headers=headers)

    def viewer_page(
        self, request: Request, tms: str = "WebMercatorQuad", url: str | None = None, codebook: str | None = None
    ) -> HTMLResponse:
        """Return the viewer, which finds this factory's routes."""
        base = str(request.base_url).rstrip("/")
        endpoint = base + self.router_prefix + PREFIX
        config = {
            "endpoint": endpoint,
            "source_endpoint": base + self.router_prefix,
            "codebooks_url": f"{base}/geocentroids/codebooks",
            "url": url,
            "codebook": codebook,
            "tms": tms,
            "demo_url": self.service.settings.demo_url,
        }
        # A path without a host: the page's own scheme and host hold, whatever a proxy in front of us speaks.
        assets = f"{request.scope.get('root_path', '')}{self.router_prefix}{PREFIX}/viewer"
        return HTMLResponse(viewer.page(config, assets))

    def info(self) -> None:
        """Register /info."""
        service = self.service

        @self.router.get("/info", response_model=ImageInfo | MosaicInfo, **self._route("getInfo"))
        async def info(
            url: str = Depends(self.path_dependency), read: LayerParams = Depends(layer_params)
        ) -> ImageInfo | MosaicInfo:
            """Return the grid of an image or a mosaic, the codebook, and what labelling all of it would cost."""
            found = await open_layer(service, url, read)
            known = self.supported_tms.list()
            tms = self._tms("WebMercatorQuad" if "WebMercatorQuad" in known else known[0])
            return await describe(service, found, tms)

    def footprints(self) -> None:
        """Register /footprints."""
        service = self.service

        @self.router.get("/footprints", response_model=Footprints, **self._route("getFootprints"))
        async def footprints_(
            url: str = Depends(self.path_dependency), read: LayerParams = Depends(layer_params)
        ) -> Response:
            """Return where an image lies, or each image of a mosaic, as GeoJSON."""
            codebook = await find_codebook(service, read)
            layer = await find_layer(service, url, read, codebook)
            # Written in a thread: there may be many thousands.
            content = await run(service.working, lambda: footprints(layer).model_dump_json())
            return Response(content, media_type="application/geo+json")

    def point(self) -> None:
        """Register /point."""
        service = self.service

        @self.router.get("/point/{lon},{lat}", response_model=PointInfo, **self._route("getPoint"))
        async def point(
            request: Request,
            response: Response,
            lon: Annotated[float, Path(ge=-180, le=180, description="Longitude in degrees.")],
            lat: Annotated[float, Path(ge=-90, le=90, description="Latitude in degrees.")],
            url: str = Depends(self.path_dependency),
            read: LayerParams = Depends(layer_params),
            classes: int | None = Depends(classes_param),
        ) -> PointInfo:
            """Return the class of the patch at a place, how well it fits, and what else it is like."""
            found = await open_layer(service, url, read)
            merged = await find_classes(service, found.codebook, classes)
            link = self._exemplar_link(request)
            at = await while_connected(service, request, label_at(service, found, lon, lat))
            if at.missing:
                response.headers[MISSING_HEADER] = str(at.missing)
            place = (lon, lat), at.label, at.similarity
            answer = await run(service.working, point_info, found.codebook, merged, *place, link)
            return answer.model_copy(update={"image": at.image})

    def part(self) -> None:
        """Register /bbox and /feature."""
        service = self.service

        @self.router.get("/bbox/{minx},{miny},{maxx},{maxy}.{format}", **self._route("getBbox", _RASTER_ANSWER))
        async def bbox_image(
            request: Request,
            minx: Annotated[float, Path()],
            miny: Annotated[float, Path()],
            maxx: Annotated[float, Path()],
            maxy: Annotated[float, Path()],
            format: RasterFormat,
            coord_crs: Annotated[
                str, Query(max_length=32, description="CRS of the box, as AUTHORITY:code.")
            ] = "EPSG:4326",
            url: str = Depends(self.path_dependency),
            read: LayerParams = Depends(layer_params),
            look: StyleParams = Depends(style_params),
        ) -> Response:
            """Return the labels of a box, one pixel per patch."""
            crs = parse_crs(coord_crs)
            found = await open_layer(service, url, read)
            region = region_of_bbox((minx, miny, maxx, maxy), crs)
            return await while_connected(service, request, export(service, found, region, look, format))

        @self.router.post(
            "/feature.{format}", openapi_extra=_body("Feature"), **self._route("postFeature", _RASTER_ANSWER)
        )
        async def feature_image(
            request: Request,
            format: RasterFormat,
            url: str = Depends(self.path_dependency),
            read: LayerParams = Depends(layer_params),
            look: StyleParams = Depends(style_params),
        ) -> Response:
            """Return the labels of a polygon, one pixel per patch."""
            feature = read_feature(await request.body(), service.settings)
            found = await open_layer(service, url, read)
            region = await run(service.working, region_of_feature, feature)
            return await while_connected(service, request, export(service, found, region, look, format))

    def statistics(self) -> None:
        """Register /statistics."""
        service = self.service

        @self.router.post(
            "/statistics", openapi_extra=_body("Feature", "FeatureCollection"), **self._route("postStatistics")
        )
        async def statistics(
            request: Request,
            url: str = Depends(self.path_dependency),
            read: LayerParams = Depends(layer_params),
            classes: int | None = Depends(classes_param),
        ) -> Response:
            """Return the same features, each with the area of every class inside it."""
            given, features = read_geojson(await request.body(), service.settings)
            found = await open_layer(service, url, read)
            merged = await find_classes(service, found.codebook, classes)
            answered, lacking = await while_connected(service, request, statistics_of(service, found, features, merged))
            whole = {**given, "features": answered} if given["type"] == "FeatureCollection" else answered[0]
            # Written in ASCII: a text may hold half a surrogate pair, which UTF-8 does not have.
            headers = {MISSING_HEADER: str(len(lacking))} if lacking else {}
            return Response(json.dumps(whole, allow_nan=False), media_type="application/geo+json", headers=headers)

    def legend(self) -> None:
        """Register /legend."""
        service = self.service

        @self.router.get("/legend", name="legend", response_model=Legend, **self._route("getLegend"))
        async def legend_(
            request: Request,
            read: ReadParams = Depends(read_params),
            classes: int | None = Depends(classes_param),
        ) -> Legend:
            """Return the classes of a codebook with colours, names, counts and exemplars."""
            codebook = await find_codebook(service, read)
            merged = await find_classes(service, codebook, classes)
            return await run(service.working, legend, codebook, merged, self._exemplar_link(request))

    def exemplar(self) -> None:
        """Register /exemplars."""
        service = self.service

        @self.router.get("/exemplars/{label}.{format}", name="exemplar", **self._route("getExemplar", _EXEMPLAR_ANSWER))
        async def exemplar_(
            request: Request,
            label: Annotated[int, Path(ge=0, lt=NODATA_LABEL, description="A label, or a class with classes=N.")],
            format: ExemplarFormat,
            read: ReadParams = Depends(read_params),
            classes: int | None = Depends(classes_param),
        ) -> Response:
            """Return a small picture of typical patches of a class, or as JSON whose images these were cut from."""
            codebook = await find_codebook(service, read)
            merged = await find_classes(service, codebook, classes)
            link = self._exemplar_link(request)
            content = await run(service.working, exemplar, codebook, merged, label, link, format)
            if content is None:
                raise HTTPException(404, f"codebook {codebook.name!r} has no exemplar of class {label}")
            headers = {
                "ETag": f'"{hashlib.sha256(content).hexdigest()[:32]}"',
                "Cache-Control": service.settings.cache_control,
                # The file may come from anybody: a browser must not take it for anything but a picture.
                "X-Content-Type-Options": "nosniff",
            }
            if headers["ETag"] in request.headers.get("if-none-match", ""):
                return Response(status_code=304, headers=headers)
            return Response(content, media_type=_EXEMPLAR_MEDIA_TYPE[format], headers=headers)
