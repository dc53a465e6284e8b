/** What the server answers, reduced to what the viewer uses. Optional fields may be missing. */

/** West, south, east, north in degrees. */
export type Bounds = readonly [number, number, number, number];

export interface TileJson {
  readonly tiles: readonly string[];
  readonly bounds: Bounds;
  readonly minzoom: number;
  readonly maxzoom: number;
  readonly attribution: string;
}

export interface Info {
  readonly warnings: readonly string[];
  readonly classesAvailable: boolean;
  /** Whether the codebook has pictures of typical patches. */
  readonly exemplarsAvailable: boolean;
  /** How many images are shown as one layer; null: it is a single image. */
  readonly images: number | null;
}

export interface Codebook {
  readonly name: string;
  readonly title: string;
  readonly classes: number | null;
  readonly installed: boolean;
  /** Whether the server takes this one where none is named. */
  readonly isDefault: boolean;
}

/** A class as it is shown in lists. `color` is `#rrggbb`. */
export interface ClassRef {
  readonly label: number;
  readonly color: string;
  readonly name: string | null;
  /** Address of a picture of typical patches. */
  readonly exemplar: string | null;
}

export interface Neighbour extends ClassRef {
  readonly similarity: number | null;
}

/** Whom to name for a picture; `url` is a web address or null. */
export interface Credit {
  readonly text: string;
  readonly url: string | null;
}

export interface PointAnswer {
  readonly found: Neighbour | null;
  /** Whose images the exemplar was cut from. */
  readonly credits: readonly Credit[];
  readonly neighbours: readonly Neighbour[];
}

export interface ClassArea extends ClassRef {
  readonly areaM2: number;
  readonly share: number;
}

export interface Statistics {
  readonly areaM2: number;
  readonly labelledM2: number;
  readonly classes: readonly ClassArea[];
}
