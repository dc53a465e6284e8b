/** Two MapLibre maps that move as one: the image below, the classes above. */
import { type ErrorEvent, Map as MapLibre, Marker, NavigationControl, ScaleControl, setWorkerUrl } from "maplibre-gl";
import { errorSentence } from "./api";
import { el } from "./dom";
import { classStyle, DARK, imageStyle, LIGHT, type Palette } from "./style";
import type { Bounds, TileJson } from "./types";

/** Where MapLibre's worker lies beside this script; the build fills it in. */
declare const WORKER_FILE: string;

/** What both maps show. */
export interface Scene {
  readonly image: TileJson | null;
  readonly classes: TileJson | null;
  readonly classTiles: string;
  /** Bounds of each image. */
  readonly outlines: readonly Bounds[];
  readonly opacity: number;
}

export interface Listeners {
  onClick(lon: number, lat: number): void;
  onMoveEnd(): void;
  onZoom(zoom: number): void;
  onBusy(busy: boolean): void;
  onTileError(sentence: string): void;
}

const EMPTY: Scene = { image: null, classes: null, classTiles: "", outlines: [], opacity: 100 };

export class MapPair {
  readonly #image: MapLibre;
  readonly #classes: MapLibre;
  readonly #ready: Promise<unknown>;
  readonly #marker = new Marker({ element: el("div", { class: "pin" }) });
  readonly #dark = matchMedia("(prefers-color-scheme: dark)");
  #scene = EMPTY;

  constructor(image: HTMLElement, classes: HTMLElement, listeners: Listeners) {
    setWorkerUrl(new URL(WORKER_FILE, import.meta.url).href);
    const common = { attributionControl: false as const, pitchWithRotate: false, dragRotate: false, maxPitch: 0 };
    this.#image = new MapLibre({
      ...common,
      container: image,
      style: imageStyle(this.#palette(), null, []),
      center: [0, 20],
      zoom: 1,
      maxZoom: 22,
      hash: true,
    });
    this.#classes = new MapLibre({
      ...common,
      container: classes,
      style: classStyle(null, "", 100),
      center: this.#image.getCenter(),
      zoom: this.#image.getZoom(),
      maxZoom: 22,
      interactive: false,
    });
    this.#image.touchZoomRotate.disableRotation();
    this.#image.keyboard.disableRotation();
    this.#image.addControl(new NavigationControl({ showCompass: false }), "top-right");
    this.#image.addControl(new ScaleControl({ maxWidth: 110 }), "bottom-left");
    const maps = [this.#image, this.#classes];
    this.#ready = Promise.all(maps.map((map) => map.once("style.load")));
    this.#image.on("move", () => this.#follow());
    this.#listen(maps, listeners);
    this.#dark.addEventListener("change", () => void this.show(this.#scene));
  }

  #palette(): Palette {
    return this.#dark.matches ? DARK : LIGHT;
  }

  /** Moves the upper map in the very frame in which the lower one moves, so that they never part. */
  #follow(): void {
    this.#classes.jumpTo({ center: this.#image.getCenter(), zoom: this.#image.getZoom() });
    this.#classes.redraw();
  }

  #listen(maps: readonly MapLibre[], listeners: Listeners): void {
    this.#image.on("click", (event) => {
      const { lng, lat } = event.lngLat.wrap();
      listeners.onClick(lng, lat);
    });
    this.#image.on("moveend", () => listeners.onMoveEnd());
    this.#image.on("zoom", () => listeners.onZoom(this.#image.getZoom()));
    for (const map of maps) {
      map.on("dataloading", () => listeners.onBusy(true));
      map.on("idle", () => listeners.onBusy(!maps.every((each) => each.loaded())));
      map.on("error", (event) => void tileError(event).then((sentence) => listeners.onTileError(sentence)));
    }
  }

  /** Shows a scene; MapLibre changes only what differs from the one before. */
  async show(scene: Scene): Promise<void> {
    this.#scene = scene;
    await this.#ready;
    if (scene !== this.#scene) return;
    this.#image.setStyle(imageStyle(this.#palette(), scene.image, scene.outlines));
    this.#classes.setStyle(classStyle(scene.classes, scene.classTiles, scene.opacity));
  }

  fit([west, south, east, north]: Bounds): void {
    this.#image.fitBounds([west, south, east, north], { padding: 24, duration: 0, maxZoom: 19 });
  }

  /** Zooms, to a place or where the map is. */
  zoomTo(zoom: number, place: readonly [number, number] | null): void {
    this.#image.easeTo({ zoom, ...(place === null ? {} : { center: [place[0], place[1]] }) });
  }

  centre(): [number, number] {
    const { lng, lat } = this.#image.getCenter().wrap();
    return [lng, lat];
  }

  zoom(): number {
    return this.#image.getZoom();
  }

  bounds(): Bounds {
    const box = this.#image.getBounds();
    return [box.getWest(), box.getSouth(), box.getEast(), box.getNorth()];
  }

  mark(position: readonly [number, number] | null): void {
    if (position === null) this.#marker.remove();
    else this.#marker.setLngLat([position[0], position[1]]).addTo(this.#image);
  }
}

/** Why a tile did not come, in the server's words if it gave some. */
async function tileError(event: ErrorEvent): Promise<string> {
  const { status, body } = event.error as { status?: number; body?: Blob };
  if (status === undefined || status === 0) return "Some tiles could not be loaded.";
  return `Some tiles could not be loaded: ${errorSentence(status, (await body?.text()) ?? "")}`;
}
