/** The state of a view and its form in the page's query string. Pure. */

export const CLASS_COUNTS = [8, 24, 64] as const;
export type Layer = "classes" | "similarity";
export type Mode = "swipe" | "overlay";

export interface State {
  readonly url: string | null;
  /** Until when `signature` is valid, as it was signed; null is for ever. */
  readonly expires: string | null;
  /** Opens the image on a server that asks for it; it belongs to `url`. */
  readonly signature: string | null;
  readonly codebook: string | null;
  /** Number of merged classes; null is all of them. */
  readonly classes: number | null;
  readonly layer: Layer;
  /** Label whose class stands out; null is none. */
  readonly highlight: number | null;
  readonly mode: Mode;
  /** Of the class layer, 0 to 100. */
  readonly opacity: number;
  /** Where the swipe divider is, in percent from the left. */
  readonly split: number;
}

export const DEFAULTS: State = {
  url: null,
  expires: null,
  signature: null,
  codebook: null,
  classes: null,
  layer: "classes",
  highlight: null,
  mode: "swipe",
  opacity: 100,
  split: 50,
};

/** Reads the state; what is missing or not understood takes the value of `defaults`. */
export function parseState(search: string, defaults: State = DEFAULTS): State {
  const query = new URLSearchParams(search);
  const text = (key: string): string | null => query.get(key)?.trim() || null;
  const whole = (key: string, max: number): number | null => {
    const value = text(key);
    return value !== null && /^\d{1,6}$/.test(value) && Number(value) <= max ? Number(value) : null;
  };
  const classes = whole("classes", 65535);
  const layer = text("layer");
  const mode = text("mode");
  return {
    url: text("url") ?? defaults.url,
    expires: text("expires") ?? defaults.expires,
    signature: text("signature") ?? defaults.signature,
    codebook: text("codebook") ?? defaults.codebook,
    classes: (CLASS_COUNTS as readonly (number | null)[]).includes(classes) ? classes : defaults.classes,
    layer: layer === "similarity" || layer === "classes" ? layer : defaults.layer,
    highlight: whole("highlight", 65534) ?? defaults.highlight,
    mode: mode === "swipe" || mode === "overlay" ? mode : defaults.mode,
    opacity: whole("opacity", 100) ?? defaults.opacity,
    split: whole("split", 100) ?? defaults.split,
  };
}

/**
 * Writes the state as a query string, leaving out what is at its default.
 *
 * @param search The present query string; parameters that are not ours stay in it.
 */
export function formatState(state: State, search = ""): string {
  const query = new URLSearchParams(search);
  for (const key of Object.keys(DEFAULTS) as (keyof State)[]) {
    const value = state[key];
    if (value === null || value === DEFAULTS[key]) query.delete(key);
    else query.set(key, String(value));
  }
  const text = query.toString();
  return text === "" ? "" : `?${text}`;
}

/** Whether a page address carries a map position, as MapLibre writes it: `#zoom/lat/lon`. */
export function hasPosition(hash: string): boolean {
  return /^#\d+(\.\d+)?\/-?\d+(\.\d+)?\/-?\d+(\.\d+)?/.test(hash);
}
