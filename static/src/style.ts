/** MapLibre styles as pure functions of what is shown. No glyphs, sprites or remote basemap: it works offline. */
import type { LayerSpecification, SourceSpecification, StyleSpecification } from "maplibre-gl";
import { centre, ring } from "./geo";
import type { Bounds, TileJson } from "./types";

export interface Palette {
  readonly ground: string;
  readonly line: string;
  readonly outline: string;
}

export const LIGHT: Palette = { ground: "#e9ecef", line: "#d6dbe0", outline: "#64748b" };
export const DARK: Palette = { ground: "#14181d", line: "#232a32", outline: "#94a3b8" };

/** Up to this zoom, images among many are marked by a dot: their outlines are too small to be seen. */
const DOTS_MAXZOOM = 13;

/** The lower map: neutral ground, a faint graticule, the outline of each image, and the image if there is one. */
export function imageStyle(
  palette: Palette, image: TileJson | null, outlines: readonly Bounds[],
): StyleSpecification {
  const sources: Record<string, SourceSpecification> = { graticule: lines(graticule(10)) };
  const layers: LayerSpecification[] = [
    { id: "ground", type: "background", paint: { "background-color": palette.ground } },
    { id: "graticule", type: "line", source: "graticule", paint: { "line-color": palette.line } },
  ];
  if (outlines.length > 0) {
    sources.outline = lines(outlines.map(ring));
    const paint = { "line-color": palette.outline, "line-opacity": 0.7, "line-width": 1.5 };
    layers.push({ id: "outline", type: "line", source: "outline", paint });
  }
  if (outlines.length > 1) {
    sources.dots = points(outlines.map(centre));
    const paint = { "circle-color": palette.outline, "circle-radius": 4 };
    layers.push({ id: "dots", type: "circle", source: "dots", paint, maxzoom: DOTS_MAXZOOM });
  }
  if (image !== null) {
    sources.image = raster(image, image.tiles);
    layers.push({ id: "image", type: "raster", source: "image", paint: { "raster-fade-duration": 150 } });
  }
  return { version: 8, sources, layers };
}

/**
 * The upper map: nothing but the class layer on a transparent ground.
 *
 * @param tiles Address of its tiles, with the parameters of the view.
 * @param opacity 0 to 100.
 */
export function classStyle(classes: TileJson | null, tiles: string, opacity: number): StyleSpecification {
  if (classes === null) return { version: 8, sources: {}, layers: [] };
  return {
    version: 8,
    sources: { classes: raster(classes, [tiles]) },
    layers: [{
      id: "classes",
      type: "raster",
      source: "classes",
      // A label is never a mixture of its neighbours, so pixels are not interpolated.
      paint: { "raster-opacity": opacity / 100, "raster-resampling": "nearest", "raster-fade-duration": 100 },
    }],
  };
}

/** Meridians and parallels every `step` degrees. */
export function graticule(step: number): [number, number][][] {
  const result: [number, number][][] = [];
  for (let lon = -180; lon <= 180; lon += step) result.push([[lon, -85], [lon, 85]]);
  for (let lat = -80; lat <= 80; lat += step) result.push([[-180, lat], [180, lat]]);
  return result;
}

function raster(source: TileJson, tiles: readonly string[]): SourceSpecification {
  return {
    type: "raster",
    tiles: [...tiles],
    tileSize: 256,
    bounds: [...source.bounds],
    minzoom: source.minzoom,
    maxzoom: source.maxzoom,
  };
}

function lines(coordinates: [number, number][][]): SourceSpecification {
  return {
    type: "geojson",
    data: { type: "Feature", properties: {}, geometry: { type: "MultiLineString", coordinates } },
  };
}

function points(coordinates: [number, number][]): SourceSpecification {
  return { type: "geojson", data: { type: "Feature", properties: {}, geometry: { type: "MultiPoint", coordinates } } };
}
