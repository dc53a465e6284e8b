/** Bounds and zoom levels. Pure. */
import type { Bounds } from "./types";

/** The common part of two bounds, or null if they have none. */
export function intersect(a: Bounds, b: Bounds): Bounds | null {
  const west = Math.max(a[0], b[0]);
  const south = Math.max(a[1], b[1]);
  const east = Math.min(a[2], b[2]);
  const north = Math.min(a[3], b[3]);
  return west < east && south < north ? [west, south, east, north] : null;
}

export function ring([west, south, east, north]: Bounds): [number, number][] {
  return [[west, south], [east, south], [east, north], [west, north], [west, south]];
}

export function centre([west, south, east, north]: Bounds): [number, number] {
  return [(west + east) / 2, (south + north) / 2];
}

/** The centre that is nearest to a place, in degrees; null if there is none. */
export function nearest(places: readonly Bounds[], [lon, lat]: readonly [number, number]): [number, number] | null {
  const shrink = Math.cos((lat * Math.PI) / 180);
  let best: [number, number] | null = null;
  let least = Infinity;
  for (const place of places.map(centre)) {
    const distance = Math.hypot((place[0] - lon) * shrink, place[1] - lat);
    if (distance < least) [best, least] = [place, distance];
  }
  return best;
}

/**
 * Zoom level of the tiles that MapLibre loads for a raster source.
 *
 * Its zoom counts tiles of 512 px, and raster sources round to the nearest level.
 */
export function tileZoom(mapZoom: number, tileSize: number): number {
  return Math.round(mapZoom + Math.log2(512 / tileSize));
}

/** The map zoom from which on tiles of level `zoom` are loaded. */
export function mapZoom(zoom: number, tileSize: number): number {
  return zoom - Math.log2(512 / tileSize);
}
