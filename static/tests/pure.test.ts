import assert from "node:assert/strict";
import { test } from "node:test";
import { formatArea, formatPosition, formatShare, plainText } from "../src/format";
import { intersect, mapZoom, nearest, ring, tileZoom } from "../src/geo";
import { classStyle, graticule, imageStyle, LIGHT } from "../src/style";
import { clampSplit, clipPath, splitAfterKey } from "../src/swipe";
import type { Bounds, TileJson } from "../src/types";

const tilejson: TileJson = {
  tiles: ["http://host/{z}/{x}/{y}"],
  bounds: [1, 2, 3, 4],
  minzoom: 14,
  maxzoom: 18,
  attribution: "",
};

test("bounds intersect or do not", () => {
  assert.deepEqual(intersect([0, 0, 4, 4], [2, -1, 6, 3]), [2, 0, 4, 3]);
  assert.equal(intersect([0, 0, 1, 1], [1, 0, 2, 1]), null);
  assert.equal(intersect([0, 0, 1, 1], [5, 5, 6, 6]), null);
});

test("a ring is closed and runs counter-clockwise", () => {
  const points = ring([1, 2, 3, 4]);
  assert.deepEqual(points[0], points.at(-1));
  const twice = points.slice(1).reduce((sum, [x, y], i) => sum + points[i]![0] * y - x * points[i]![1], 0);
  assert.equal(twice / 2, 4);
});

test("zoom levels of tiles of 256 px are one more than the map's", () => {
  assert.equal(tileZoom(13, 256), 14);
  assert.equal(tileZoom(12.49, 256), 13);
  assert.equal(tileZoom(13, 512), 13);
  assert.equal(tileZoom(mapZoom(17, 256), 256), 17);
});

test("areas and shares", () => {
  assert.equal(formatArea(3.25), "3.3 m²");
  assert.equal(formatArea(850), "850 m²");
  assert.equal(formatArea(123_000), "12.3 ha");
  assert.equal(formatArea(4_560_000), "4.56 km²");
  assert.equal(formatArea(1_234_000_000), "1,234 km²");
  assert.equal(formatShare(0.1234), "12.3 %");
  assert.equal(formatShare(0.0004), "< 0.1 %");
  assert.equal(formatPosition(-59.9, -3.05), "3.05000° S, 59.90000° W");
});

test("attributions lose their markup", () => {
  assert.equal(plainText('&copy; <a href="https://x.example">A &amp; B</a>'), "© A & B");
  assert.equal(plainText("<img src=x onerror=alert(1)>"), "");
  assert.equal(plainText("a &lt;b&gt; &unknown;"), "a <b> &unknown;");
});

test("the class layer is drawn without interpolation and within its zooms", () => {
  const style = classStyle(tilejson, "http://host/{z}/{x}/{y}?highlight=1", 40);
  assert.deepEqual(style.sources.classes, {
    type: "raster",
    tiles: ["http://host/{z}/{x}/{y}?highlight=1"],
    tileSize: 256,
    bounds: [1, 2, 3, 4],
    minzoom: 14,
    maxzoom: 18,
  });
  const paint = style.layers[0]?.paint as Record<string, unknown>;
  assert.equal(paint["raster-resampling"], "nearest");
  assert.equal(paint["raster-opacity"], 0.4);
  assert.deepEqual(classStyle(null, "", 100).layers, []);
});

test("styles need nothing from elsewhere", () => {
  const style = imageStyle(LIGHT, tilejson, [tilejson.bounds]);
  assert.deepEqual(style.layers.map(({ id }) => id), ["ground", "graticule", "outline", "image"]);
  assert.equal(style.glyphs, undefined);
  assert.equal(style.sprite, undefined);
  assert.deepEqual(imageStyle(LIGHT, null, []).layers.map(({ id }) => id), ["ground", "graticule"]);
  const many = imageStyle(LIGHT, null, [[0, 0, 1, 1], [5, 5, 6, 6]]);
  assert.deepEqual(many.layers.map(({ id }) => id), ["ground", "graticule", "outline", "dots"]);
  assert.equal(graticule(10).length, 37 + 17);
});

test("the nearest of many images", () => {
  const places: Bounds[] = [[10, 0, 12, 2], [0, 60, 2, 62], [8, 60, 10, 62]];
  assert.deepEqual(nearest(places, [11, 3]), [11, 1]);
  assert.deepEqual(nearest(places, [7, 61]), [9, 61]);
  assert.equal(nearest([], [0, 0]), null);
});

test("the divider follows keys and stays on the map", () => {
  assert.equal(splitAfterKey("ArrowLeft", 50), 48);
  assert.equal(splitAfterKey("ArrowRight", 99), 100);
  assert.equal(splitAfterKey("PageDown", 4), 0);
  assert.equal(splitAfterKey("Home", 50), 0);
  assert.equal(splitAfterKey("End", 50), 100);
  assert.equal(splitAfterKey("a", 50), null);
  assert.equal(clampSplit(33.6), 34);
  assert.equal(clipPath(30), "inset(0 0 0 30%)");
  assert.equal(clipPath(null), "none");
});
