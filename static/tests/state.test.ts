import assert from "node:assert/strict";
import { test } from "node:test";
import { parseConfig, sameScheme } from "../src/config";
import { DEFAULTS, formatState, hasPosition, parseState, type State } from "../src/state";

test("a state survives the page's address", () => {
  const state: State = {
    url: "https://data.example/a b.tif?x=1&y=2#z",
    expires: "1900000000",
    signature: "aB-_9",
    codebook: "nano",
    classes: 24,
    layer: "similarity",
    highlight: 0,
    mode: "overlay",
    opacity: 0,
    split: 73,
  };
  assert.deepEqual(parseState(formatState(state)), state);
  assert.deepEqual(parseState(formatState(DEFAULTS)), DEFAULTS);
  assert.equal(formatState(DEFAULTS), "");
});

test("what is not understood takes the default", () => {
  const search = "?classes=9&layer=x&mode=&opacity=101&split=-1&highlight=1e3&url=%20";
  assert.deepEqual(parseState(search), DEFAULTS);
  assert.equal(parseState("?highlight=65535").highlight, null);
});

test("the page's address goes before the server's configuration", () => {
  const defaults = { ...DEFAULTS, url: "demo.tif", codebook: "nano" };
  assert.equal(parseState("", defaults).url, "demo.tif");
  assert.equal(parseState("?url=a.tif", defaults).url, "a.tif");
  assert.equal(parseState("?url=a.tif", defaults).codebook, "nano");
});

test("parameters of others stay in the address", () => {
  assert.equal(formatState({ ...DEFAULTS, url: "a.tif" }, "?token=1&url=b.tif&classes=8"), "?token=1&url=a.tif");
});

test("a map position is told from other anchors", () => {
  assert.ok(hasPosition("#14.2/-3.05/59.98"));
  assert.ok(hasPosition("#3/2/1/45"));
  for (const hash of ["", "#", "#about", "#3", "#3/a/b"]) assert.ok(!hasPosition(hash), hash);
});

const page = "https://host/cog/geocentroids/WebMercatorQuad/map.html?url=a.tif";

test("configuration: endpoints become absolute and the rest may be missing", () => {
  const given = { endpoint: "/cog/geocentroids/", source_endpoint: "http://host/cog", url: null, codebook: "nano" };
  assert.deepEqual(parseConfig(JSON.stringify(given), page), {
    endpoint: "https://host/cog/geocentroids",
    sourceEndpoint: "https://host/cog",
    codebooksUrl: "https://host/geocentroids/codebooks",
    url: null,
    codebook: "nano",
    demoUrl: null,
  });
  const mounted = { endpoint: "/a/cog/geocentroids", codebooks_url: "/a/geocentroids/codebooks" };
  assert.equal(parseConfig(JSON.stringify(mounted), page).sourceEndpoint, "https://host/a/cog");
  assert.equal(parseConfig(JSON.stringify(mounted), page).codebooksUrl, "https://host/a/geocentroids/codebooks");
});

test("a page without configuration says so", () => {
  for (const text of ["__GEOCENTROIDS_CONFIG__", "", "null", "{}", "[]"]) {
    assert.throws(() => parseConfig(text, page), /did not configure/);
  }
});

test("only addresses of the page's own host change their scheme", () => {
  assert.equal(sameScheme("http://host/{z}/{x}/{y}?u=1", page), "https://host/{z}/{x}/{y}?u=1");
  assert.equal(sameScheme("http://other/a", page), "http://other/a");
  assert.equal(sameScheme("http://host/a", "http://host/"), "http://host/a");
});
