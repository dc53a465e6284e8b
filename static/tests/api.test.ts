import assert from "node:assert/strict";
import { test } from "node:test";
import * as api from "../src/api";
import type { Config } from "../src/config";
import { DEFAULTS } from "../src/state";

const config: Config = {
  endpoint: "http://host/cog/geocentroids",
  sourceEndpoint: "http://host/cog",
  codebooksUrl: "http://host/geocentroids/codebooks",
  url: null,
  codebook: null,
  demoUrl: null,
};
const state = { ...DEFAULTS, url: "https://data.example/a b.tif?x=1&y={z}", codebook: "nano" };
const encoded = "url=https%3A%2F%2Fdata.example%2Fa%20b.tif%3Fx%3D1%26y%3D%7Bz%7D&codebook=nano";

test("the XYZ address keeps its placeholders and encodes those of the image's address", () => {
  const { xyz } = api.links(config, { ...state, classes: 24, highlight: 7 });
  assert.equal(
    xyz,
    `http://host/cog/geocentroids/tiles/WebMercatorQuad/{z}/{x}/{y}.png?${encoded}&classes=24&highlight=7`,
  );
});

test("TileJSON and WMTS addresses carry what is drawn", () => {
  const { tilejson, wmts } = api.links(config, { ...state, layer: "similarity" });
  assert.equal(tilejson, `http://host/cog/geocentroids/WebMercatorQuad/tilejson.json?${encoded}&layer=similarity`);
  assert.equal(wmts, `http://host/cog/geocentroids/WMTSCapabilities.xml?${encoded}&layer=similarity`);
});

test("point, statistics and TileJSON requests", () => {
  assert.equal(
    api.pointUrl(config, { ...state, url: "a.tif", classes: 8, highlight: 1 }, -3.5, 2 / 3),
    "http://host/cog/geocentroids/point/-3.5000000,0.6666667?url=a.tif&codebook=nano&classes=8",
  );
  assert.equal(
    api.statisticsUrl(config, { ...state, url: "a.tif", codebook: null }),
    "http://host/cog/geocentroids/statistics?url=a.tif",
  );
  assert.equal(
    api.classTileJsonUrl(config, { ...state, url: "a.tif" }),
    "http://host/cog/geocentroids/WebMercatorQuad/tilejson.json?url=a.tif&codebook=nano&tilesize=256",
  );
  assert.equal(
    api.imageTileJsonUrl(config, { ...state, url: "a.tif" }, 512),
    "http://host/cog/WebMercatorQuad/tilejson.json?url=a.tif&tilesize=512",
  );
});

test("a signature goes wherever the image goes, and not to exemplars", () => {
  const signed = { ...state, url: "a.tif", codebook: null, expires: "99", signature: "s-_" };
  const { xyz, tilejson, wmts } = api.links(config, signed);
  const addresses = [
    xyz, tilejson, wmts, api.infoUrl(config, signed), api.classTileJsonUrl(config, signed),
    api.imageTileJsonUrl(config, signed, 256), api.pointUrl(config, signed, 1, 2), api.statisticsUrl(config, signed),
  ];
  for (const address of addresses) assert.match(address, /\?url=a\.tif&expires=99&signature=s-_(&|$)/);
  assert.equal(api.exemplarUrl(config, signed, 3, "webp"), "http://host/cog/geocentroids/exemplars/3.webp");
});

test("parameters are set, replaced and removed without touching the rest", () => {
  const tile = "http://host/{z}/{x}/{y}?url=a%2Fb.tif&classes=8&k=a=b";
  assert.equal(
    api.withParams(tile, { classes: null, highlight: 3 }),
    "http://host/{z}/{x}/{y}?url=a%2Fb.tif&k=a=b&highlight=3",
  );
  assert.equal(api.withParams("http://host/{z}", { classes: 24 }), "http://host/{z}?classes=24");
  assert.equal(api.withParams("http://host/{z}?a=1", { a: null }), "http://host/{z}");
});

test("a highlight is not drawn in the similarity layer", () => {
  assert.deepEqual(api.drawing({ ...state, layer: "similarity", highlight: 4 }), {
    classes: null,
    layer: "similarity",
    highlight: null,
  });
});

test("an error is one sentence whatever its body", () => {
  assert.equal(api.errorSentence(404, '{"detail": "No such file: a.tif."}'), "No such file: a.tif.");
  assert.equal(
    api.errorSentence(422, '{"detail": [{"loc": ["query", "url"], "msg": "Field required"}]}'),
    "url: Field required",
  );
  for (const body of ["<html>", "null", "[]", '{"detail": 5}', '{"detail": []}', '{"detail": ""}']) {
    assert.equal(api.errorSentence(502, body), "The server answered with error 502.");
  }
});

test("TileJSON without bounds covers the world, without tiles it is refused", () => {
  const tilejson = api.parseTileJson({ tiles: ["http://host/{z}/{x}/{y}"], bounds: [1, "x"] });
  assert.deepEqual(tilejson.bounds, [-180, -85.05, 180, 85.05]);
  assert.equal(tilejson.minzoom, 0);
  assert.throws(() => api.parseTileJson({ tiles: [] }), api.ApiError);
  assert.throws(() => api.parseTileJson(null), api.ApiError);
});

test("info: warnings and whether classes can be merged", () => {
  assert.deepEqual(api.parseInfo({ warnings: ["coarse", 3], codebook: { classes_available: false } }), {
    warnings: ["coarse"],
    classesAvailable: false,
    exemplarsAvailable: false,
    images: null,
  });
  assert.equal(api.parseInfo({}).classesAvailable, true);
  assert.equal(api.parseInfo({ kind: "mosaic", images: 10 }).images, 10);
  assert.equal(api.parseInfo({ kind: "image", images: 10 }).images, null);
  assert.equal(api.parseInfo({ codebook: { exemplars_available: true } }).exemplarsAvailable, true);
});

test("footprints: the bounds of each image", () => {
  const features = [{ bbox: [1, 2, 3, 4] }, { bbox: [1, 2, 3] }, { bbox: [1, 2, 3, "4"] }, {}, null];
  assert.deepEqual(api.parseFootprints({ features }), [[1, 2, 3, 4]]);
  assert.deepEqual(api.parseFootprints(null), []);
});

test("codebooks in each form they may come in", () => {
  const nano = { name: "nano", title: "Nano", classes: 1024, installed: false };
  assert.deepEqual(api.parseCodebooks({ codebooks: [{ ...nano, default: true }, { title: "no name" }, null] }), [
    { ...nano, isDefault: true },
  ]);
  assert.deepEqual(api.parseCodebooks(["nano"]), [
    { name: "nano", title: "nano", classes: null, installed: true, isDefault: false },
  ]);
  assert.deepEqual(api.parseCodebooks({ detail: "?" }), []);
});

test("a point without a label has no class", () => {
  const point = { coordinates: [1, 2], label: 0, color: "#A0b1C2", name: null, similarity: 0.5, neighbours: [{ label: 3 }] };
  assert.deepEqual(api.parsePoint(point), {
    found: { label: 0, color: "#A0b1C2", name: null, exemplar: null, similarity: 0.5 },
    credits: [],
    neighbours: [{ label: 3, color: "#808080", name: null, exemplar: null, similarity: null }],
  });
  assert.equal(api.parsePoint({ ...point, exemplar: "data:image/webp;base64," }).found?.exemplar, null);
  assert.equal(api.parsePoint({ ...point, exemplar: "http://host/3.webp" }).found?.exemplar, "http://host/3.webp");
  assert.equal(api.parsePoint({ label: null }).found, null);
});

test("addresses of exemplars name what the label depends on", () => {
  assert.equal(
    api.exemplarUrl(config, { ...state, url: "a.tif", codebook: null }, 3, "webp"),
    "http://host/cog/geocentroids/exemplars/3.webp",
  );
  assert.equal(
    api.exemplarUrl(config, { ...state, classes: 8, highlight: 1 }, 3, "json"),
    "http://host/cog/geocentroids/exemplars/3.json?codebook=nano&classes=8",
  );
});

test("credits: each once, an image without a name for itself, and links to the web only", () => {
  const anna = { image: "a.tif", attribution: "Anna", licence: "CC BY 4.0", url: "https://anna.example/" };
  const images = [anna, { ...anna, image: "b.tif" }, { image: "c.tif", url: "javascript:alert(1)" }, null];
  assert.deepEqual(api.parseCredits({ images }), [
    { text: "Anna (CC BY 4.0)", url: "https://anna.example/" },
    { text: "c.tif", url: null },
  ]);
  assert.deepEqual(api.parseCredits(null), []);
});

test("a colour that is none does not reach the page's styles", () => {
  assert.equal(api.parsePoint({ label: 1, color: "url(http://evil.example/)" }).found?.color, "#808080");
});

test("statistics are sorted by area, from a feature or a collection", () => {
  const classes = [
    { label: 1, color: "#000000", name: "small", area_m2: 10, share: 0.1 },
    { label: 2, color: "#ffffff", name: null, area_m2: 90, share: 0.9 },
  ];
  const feature = { type: "Feature", properties: { statistics: { area_m2: 120, labelled_m2: 100, classes } } };
  const answer = api.parseStatistics(feature);
  assert.deepEqual(answer.classes.map(({ label }) => label), [2, 1]);
  assert.equal(answer.labelledM2, 100);
  assert.deepEqual(api.parseStatistics({ type: "FeatureCollection", features: [feature] }), answer);
  assert.deepEqual(api.parseStatistics(null), { areaM2: 0, labelledM2: 0, classes: [] });
});
