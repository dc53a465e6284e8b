/** Puts the parts together: state, requests, maps and panel. */
import * as api from "./api";
import { type Config, parseConfig, sameScheme } from "./config";
import { byId } from "./dom";
import { plainText } from "./format";
import { intersect, mapZoom, nearest, tileZoom } from "./geo";
import { MapPair } from "./maps";
import * as panel from "./panel";
import { DEFAULTS, formatState, hasPosition, type Layer, type Mode, parseState, type State } from "./state";
import { createSwipe, type Swipe } from "./swipe";
import type { Bounds, Codebook, Statistics, TileJson } from "./types";

/** An image that is open. */
interface Dataset {
  readonly image: TileJson | null;
  readonly classes: TileJson;
  /** Bounds of each image that is shown. */
  readonly outlines: readonly Bounds[];
  readonly classesAvailable: boolean;
  readonly exemplarsAvailable: boolean;
}

const LAYER_HINTS: Record<Layer, string> = {
  classes: "",
  similarity: "How well each patch fits its class: where the codebook does not know the ground, it is low.",
};

class Viewer {
  readonly #config: Config;
  readonly #maps: MapPair;
  readonly #swipe: Swipe;
  /** Whether the page was opened with a map position in its address. */
  readonly #shared: boolean;
  #state: State;
  #dataset: Dataset | null = null;
  #codebooks: readonly Codebook[] = [];
  #picked: panel.Picked | null = null;
  #statistics: panel.Progress<Statistics> = { kind: "none" };
  #moved = false;
  #addressTimer: ReturnType<typeof setTimeout> | undefined;
  #opening = new AbortController();
  #picking = new AbortController();
  #measuring = new AbortController();

  constructor(config: Config) {
    this.#config = config;
    this.#state = this.#readState();
    this.#shared = hasPosition(location.hash); // before the map writes its own
    this.#maps = new MapPair(byId("map-image"), byId("map-classes"), {
      onClick: (lon, lat) => void this.#pick(lon, lat),
      onMoveEnd: () => this.#onMoveEnd(),
      onZoom: () => this.#renderZoomNote(),
      onBusy: (busy) => this.#renderBusy(busy),
      onTileError: (sentence) => (byId("error").textContent = sentence),
    });
    this.#swipe = createSwipe(byId("swipe"), byId("swipe-handle"), byId("map-classes"), (split) =>
      this.#adjust({ split }),
    );
    this.#listen();
  }

  async start(): Promise<void> {
    this.#renderForm();
    this.#render();
    if (this.#state.url !== null) void this.#open(!this.#shared);
    try {
      this.#codebooks = await api.fetchCodebooks(this.#config);
    } catch {
      // The list only helps to choose: without it the codebook of the address, or the default, is in use.
    }
    this.#renderCodebooks();
  }

  #readState(): State {
    const { url, codebook, demoUrl } = this.#config;
    return parseState(location.search, { ...DEFAULTS, url: url ?? demoUrl, codebook });
  }

  #listen(): void {
    byId("open").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#submit();
    });
    for (const radio of document.querySelectorAll<HTMLInputElement>("input[name=mode]")) {
      radio.addEventListener("change", () => this.#update({ mode: radio.value as Mode }));
    }
    const opacity = byId<HTMLInputElement>("opacity");
    opacity.addEventListener("input", () => this.#adjust({ opacity: opacity.valueAsNumber }));
    const layer = byId<HTMLSelectElement>("layer");
    layer.addEventListener("change", () => this.#update({ layer: layer.value as Layer }));
    const classes = byId<HTMLSelectElement>("classes");
    classes.addEventListener("change", () => this.#setClasses(classes.value === "" ? null : Number(classes.value)));
    byId("stats-button").addEventListener("click", () => void this.#measure());
    byId("zoom-in").addEventListener("click", () => {
      if (this.#dataset === null) return;
      const { classes, outlines } = this.#dataset;
      const place = outlines.length > 1 ? nearest(outlines, this.#maps.centre()) : null;
      this.#maps.zoomTo(mapZoom(classes.minzoom, api.TILE_SIZE), place);
    });
    addEventListener("popstate", () => this.#onHistory());
  }

  /** Changes the state, the page's address and all that depends on it. */
  #update(change: Partial<State>): void {
    this.#state = { ...this.#state, ...change };
    byId("error").textContent = "";
    this.#writeAddress("replaceState");
    this.#render();
  }

  /** Changes what a drag changes many times a second: browsers refuse to rewrite the address that often. */
  #adjust(change: Partial<State>): void {
    this.#state = { ...this.#state, ...change };
    clearTimeout(this.#addressTimer);
    this.#addressTimer = setTimeout(() => this.#writeAddress("replaceState"), 250);
    this.#renderScene();
  }

  #writeAddress(method: "pushState" | "replaceState"): void {
    clearTimeout(this.#addressTimer);
    const address = `${location.pathname}${formatState(this.#state, location.search)}${location.hash}`;
    history[method](history.state, "", address);
  }

  #onHistory(): void {
    const before = this.#state;
    this.#state = this.#readState();
    this.#renderForm();
    this.#render();
    const same = before.url === this.#state.url && before.codebook === this.#state.codebook;
    if (same) return;
    if (this.#state.url !== null) void this.#open(!hasPosition(location.hash));
    else {
      this.#opening.abort();
      this.#close();
    }
  }

  #submit(): void {
    const url = byId<HTMLInputElement>("url").value.trim();
    const codebook = byId<HTMLSelectElement>("codebook").value || null;
    if (url === "") return;
    const same = codebook === this.#state.codebook;
    const moves = url !== this.#state.url || this.#dataset === null;
    if (url !== this.#state.url) this.#state = { ...this.#state, expires: null, signature: null };
    this.#state = { ...this.#state, url, codebook, ...(same ? {} : { highlight: null, classes: null }) };
    this.#writeAddress("pushState");
    void this.#open(moves);
  }

  async #open(fit: boolean): Promise<void> {
    this.#opening.abort();
    this.#opening = new AbortController();
    const { signal } = this.#opening;
    const { error, button } = { error: byId("error"), button: byId("open-button") };
    this.#close();
    error.textContent = "";
    button.textContent = "Opening…";
    button.setAttribute("aria-busy", "true");
    byId("status").textContent = "Opening the image…";
    try {
      this.#dataset = await this.#load(signal);
      if (fit) this.#maps.fit(this.#dataset.classes.bounds);
      byId("status").textContent = "";
    } catch (reason) {
      if (api.isAbort(reason)) return;
      error.textContent = sentence(reason);
      byId("status").textContent = "";
    }
    button.textContent = "Open";
    button.removeAttribute("aria-busy");
    this.#render();
  }

  async #load(signal: AbortSignal): Promise<Dataset> {
    const [config, state] = [this.#config, this.#state];
    const imageTileSize = devicePixelRatio > 1.25 ? 512 : 256;
    const asked = api.fetchInfo(config, state, signal);
    // Only a single image has tiles of its own pixels.
    const single = asked.then((found) => found.images === null, () => true);
    const [info, classes, image, footprints] = await Promise.allSettled([
      asked,
      api.fetchTileJson(api.classTileJsonUrl(config, state), signal),
      single.then((one) => (one ? api.fetchTileJson(api.imageTileJsonUrl(config, state, imageTileSize), signal) : null)),
      single.then((one) => (one ? [] : api.fetchFootprints(config, state, signal))),
    ]);
    if (classes.status === "rejected") throw classes.reason;
    signal.throwIfAborted();
    const warnings = info.status === "fulfilled" ? [...info.value.warnings] : [sentence(info.reason)];
    const images = info.status === "fulfilled" ? info.value.images : null;
    if (images !== null) warnings.push(`${images} images as one layer: their classes are shown, not their pixels.`);
    if (image.status === "rejected") warnings.push(`The image itself cannot be shown. ${sentence(image.reason)}`);
    panel.renderWarnings(byId("warnings"), warnings);
    return {
      image: image.status === "fulfilled" && image.value !== null ? this.#sameScheme(image.value) : null,
      classes: this.#sameScheme(classes.value),
      outlines: footprints.status === "fulfilled" && footprints.value.length > 0
        ? footprints.value
        : [classes.value.bounds],
      classesAvailable: info.status === "rejected" || info.value.classesAvailable,
      exemplarsAvailable: info.status === "fulfilled" && info.value.exemplarsAvailable,
    };
  }

  #sameScheme(tilejson: TileJson): TileJson {
    return { ...tilejson, tiles: tilejson.tiles.map((tile) => sameScheme(tile, location.href)) };
  }

  #close(): void {
    this.#dataset = null;
    this.#forget();
    this.#maps.mark(null);
    panel.renderWarnings(byId("warnings"), []);
    this.#render();
  }

  /** Drops answers that belong to other labels than those shown now. */
  #forget(): void {
    this.#picking.abort();
    this.#measuring.abort();
    this.#picked = null;
    this.#statistics = { kind: "none" };
  }

  #setClasses(classes: number | null): void {
    const picked = this.#picked;
    this.#forget();
    this.#update({ classes, highlight: null });
    if (picked !== null) void this.#pick(picked.lon, picked.lat);
  }

  async #pick(lon: number, lat: number): Promise<void> {
    if (this.#dataset === null) return;
    this.#picking.abort();
    this.#picking = new AbortController();
    const show = (progress: panel.Picked["progress"]): void => {
      this.#picked = { lon, lat, progress };
      this.#renderPick();
    };
    this.#maps.mark([lon, lat]);
    show({ kind: "busy" });
    byId("pick-section").scrollIntoView({ block: "nearest", behavior: "smooth" });
    const { signal } = this.#picking;
    try {
      const answer = await api.fetchPoint(this.#config, this.#state, lon, lat, signal);
      show({ kind: "done", answer });
      const { found } = answer;
      if (found !== null && found.exemplar !== null) {
        const credits = await api.fetchCredits(this.#config, this.#state, found.label, signal).catch(() => []);
        if (!signal.aborted) show({ kind: "done", answer: { ...answer, credits } });
      }
    } catch (reason) {
      if (!api.isAbort(reason)) show({ kind: "error", sentence: sentence(reason) });
    }
    byId("pick-section").scrollIntoView({ block: "nearest", behavior: "smooth" });
  }

  /** Measures the classes in view; pressed again while it works, it stops. */
  async #measure(): Promise<void> {
    if (this.#statistics.kind === "busy") {
      this.#measuring.abort();
      return;
    }
    const bounds = this.#dataset && intersect(this.#maps.bounds(), this.#dataset.classes.bounds);
    if (bounds === null) return this.#showStatistics({ kind: "error", sentence: "The image is not in view." });
    this.#measuring = new AbortController();
    const { signal } = this.#measuring;
    this.#moved = false;
    this.#showStatistics({ kind: "busy" });
    try {
      const answer = await api.fetchStatistics(this.#config, this.#state, bounds, signal);
      const classes = answer.classes.map((each) => ({ ...each, exemplar: this.#exemplar(each.label) }));
      this.#showStatistics({ kind: "done", answer: { ...answer, classes } });
    } catch (reason) {
      this.#showStatistics(api.isAbort(reason) ? { kind: "none" } : { kind: "error", sentence: sentence(reason) });
    }
  }

  /** Statistics name no exemplars, as there may be thousands of classes in an answer that people keep. */
  #exemplar(label: number): string | null {
    return this.#dataset?.exemplarsAvailable ? api.exemplarUrl(this.#config, this.#state, label, "webp") : null;
  }

  #showStatistics(progress: panel.Progress<Statistics>): void {
    this.#statistics = progress;
    this.#renderStatistics();
  }

  #onMoveEnd(): void {
    if (this.#moved || this.#statistics.kind !== "done") return;
    this.#moved = true;
    this.#renderStatistics();
  }

  #highlighting(): panel.Highlighting {
    return {
      label: this.#state.highlight,
      available: this.#state.layer === "classes",
      toggle: (label) => this.#update({ highlight: this.#state.highlight === label ? null : label }),
    };
  }

  #render(): void {
    const { url, layer, classes, mode } = this.#state;
    byId("tools").hidden = this.#dataset === null;
    byId("welcome").hidden = url !== null;
    for (const radio of document.querySelectorAll<HTMLInputElement>("input[name=mode]")) {
      radio.checked = radio.value === mode;
    }
    byId<HTMLSelectElement>("layer").value = layer;
    byId("layer-hint").textContent = LAYER_HINTS[layer];
    byId<HTMLSelectElement>("classes").value = String(classes ?? "");
    byId("classes-field").hidden = this.#dataset?.classesAvailable === false;
    byId("swipe-right").textContent = layer === "classes" ? "Classes" : "Similarity";
    panel.renderHighlight(byId("highlight"), this.#highlighting());
    this.#renderScene();
    this.#renderLinks();
    this.#renderPick();
    this.#renderStatistics();
    this.#renderZoomNote();
    this.#renderAttribution();
  }

  #renderScene(): void {
    const { opacity } = this.#state;
    const dataset = this.#dataset;
    byId<HTMLInputElement>("opacity").value = String(opacity);
    byId("opacity-value").textContent = `${opacity} %`;
    this.#renderSwipe();
    void this.#maps.show({
      image: dataset?.image ?? null,
      classes: dataset?.classes ?? null,
      outlines: dataset?.outlines ?? [],
      classTiles: api.withParams(dataset?.classes.tiles[0] ?? "", api.drawing(this.#state)),
      opacity,
    });
  }

  /** Fills in the form; not with every change, for it may hold what a person has begun to choose. */
  #renderForm(): void {
    byId<HTMLInputElement>("url").value = this.#state.url ?? "";
    this.#renderCodebooks();
  }

  #renderCodebooks(): void {
    panel.renderCodebooks(byId<HTMLSelectElement>("codebook"), this.#codebooks, this.#state.codebook);
  }

  #renderAttribution(): void {
    const sources = [this.#dataset?.image, this.#dataset?.classes];
    const credits = sources.map((source) => plainText(source?.attribution ?? ""));
    byId("attribution").textContent = [...new Set(credits), "MapLibre"].filter((text) => text !== "").join(" | ");
  }

  #renderPick(): void {
    panel.renderPick(byId("pick"), this.#picked, this.#highlighting());
  }

  #renderStatistics(): void {
    byId("stats-button").textContent = this.#statistics.kind === "busy" ? "Cancel" : "Measure";
    panel.renderStatistics(byId("stats"), this.#statistics, this.#moved, this.#highlighting());
  }

  #renderLinks(): void {
    const { xyz, tilejson, wmts } = api.links(this.#config, this.#state);
    panel.renderLinks(byId("links-body"), [
      { name: "XYZ", hint: "QGIS, Leaflet, MapLibre", address: xyz },
      { name: "TileJSON", hint: "MapLibre", address: tilejson },
      { name: "WMTS", hint: "QGIS, ArcGIS", address: wmts },
    ]);
  }

  #renderZoomNote(): void {
    byId("zoom-note").hidden = this.#dataset === null || this.#classesInZoom();
    this.#renderSwipe();
  }

  /** There is a divider as long as there are classes to divide from the image. */
  #renderSwipe(): void {
    const parted = this.#dataset?.image != null && this.#classesInZoom() && this.#state.mode === "swipe";
    this.#swipe.set(parted ? this.#state.split : null);
  }

  #classesInZoom(): boolean {
    return tileZoom(this.#maps.zoom(), api.TILE_SIZE) >= (this.#dataset?.classes.minzoom ?? 0);
  }

  #renderBusy(busy: boolean): void {
    byId("loading").hidden = !busy;
    if (this.#dataset !== null) byId("status").textContent = busy ? "Loading tiles…" : "";
  }
}

function sentence(reason: unknown): string {
  return reason instanceof api.ApiError ? reason.message : "Something went wrong in this page.";
}

try {
  const config = parseConfig(byId("config").textContent ?? "", location.href);
  void new Viewer(config).start();
} catch (reason) {
  byId("error").textContent = reason instanceof Error ? reason.message : String(reason);
}
