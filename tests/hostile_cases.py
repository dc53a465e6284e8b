"""What strangers may ask of a server, and how it has to answer. Run by test_hostile.py and benchmarks/hostile.py."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hostile_files as files
import httpx
from hostile_servers import (
    Listener,
    drip,
    endless,
    file,
    first_then,
    hanging_up,
    head,
    redirect,
    reply,
    silent,
)

INFO = "/cog/geocentroids/info"
UNREADABLE = "cannot open"

NAMES: dict[str, list[list[str]]] = {
    "good.test": [["127.0.0.1"]],
    "private.test": [["127.0.0.2"]],
    "mixed.test": [["127.0.0.1", "127.0.0.2"]],
    "rebound.test": [["127.0.0.1"], ["127.0.0.2"]],
    "mapped.test": [["::ffff:127.0.0.2"]],
    "six.test": [["::1"]],
    "nat64.test": [["64:ff9b::7f00:2"]],
    "metadata.test": [["169.254.169.254"]],
    "empty.test": [[]],
}
"""What the server's resolver answers; of several answers each question gets the next one."""


@dataclass(frozen=True)
class Case:
    """A request.

    Attributes:
        status: how it must be answered; several where any of them is right.
        detail: part of the sentence that goes with it.
        url: of the image.
        path: of the route.
        params: of the query, beside ``url``.
        method: of the request.
        body: of the request.
        headers: of the request.
        most_asked: requests that the hostile server may see; None: any number.
    """

    status: int | tuple[int, ...]
    detail: str | None = None
    url: str | None = None
    path: str = INFO
    params: Mapping[str, Any] = field(default_factory=dict)
    method: str = "GET"
    body: bytes | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    most_asked: int | None = None

    def send(self, client: httpx.Client, server: str) -> httpx.Response:
        """Ask a server."""
        params = dict(self.params) if self.url is None else {"url": self.url, **self.params}
        return client.request(
            self.method, server + self.path, params=params, content=self.body, headers=dict(self.headers)
        )


@dataclass
class World:
    """Where the cases take place.

    Attributes:
        attacker: a server at an address that may be read from.
        canary: one that must not be reached, at every address of this machine; it serves a good image.
        folder: for files.
    """

    attacker: Listener
    canary: Listener
    folder: Path

    def __post_init__(self) -> None:
        self.good = files.good(self.folder)
        self.canary.routes["/image.tif"] = file(self.good)

    @property
    def here(self) -> str:
        """Address of the hostile server."""
        return f"http://127.0.0.1:{self.attacker.port}"

    def there(self, host: str) -> str:
        """Address of the canary's image under a name of the host."""
        return f"http://{host}:{self.canary.port}/image.tif"

    def serve(self, behaviour: Any, path: str = "/image.tif") -> str:
        """Put something on the hostile server and return its URL."""
        self.attacker.routes[path] = behaviour
        return self.here + path


Make = Callable[[World], Case]
CASES: dict[str, Make] = {}


def _add(name: str, make: Make) -> None:
    assert name not in CASES, name
    CASES[name] = make


# A control: the same files and servers, when they are good.
_add("good image", lambda w: Case(200, url=w.serve(file(w.good))))
_add("good image by name", lambda w: Case(200, url=f"http://good.test:{w.attacker.port}{_path(w.serve(file(w.good)))}"))

# Addresses that are not public, in every notation.
for _host in (
    "127.0.0.2", "127.2", "0x7f000002", "0x7f.2", "0177.0.0.2", "017700000002", "2130706434", "0", "0.0.0.0",
    "127.0.0.2.", "[::1]", "[::]", "[::ffff:127.0.0.2]", "[::127.0.0.2]", "[64:ff9b::127.0.0.2]", "[2002:7f00:2::]",
    "[2001:0:7f00:2::]", "[fe80::1]", "169.254.169.254", "10.0.0.1", "[fd00:ec2::254]",
):  # fmt: skip
    _add(f"address {_host}", lambda w, host=_host: Case(400, url=w.there(host)))  # type: ignore[misc]
for _name in ("private", "mixed", "mapped", "six", "nat64", "metadata", "empty", "unknown"):
    _add(
        f"name that resolves to: {_name}",
        lambda w, name=_name: Case(404, UNREADABLE, url=w.there(f"{name}.test")),  # type: ignore[misc]
    )


def _rebound(w: World) -> Case:
    w.attacker.routes["/image.tif"] = hanging_up(first_then(file(w.good), redirect(w.there("rebound.test"))))
    return Case(404, UNREADABLE, url=f"http://rebound.test:{w.attacker.port}/image.tif", path=whole_image())


_add("name that resolves to another address the second time", _rebound)

# Redirects.
_add("redirect to a private address", lambda w: Case(404, UNREADABLE, url=w.serve(redirect(w.there("127.0.0.2")))))
_add("redirect to a private name", lambda w: Case(404, UNREADABLE, url=w.serve(redirect(w.there("private.test")))))
_add("redirect to 0", lambda w: Case(404, UNREADABLE, url=w.serve(redirect(w.there("0"), 307))))
_add("redirect to a file", lambda w: Case(404, UNREADABLE, url=w.serve(redirect("file:///etc/passwd"))))
_add("redirect to gopher", lambda w: Case(404, UNREADABLE, url=w.serve(redirect("gopher://127.0.0.2:1/x"))))
_add(
    "redirect to /vsicurl/", lambda w: Case(404, UNREADABLE, url=w.serve(redirect("/vsicurl/" + w.there("127.0.0.2"))))
)
_add(
    "redirect with a password",
    lambda w: Case(404, UNREADABLE, url=w.serve(redirect(f"http://u:p@127.0.0.1:{w.attacker.port}/a"))),
)
_add(
    "redirect to nowhere",
    lambda w: Case(404, UNREADABLE, url=w.serve(reply(head("302 Found", Content_Length=0), keep=True))),
)
_add("redirect to itself", lambda w: Case(404, UNREADABLE, url=w.serve(redirect("/image.tif")), most_asked=4))
_add(
    "redirect into another protocol's words",
    lambda w: Case(404, UNREADABLE, url=w.serve(redirect("http://127.0.0.2:6379/\r\nSET x y\r\n"))),
)


def _chain(w: World, hops: int, end: str) -> str:
    for hop in range(hops):
        w.attacker.routes[f"/hop{hop}"] = redirect(f"/hop{hop + 1}" if hop + 1 < hops else end)
    w.attacker.routes["/end.tif"] = file(w.good)
    return f"{w.here}/hop0"


_add("three redirects", lambda w: Case(200, url=_chain(w, 3, "/end.tif")))
_add("four redirects", lambda w: Case(404, UNREADABLE, url=_chain(w, 4, "/end.tif"), most_asked=4))
_add(
    "three redirects, the last to a private address",
    lambda w: Case(404, UNREADABLE, url=_chain(w, 3, w.there("127.0.0.2"))),
)

# What is no URL of a web server.
for _url in (
    "/etc/passwd", "file:///etc/passwd", "/vsicurl/http://127.0.0.2:{port}/image.tif", "GTIFF_DIR:1:/etc/passwd",
    "/vsicurl?header_file=/etc/passwd&url=http://127.0.0.2:{port}/image.tif", "/vsisubfile/0_100,/etc/passwd",
    "vrt:///etc/passwd", "<VRTDataset/>", "s3://bucket/image.tif", "gs://bucket/image.tif", "az://c/image.tif",
    "gopher://127.0.0.2:{port}/image.tif", "ftp://127.0.0.2:{port}/image.tif", "../secret.tif", "/vsimem/x.tif",
):  # fmt: skip
    _add(f"url {_url[:36]}", lambda w, url=_url: Case(400, url=url.format(port=w.canary.port)))  # type: ignore[misc]
_add(
    "url with a password", lambda w: Case(400, "user name or password", url=f"http://u:p@127.0.0.1:{w.attacker.port}/")
)
_add("url with a line break", lambda w: Case(400, "control character", url=f"{w.here}/a\r\nHost: x"))

# Files that lead elsewhere.
_add(
    "tag OVERVIEW_FILE, a host",
    lambda w: Case(
        422,
        "may name other files",
        url=w.serve(file(files.with_tags(w.folder, "OVERVIEWS", OVERVIEW_FILE="/vsicurl/" + w.there("127.0.0.2")))),
    ),
)
_add(
    "tag OVERVIEW_FILE, TiTiler's own route",
    lambda w: Case(
        422,
        "may name other files",
        url=w.serve(file(files.with_tags(w.folder, "OVERVIEWS", OVERVIEW_FILE="/etc/passwd"))),
        path="/cog/info",
    ),
)
_add(
    "tag OVERVIEW_FILE behind an entity",
    lambda w: Case(422, "may name other files", url=w.serve(file(files.with_hidden_tag(w.folder)))),
)
_add(
    "tag X_DATASET",
    lambda w: Case(
        422,
        "may name other files",
        url=w.serve(file(files.with_tags(w.folder, "GEOLOCATION", X_DATASET="/vsicurl/" + w.there("127.0.0.2")))),
    ),
)
_add(
    "VRT under a .tif name",
    lambda w: Case(404, UNREADABLE, url=w.serve(file(files.vrt("/vsicurl/" + w.there("127.0.0.2"))))),
)


def _sidecars(w: World) -> Case:
    for suffix in (".ovr", ".msk", ".aux.xml"):
        w.attacker.routes["/image.tif" + suffix] = file(files.vrt("/vsicurl/" + w.there("127.0.0.2")))
    return Case(200, url=w.serve(file(files.with_overviews(w.folder))), path=whole_image())


_add("side-cars that are VRTs", _sidecars)

# Files that cost too much, or are broken.
_add("65,535 bands", lambda w: Case(422, "65535 bands", url=w.serve(file(files.many_bands(w.folder)))))
_add(
    "a million pixels a side, sparse",
    lambda w: Case(422, "accepted: up to", url=w.serve(file(files.sparse(w.folder, 1_200_000, 4096)))),
)
_add(
    "a tile of 40,960 px",
    lambda w: Case(422, "blocks of 40960 x 40960 px", url=w.serve(file(files.sparse(w.folder, 40_960, 40_960)))),
)
_add("3,844 tiles of one blob", lambda w: Case(422, "no overviews", url=w.serve(file(files.shared_blob(62)))))
_add(
    "TIFF of a block that decodes to 512 MiB",
    lambda w: Case((200, 404, 422), url=w.serve(file(files.bomb(2**29))), path=whole_image()),
)
_add(
    "JPEG larger than its block",
    lambda w: Case((200, 404, 422), url=w.serve(file(files.jpeg_larger_than_its_block(8192))), path=whole_image()),
)
_add(
    "LZMA, whose memory the stream decides",
    lambda w: Case(422, "compression 34925", url=w.serve(file(files.compressed(w.folder, "lzma")))),
)
_add(
    "directories in a circle",
    lambda w: Case(
        404, UNREADABLE, url=w.serve(file(files.tiff(files.directory(256, 256), data=bytes(256 * 256 * 3), loop=True)))
    ),
)
_add(
    "a thousand directories",
    lambda w: Case(422, "directories", url=w.serve(file(files.tiff(*[files.directory(16, 16)] * 1000)))),
)
_add(
    "more blocks than the index has",
    lambda w: Case(404, UNREADABLE, url=w.serve(file(files.tiff(files.directory(4096, 4096, blocks=4))))),
)
_add(
    "an index larger than the file",
    lambda w: Case(404, UNREADABLE, url=w.serve(file(files.tiff(files.directory(256, 256, blocks=2**31))))),
)
_add(
    "blocks beyond the end of the file",
    lambda w: Case(404, UNREADABLE, url=w.serve(file(files.tiff(files.directory(256, 256)))), path=whole_image()),
)
_add("header cut short", lambda w: Case(404, UNREADABLE, url=w.serve(file(w.good[:100]))))
_add(
    "pixels cut short",
    lambda w: Case(404, UNREADABLE, url=w.serve(file(w.good[: len(w.good) * 2 // 3])), path=whole_image()),
)
_add(
    "empty file",
    lambda w: Case(
        404, UNREADABLE, url=w.serve(reply(head("206 Partial Content", Content_Range="bytes 0-0/0", Content_Length=0)))
    ),
)
_add("HTML under a .tif name", lambda w: Case(404, UNREADABLE, url=w.serve(file(b"<html>" * 20_000))))
for _driver in ("PNG", "JPEG", "HFA"):
    _add(
        f"{_driver} under a .tif name",
        lambda w, driver=_driver: Case(404, UNREADABLE, url=w.serve(file(files.other_format(w.folder, driver)))),
    )  # type: ignore[misc]
for _seed in range(6):
    _add(
        f"header with flipped bits {_seed}",
        lambda w, seed=_seed: Case(
            (200, 404, 422), url=w.serve(file(files.flipped(w.good, seed, 12, 600))), path=whole_image()
        ),  # type: ignore[misc]
    )
_add(
    "pixels with flipped bits",
    lambda w: Case(404, UNREADABLE, url=w.serve(file(_flipped_pixels(w))), path=whole_image()),
)

# Servers that misbehave.
_add("silent server", lambda w: Case(404, UNREADABLE, url=w.serve(silent)))
_add("head that drips", lambda w: Case(404, UNREADABLE, url=w.serve(drip(head("206 Partial Content") * 50))))
_add("body that drips", lambda w: Case(404, UNREADABLE, url=w.serve(_then_drip(w))))
_add(
    "head without end",
    lambda w: Case(
        404, UNREADABLE, url=w.serve(endless(b"HTTP/1.1 206 Partial Content\r\n", b"X-A: " + b"a" * 4000 + b"\r\n"))
    ),
)
_add(
    "body without end",
    lambda w: Case(
        404,
        UNREADABLE,
        url=w.serve(
            endless(
                head("206 Partial Content", Content_Range="bytes 0-65535/99999999", Transfer_Encoding="chunked"),
                b"10000\r\n" + b"a" * 65536 + b"\r\n",
            )
        ),
    ),
)
_add("something else than HTTP", lambda w: Case(404, UNREADABLE, url=w.serve(reply(b"220 ftp ready\r\n"))))
_add(
    "server that ignores Range",
    lambda w: Case(404, UNREADABLE, url=w.serve(reply(head("200 OK", Content_Length=len(w.good)) + w.good))),
)
_add("server that lies about the length", lambda w: Case(404, UNREADABLE, url=w.serve(_lying(w, 100))))
_add("server that sends less than it says", lambda w: Case(404, UNREADABLE, url=w.serve(_lying(w, -100))))
_add(
    "server that answers with another range",
    lambda w: Case(
        404,
        UNREADABLE,
        url=w.serve(
            reply(head("206 Partial Content", Content_Range=f"bytes 5-9/{len(w.good)}", Content_Length=5) + b"12345")
        ),
    ),
)
_add(
    "server that does not tell the size",
    lambda w: Case(
        404,
        UNREADABLE,
        url=w.serve(
            reply(head("206 Partial Content", Content_Range="bytes 0-65535/*", Content_Length=65536) + bytes(65536))
        ),
    ),
)
_add(
    "size that no file has",
    lambda w: Case(
        404,
        UNREADABLE,
        url=w.serve(
            reply(
                head("206 Partial Content", Content_Range="bytes 0-65535/" + "9" * 30, Content_Length=65536)
                + bytes(65536)
            )
        ),
    ),
)
_add("compressed answer", lambda w: Case(404, UNREADABLE, url=w.serve(reply(_zipped(bytes(65536))))))
_add(
    "content that changes while it is read",
    lambda w: Case(
        409,
        "changed while it was read",
        url=w.serve(first_then(file(w.good, '"one"'), file(w.good, '"two"'))),
        path=whole_image(),
    ),
)
_add(
    "429, once, then good",
    lambda w: Case(
        200,
        url=w.serve(first_then(reply(head("429 Slow Down", Retry_After=1, Content_Length=0), keep=True), file(w.good))),
    ),
)
_add(
    "503, once, then good",
    lambda w: Case(200, url=w.serve(first_then(reply(head("503 Busy", Content_Length=0), keep=True), file(w.good)))),
)
_add(
    "503 with a long Retry-After",
    lambda w: Case(
        404,
        UNREADABLE,
        url=w.serve(reply(head("503 Busy", Retry_After=3600, Content_Length=0), keep=True)),
        most_asked=1,
    ),
)
_add(
    "429 for ever",
    lambda w: Case(
        404, UNREADABLE, url=w.serve(reply(head("429 Slow Down", Content_Length=0), keep=True)), most_asked=3
    ),
)
_add("connection that breaks once", lambda w: Case(200, url=w.serve(first_then(reply(b""), file(w.good)))))
for _status in ("401 Unauthorized", "403 Forbidden", "404 Not Found", "500 Broken"):
    _add(
        f"status {_status[:3]}",
        lambda w, status=_status: Case(
            404,
            UNREADABLE,
            url=w.serve(reply(head(status, WWW_Authenticate="Basic", Content_Length=0), keep=True)),
            most_asked=1,
        ),
    )  # type: ignore[misc]
_add("closed port", lambda w: Case(404, UNREADABLE, url="http://127.0.0.1:1/image.tif"))

# Requests that ask for too much.
_add("tilesize=6000", lambda w: Case(422, "tilesize=", url="whole.tif", path=_tile(), params={"tilesize": 6000}))
_add(
    "TiTiler's tilesize=6000",
    lambda w: Case(
        (400, 422), "tilesize", url="whole.tif", path="/cog/tiles/WebMercatorQuad/1/0/0.png", params={"tilesize": 6000}
    ),
)
_add(
    "TiTiler's buffer=2000",
    lambda w: Case(
        (400, 422), "buffer", url="whole.tif", path="/cog/tiles/WebMercatorQuad/1/0/0.png", params={"buffer": 2000}
    ),
)
_add(
    "TiTiler's dst_crs=http://...",
    lambda w: Case(
        (400, 422), "is not a CRS", url="whole.tif", path="/cog/preview.png", params={"dst_crs": w.there("127.0.0.2")}
    ),
)
_add("TiTiler's preview of 60,000 px", lambda w: Case((400, 422), url="whole.tif", path="/cog/preview/60000x60000.png"))
_add(
    "coord_crs=http://...",
    lambda w: Case(
        (400, 422),
        "is not a CRS",
        url="whole.tif",
        path="/cog/geocentroids/bbox/0,0,1,1.png",
        params={"coord_crs": w.there("127.0.0.2")[:32]},
    ),
)
_add(
    "body of 2 MiB",
    lambda w: Case(
        413,
        "GEOCENTROIDS_MAX_BODY_BYTES",
        url="whole.tif",
        path="/cog/geocentroids/statistics",
        method="POST",
        body=b"x" * 2**21,
    ),
)
_add(
    "2,000 features",
    lambda w: Case(
        (400, 413, 422),
        "features",
        url="whole.tif",
        path="/cog/geocentroids/statistics",
        method="POST",
        body=_features(2000),
    ),
)
_add(
    "JSON nested 100,000 deep",
    lambda w: Case(
        400, "JSON", url="whole.tif", path="/cog/geocentroids/statistics", method="POST", body=b"[" * 100_000
    ),
)
_add(
    "query of 20,000 characters",
    lambda w: Case(414, "GEOCENTROIDS_MAX_TARGET_BYTES", url="whole.tif", params={"x": "y" * 20_000}),
)
_add("url of 5,000 characters", lambda w: Case(422, "url=", url="http://good.test/" + "a" * 5000))
_add(
    "headers of 40,000 characters",
    lambda w: Case(431, "GEOCENTROIDS_MAX_HEADER_BYTES", url="whole.tif", headers={"X-Long": "y" * 40_000}),
)


def _flipped_pixels(w: World) -> bytes:
    """Return a file whose header is whole and whose compressed blocks are not."""
    content = files.compressed(w.folder, "deflate")
    header = 4096
    return content[:header] + files.flipped(content[header:], 1, 400, len(content))


def _then_drip(w: World) -> Any:
    return drip(head("206 Partial Content", Content_Range="bytes 0-65535/999999", Content_Length=65536) + w.good, 0.05)


def _lying(w: World, by: int) -> Any:
    def answer(connection: Any, asked: Any) -> bool:
        part = w.good[asked.start : asked.stop]
        place = f"bytes {asked.start}-{asked.start + len(part) - 1}/{len(w.good)}"
        connection.sendall(head("206 Partial Content", Content_Range=place, Content_Length=len(part) + by) + part)
        return False

    return answer


def _zipped(data: bytes) -> bytes:
    packed = gzip.compress(data)
    return (
        head(
            "206 Partial Content",
            Content_Range="bytes 0-65535/99999",
            Content_Encoding="gzip",
            Content_Length=len(packed),
        )
        + packed
    )


def _features(count: int) -> bytes:
    ring = [[-56.3, -34.87], [-56.29, -34.87], [-56.29, -34.86], [-56.3, -34.87]]
    feature = {"type": "Feature", "properties": None, "geometry": {"type": "Polygon", "coordinates": [ring]}}
    return json.dumps({"type": "FeatureCollection", "features": [feature] * count}).encode()


def whole_image() -> str:
    """Return the path of an export of the whole image: all pixels are read."""
    return "/cog/geocentroids/bbox/-56.5,-35.1,-56.1,-34.6.png"


def _tile() -> str:
    return "/cog/geocentroids/tiles/WebMercatorQuad/18/90000/158000.png"


def _path(url: str) -> str:
    return "/" + url.split("/", 3)[3]
