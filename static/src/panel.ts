/** What the panel's sections show. Each function replaces the content of the element it is given. */
import { sameScheme } from "./config";
import { el, fill } from "./dom";
import { formatArea, formatCount, formatPosition, formatShare } from "./format";
import type { ClassRef, Codebook, Credit, PointAnswer, Statistics } from "./types";

const TOP = 10;

/** What a request of a section has come to. */
export type Progress<T> =
  | { readonly kind: "none" }
  | { readonly kind: "busy" }
  | { readonly kind: "error"; readonly sentence: string }
  | { readonly kind: "done"; readonly answer: T };

export interface Highlighting {
  readonly label: number | null;
  readonly available: boolean;
  toggle(label: number): void;
}

export interface Picked {
  readonly lon: number;
  readonly lat: number;
  readonly progress: Progress<PointAnswer>;
}

export function title(ref: ClassRef): string {
  return ref.name ?? `Class ${ref.label}`;
}

function swatch(color: string): HTMLElement {
  const square = el("span", { class: "swatch", attributes: { "aria-hidden": "true" } });
  square.style.backgroundColor = color;
  return square;
}

/** The picture of typical patches; one that cannot be loaded goes away. */
function exemplar({ exemplar: address }: ClassRef, alt: string): HTMLImageElement | null {
  if (address === null) return null;
  const size = { width: "192", height: "48", loading: "lazy", decoding: "async" };
  const image = el("img", { class: "exemplar", attributes: { alt, ...size } });
  image.addEventListener("error", () => (image.closest(".peek, figure") ?? image).remove());
  image.src = sameScheme(address, location.href);
  return image;
}

/** A small part of the picture, which a row shows whole while it is pointed at or focused. */
function peek(ref: ClassRef): HTMLElement | null {
  const image = exemplar(ref, "");
  return image && el("span", { class: "peek" }, image);
}

/** A line of a list: the class, its value, a bar, and a press highlights it. */
function classRow(ref: ClassRef, value: string, share: number | null, highlighting: Highlighting): HTMLElement {
  const pressed = highlighting.label === ref.label;
  const button = el(
    "button",
    {
      class: "class-row",
      attributes: {
        type: "button",
        "aria-pressed": String(pressed),
        title: pressed ? "Show all classes" : "Highlight this class",
      },
      onClick: () => highlighting.toggle(ref.label),
    },
    swatch(ref.color),
    el("span", { class: "class-name" }, peek(ref), title(ref)),
    el("span", { class: "class-value" }, value),
  );
  button.disabled = !highlighting.available;
  if (share !== null) {
    const bar = el("span", { class: "bar", attributes: { "aria-hidden": "true" } }, el("span"));
    const part = bar.firstElementChild as HTMLElement;
    part.style.width = `${Math.min(100, Math.max(0, share * 100))}%`;
    part.style.backgroundColor = ref.color;
    button.append(bar);
  }
  return el("li", {}, button);
}

export function renderPick(root: HTMLElement, picked: Picked | null, highlighting: Highlighting): void {
  if (picked === null) {
    fill(root, el("p", { class: "hint" }, "Click the map to see which class a patch of ground has."));
    return;
  }
  const place = el("p", { class: "hint" }, formatPosition(picked.lon, picked.lat));
  const { progress } = picked;
  if (progress.kind === "error") fill(root, el("p", { class: "error" }, progress.sentence), place);
  else if (progress.kind !== "done") fill(root, el("p", { class: "busy" }, "Looking up the class…"), place);
  else fill(root, ...pickedClass(progress.answer, highlighting), place);
}

function pickedClass({ found, credits, neighbours }: PointAnswer, highlighting: Highlighting): HTMLElement[] {
  if (found === null) return [el("p", { class: "pick-empty" }, "No data here.")];
  const similarity = found.similarity === null ? null : found.similarity.toFixed(2);
  const heading = el(
    "div",
    { class: "picked" },
    swatch(found.color),
    el(
      "div",
      {},
      el("strong", { class: "picked-name" }, title(found)),
      el(
        "span",
        { class: "picked-detail" },
        [`Label ${found.label}`, similarity && `similarity ${similarity}`].filter(Boolean).join(" · "),
      ),
    ),
  );
  const parts: HTMLElement[] = [heading];
  const picture = exemplar(found, `Typical patches of ${title(found)}, each in the middle of what surrounds it`);
  if (picture !== null) {
    parts.push(el("figure", {}, picture, el("figcaption", { class: "hint" }, "Typical patches", ...credited(credits))));
  }
  if (highlighting.available) {
    const box = el("input", { attributes: { type: "checkbox", id: "highlight-toggle" } });
    box.checked = highlighting.label === found.label;
    box.addEventListener("change", () => highlighting.toggle(found.label));
    parts.push(el("label", { class: "check" }, box, el("span", {}, "Highlight this class")));
  }
  if (neighbours.length > 0) {
    const rows = neighbours.map((each) => classRow(each, each.similarity?.toFixed(2) ?? "", null, highlighting));
    parts.push(el("h3", {}, "Most similar classes"), el("ul", { class: "class-list" }, ...rows));
  }
  return parts;
}

function credited(credits: readonly Credit[]): (Node | string)[] {
  return credits.flatMap(({ text, url }, index) => [
    index === 0 ? ". Images: " : ", ",
    url === null ? text : el("a", { attributes: { href: url, target: "_blank", rel: "noopener noreferrer" } }, text),
  ]);
}

/** @param moved Whether the map has moved since the area was measured. */
export function renderStatistics(
  root: HTMLElement, progress: Progress<Statistics>, moved: boolean, highlighting: Highlighting,
): void {
  if (progress.kind === "none") {
    fill(root, el("p", { class: "hint" }, "Share of each class in the part of the image that you see."));
  } else if (progress.kind === "busy") {
    fill(root, el("p", { class: "busy" }, "Measuring…"));
  } else if (progress.kind === "error") {
    fill(root, el("p", { class: "error" }, progress.sentence));
  } else {
    fill(root, ...areas(progress.answer, moved, highlighting));
  }
}

function areas(answer: Statistics, moved: boolean, highlighting: Highlighting): HTMLElement[] {
  if (answer.classes.length === 0) return [el("p", { class: "pick-empty" }, "No data in view.")];
  const top = answer.classes.slice(0, TOP);
  const largest = Math.max(...top.map((each) => each.share), Number.EPSILON);
  const rows = top.map((each) =>
    classRow(each, `${formatShare(each.share)} · ${formatArea(each.areaM2)}`, each.share / largest, highlighting),
  );
  const rest = answer.classes.length - top.length;
  const more = rest > 0 ? `, and ${formatCount(rest)} smaller ${rest === 1 ? "class" : "classes"}` : "";
  const parts: HTMLElement[] = [
    el("ol", { class: "class-list" }, ...rows),
    el("p", { class: "hint" }, `${formatArea(answer.labelledM2)} labelled of ${formatArea(answer.areaM2)}${more}.`),
  ];
  if (moved) parts.push(el("p", { class: "hint" }, "The map has moved since: measure again for this view."));
  return parts;
}

/** A reminder of the highlighted class that also works for a view opened from a shared address. */
export function renderHighlight(root: HTMLElement, highlighting: Highlighting): void {
  const { label } = highlighting;
  if (label === null || !highlighting.available) {
    fill(root);
    return;
  }
  const clear = el("button", { class: "link", attributes: { type: "button" } }, "Show all");
  clear.addEventListener("click", () => highlighting.toggle(label));
  fill(root, el("p", { class: "chip" }, el("span", {}, `Highlighting class ${label}`), clear));
}

export function renderWarnings(root: HTMLElement, warnings: readonly string[]): void {
  fill(root, ...warnings.map((warning) => el("li", {}, warning)));
}

/** @param chosen Name of the codebook in use; null is the server's own choice. */
export function renderCodebooks(select: HTMLSelectElement, codebooks: readonly Codebook[], chosen: string | null): void {
  const option = (value: string, label: string): HTMLOptionElement => el("option", { attributes: { value } }, label);
  const options = codebooks.map(({ name, title: text, classes, installed }) => {
    const notes = [classes === null || /\bclasses\b/i.test(text) ? "" : `${formatCount(classes)} classes`, installed ? "" : "not installed"];
    const note = notes.filter((each) => each !== "").join(", ");
    return option(name, note === "" ? text : `${text} (${note})`);
  });
  if (chosen === null) {
    const standard = codebooks.find(({ isDefault }) => isDefault);
    options.unshift(option("", standard === undefined ? "Server's default" : `Default: ${standard.title}`));
  }
  if (chosen !== null && !codebooks.some(({ name }) => name === chosen)) options.push(option(chosen, chosen));
  select.replaceChildren(...options);
  select.value = chosen ?? "";
}

export function renderLinks(root: HTMLElement, links: readonly { name: string; hint: string; address: string }[]): void {
  fill(root, ...links.map((link) => copyField(link.name, link.hint, link.address)));
}

function copyField(name: string, hint: string, address: string): HTMLElement {
  const id = `link-${name.toLowerCase()}`;
  const input = el("input", { attributes: { id, type: "text", readonly: "", spellcheck: "false" } });
  input.value = address;
  input.addEventListener("focus", () => input.select());
  const button = el("button", { attributes: { type: "button", "aria-label": `Copy the ${name} address` } }, "Copy");
  button.addEventListener("click", () => {
    void copy(input).then((copied) => {
      button.textContent = copied ? "Copied" : "Press Ctrl+C";
      setTimeout(() => (button.textContent = "Copy"), 2000);
    });
  });
  return el(
    "div",
    { class: "copy" },
    el("label", { attributes: { for: id } }, name, el("span", { class: "hint" }, ` ${hint}`)),
    el("div", { class: "row" }, input, button),
  );
}

/** Copies the text of a field. Pages without TLS have no clipboard API, so the old command is the way out. */
async function copy(input: HTMLInputElement): Promise<boolean> {
  try {
    await navigator.clipboard.writeText(input.value);
    return true;
  } catch {
    input.focus();
    input.select();
    return document.execCommand("copy");
  }
}
