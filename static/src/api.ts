/** Addresses of the server's routes, requests to them and what they answer. */
import type { Config } from "./config";
import { ring } from "./geo";
import type { State } from "./state";
import type { Bounds, ClassArea, Codebook, Credit, Info, Neighbour, PointAnswer, Statistics, TileJson } from "./types";

/** The only tile matrix set that a web map shows. */
const TMS = "WebMercatorQuad";
export const TILE_SIZE = 256;

type Value = string | number | null;
type Params = Readonly<Record<string, Value>>;

/** What the server said went wrong, as one sentence. */
export class ApiError extends Error {
  override readonly name = "ApiError";
}

/** A query string with its question mark; parameters that are null are left out. */
export function query(params: Params): string {
  const pairs = Object.entries(params).filter(([, value]) => value !== null);
  if (pairs.length === 0) return "";
  return `?${pairs.map(([key, value]) => `${key}=${encodeURIComponent(String(value))}`).join("&")}`;
}

/**
 * Sets parameters in an address that may hold `{z}`, `{x}` and `{y}`; null removes one.
 *
 * Everything else stays byte for byte as the server wrote it.
 */
export function withParams(address: string, params: Params): string {
  const [path = "", search = ""] = splitOnce(address, "?");
  const kept = search.split("&").filter((pair) => pair !== "" && !(splitOnce(pair, "=")[0] in params));
  const added = query(params).slice(1);
  const all = added === "" ? kept : [...kept, added];
  return all.length === 0 ? path : `${path}?${all.join("&")}`;
}

function splitOnce(text: string, mark: string): [string, string] {
  const index = text.indexOf(mark);
  return index < 0 ? [text, ""] : [text.slice(0, index), text.slice(index + 1)];
}

/** Parameters that say which image is meant, and that one may see it. */
function image(state: State): Params {
  return { url: state.url, expires: state.expires, signature: state.signature };
}

/** Parameters that say which labels are meant. */
function labels(state: State): Params {
  return { ...image(state), codebook: state.codebook, classes: state.classes };
}

/** Parameters that say how they are drawn. */
export function drawing(state: State): Params {
  return {
    classes: state.classes,
    layer: state.layer === "classes" ? null : state.layer,
    highlight: state.layer === "classes" ? state.highlight : null,
  };
}

/** Addresses for other programs: XYZ tiles, TileJSON and WMTS of what the page shows. */
export function links(config: Config, state: State): { xyz: string; tilejson: string; wmts: string } {
  const params = query({ ...labels(state), ...drawing(state) });
  return {
    xyz: `${config.endpoint}/tiles/${TMS}/{z}/{x}/{y}.png${params}`,
    tilejson: `${config.endpoint}/${TMS}/tilejson.json${params}`,
    wmts: `${config.endpoint}/WMTSCapabilities.xml${params}`,
  };
}

export function infoUrl(config: Config, state: State): string {
  return `${config.endpoint}/info${query({ ...image(state), codebook: state.codebook })}`;
}

export function classTileJsonUrl(config: Config, state: State): string {
  const params = { ...image(state), codebook: state.codebook, tilesize: TILE_SIZE };
  return `${config.endpoint}/${TMS}/tilejson.json${query(params)}`;
}

/** @param tileSize 512 for a sharp image on a display with two pixels to each CSS pixel. */
export function imageTileJsonUrl(config: Config, state: State, tileSize: number): string {
  return `${config.sourceEndpoint}/${TMS}/tilejson.json${query({ ...image(state), tilesize: tileSize })}`;
}

export function pointUrl(config: Config, state: State, lon: number, lat: number): string {
  return `${config.endpoint}/point/${lon.toFixed(7)},${lat.toFixed(7)}${query(labels(state))}`;
}

/** @param format The picture, or whose images it was cut from. */
export function exemplarUrl(config: Config, state: State, label: number, format: "webp" | "json"): string {
  const params = { codebook: state.codebook, classes: state.classes };
  return `${config.endpoint}/exemplars/${label}.${format}${query(params)}`;
}

export function statisticsUrl(config: Config, state: State): string {
  return `${config.endpoint}/statistics${query(labels(state))}`;
}

export async function fetchInfo(config: Config, state: State, signal: AbortSignal): Promise<Info> {
  return parseInfo(await request(infoUrl(config, state), { signal }));
}

export async function fetchTileJson(address: string, signal: AbortSignal): Promise<TileJson> {
  return parseTileJson(await request(address, { signal }));
}

/** Bounds of the images of a mosaic. */
export async function fetchFootprints(config: Config, state: State, signal: AbortSignal): Promise<Bounds[]> {
  const address = `${config.endpoint}/footprints${query({ ...image(state), codebook: state.codebook })}`;
  return parseFootprints(await request(address, { signal }));
}

export async function fetchCodebooks(config: Config): Promise<Codebook[]> {
  return parseCodebooks(await request(config.codebooksUrl, {}));
}

export async function fetchPoint(
  config: Config, state: State, lon: number, lat: number, signal: AbortSignal,
): Promise<PointAnswer> {
  return parsePoint(await request(pointUrl(config, state, lon, lat), { signal }));
}

export async function fetchCredits(
  config: Config, state: State, label: number, signal: AbortSignal,
): Promise<Credit[]> {
  return parseCredits(await request(exemplarUrl(config, state, label, "json"), { signal }));
}

/** Asks for the area of each class within `bounds`. */
export async function fetchStatistics(
  config: Config, state: State, bounds: Bounds, signal: AbortSignal,
): Promise<Statistics> {
  const geometry = { type: "Polygon", coordinates: [ring(bounds)] };
  const answer = await request(statisticsUrl(config, state), {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ type: "Feature", properties: {}, geometry }),
    signal,
  });
  return parseStatistics(answer);
}

/** The one sentence in an error's body, which is FastAPI's `{"detail": ...}` or anything else. */
export function errorSentence(status: number, body: string): string {
  const plain = `The server answered with error ${status}.`;
  let detail: unknown;
  try {
    detail = record(JSON.parse(body)).detail;
  } catch {
    return plain;
  }
  if (typeof detail === "string" && detail !== "") return detail;
  if (Array.isArray(detail)) {
    const parts = detail.map((item) => {
      const { loc, msg } = record(item);
      const field = Array.isArray(loc) ? String(loc.at(-1)) : "";
      return typeof msg === "string" ? `${field}${field && ": "}${msg}` : "";
    });
    return parts.filter((part) => part !== "").join("; ") || plain;
  }
  return plain;
}

async function request(address: string, init: RequestInit): Promise<unknown> {
  let answer: Response;
  try {
    answer = await fetch(address, init);
  } catch (error) {
    if (isAbort(error)) throw error;
    throw new ApiError("The server cannot be reached.");
  }
  const body = await answer.text();
  if (!answer.ok) throw new ApiError(errorSentence(answer.status, body));
  try {
    return JSON.parse(body);
  } catch {
    throw new ApiError("The server's answer is not JSON.");
  }
}

export function isAbort(error: unknown): boolean {
  return error instanceof DOMException && error.name === "AbortError";
}

export function parseTileJson(raw: unknown): TileJson {
  const { tiles, bounds, minzoom, maxzoom, attribution } = record(raw);
  const addresses = list(tiles).filter((tile): tile is string => typeof tile === "string");
  const corners = list(bounds).map(Number);
  if (addresses.length === 0) throw new ApiError("The server's TileJSON names no tiles.");
  const known = corners.length === 4 && corners.every(Number.isFinite);
  return {
    tiles: addresses,
    bounds: known ? (corners as unknown as Bounds) : [-180, -85.05, 180, 85.05],
    minzoom: number(minzoom) ?? 0,
    maxzoom: number(maxzoom) ?? 22,
    attribution: text(attribution) ?? "",
  };
}

export function parseInfo(raw: unknown): Info {
  const { warnings, codebook, kind, images } = record(raw);
  return {
    warnings: list(warnings).filter((warning): warning is string => typeof warning === "string"),
    classesAvailable: record(codebook).classes_available !== false,
    exemplarsAvailable: record(codebook).exemplars_available === true,
    images: kind === "mosaic" && typeof images === "number" ? images : null,
  };
}

export function parseFootprints(raw: unknown): Bounds[] {
  return list(record(raw).features).flatMap((feature) => {
    const bounds = list(record(feature).bbox);
    const finite = bounds.every((value): value is number => typeof value === "number" && Number.isFinite(value));
    return finite && bounds.length === 4 ? [[bounds[0]!, bounds[1]!, bounds[2]!, bounds[3]!] as const] : [];
  });
}

export function parseCodebooks(raw: unknown): Codebook[] {
  const entries = Array.isArray(raw) ? raw : list(record(raw).codebooks);
  return entries.flatMap((entry) => {
    const fields = typeof entry === "string" ? { name: entry } : record(entry);
    const name = text(fields.name);
    if (name === null) return [];
    return [{
      name,
      title: text(fields.title) ?? name,
      classes: number(fields.classes),
      installed: fields.installed !== false,
      isDefault: fields.default === true,
    }];
  });
}

export function parsePoint(raw: unknown): PointAnswer {
  return {
    found: neighbour(raw),
    credits: [],
    neighbours: list(record(raw).neighbours).flatMap((item) => neighbour(item) ?? []),
  };
}

/** Whom to name for an exemplar: each once, with the licence; where nobody is stated, the image. */
export function parseCredits(raw: unknown): Credit[] {
  const credits = list(record(raw).images).map((item) => {
    const { image, attribution, licence, url } = record(item);
    const whom = text(attribution) ?? text(image) ?? "";
    return {
      text: text(licence) === null ? whom : `${whom} (${text(licence)})`,
      url: webAddress(url),
    };
  });
  const named = credits.filter((credit) => credit.text !== "");
  return [...new Map(named.map((credit) => [credit.text, credit])).values()];
}

/** @param raw A GeoJSON feature, or a collection of one. */
export function parseStatistics(raw: unknown): Statistics {
  const feature = record(list(record(raw).features)[0] ?? raw);
  const statistics = record(record(feature.properties).statistics);
  const classes = list(statistics.classes).flatMap((item): ClassArea[] => {
    const found = neighbour(item);
    const { area_m2: area, share } = record(item);
    return found === null ? [] : [{ ...found, areaM2: number(area) ?? 0, share: number(share) ?? 0 }];
  });
  return {
    areaM2: number(statistics.area_m2) ?? 0,
    labelledM2: number(statistics.labelled_m2) ?? 0,
    classes: classes.sort((a, b) => b.areaM2 - a.areaM2),
  };
}

function neighbour(raw: unknown): Neighbour | null {
  const { label, color, name, similarity, exemplar } = record(raw);
  const known = number(label);
  if (known === null) return null;
  const safe = text(color);
  return {
    label: known,
    color: safe !== null && /^#[0-9a-f]{6}$/i.test(safe) ? safe : "#808080",
    name: text(name),
    exemplar: webAddress(exemplar),
    similarity: number(similarity),
  };
}

function record(raw: unknown): Record<string, unknown> {
  return typeof raw === "object" && raw !== null ? (raw as Record<string, unknown>) : {};
}

function list(raw: unknown): unknown[] {
  return Array.isArray(raw) ? raw : [];
}

function number(raw: unknown): number | null {
  return typeof raw === "number" && Number.isFinite(raw) ? raw : null;
}

function webAddress(raw: unknown): string | null {
  return typeof raw === "string" && /^https?:\/\//i.test(raw) ? raw : null;
}

function text(raw: unknown): string | null {
  return typeof raw === "string" && raw !== "" ? raw : null;
}
