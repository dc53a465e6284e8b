/** The draggable divider: clips the upper map so that the lower one shows on its left. */

const STEP = 2;
const PAGE = 10;

/** Where a key moves the divider, in percent; null if the key means nothing to it. */
export function splitAfterKey(key: string, split: number): number | null {
  const targets: Record<string, number> = {
    ArrowLeft: split - STEP,
    ArrowDown: split - STEP,
    ArrowRight: split + STEP,
    ArrowUp: split + STEP,
    PageDown: split - PAGE,
    PageUp: split + PAGE,
    Home: 0,
    End: 100,
  };
  const target = targets[key];
  return target === undefined ? null : clampSplit(target);
}

export function clampSplit(split: number): number {
  return Math.min(100, Math.max(0, Math.round(split)));
}

/** The clip of the upper map; without a divider it shows all of it. */
export function clipPath(split: number | null): string {
  return split === null ? "none" : `inset(0 0 0 ${split}%)`;
}

export interface Swipe {
  /** Shows the divider at `split` percent, or hides it (null). */
  set(split: number | null): void;
}

/**
 * @param frame Layer of the divider, as large as the map.
 * @param handle What is dragged and focused.
 * @param upper Container of the map that is clipped.
 * @param onMove Called with the percentage whenever a person moves the divider.
 */
export function createSwipe(
  frame: HTMLElement, handle: HTMLElement, upper: HTMLElement, onMove: (split: number) => void,
): Swipe {
  let current = 50;
  const set = (split: number | null): void => {
    frame.hidden = split === null;
    upper.style.clipPath = clipPath(split);
    if (split === null) return;
    current = split;
    frame.style.setProperty("--split", `${split}%`);
    handle.setAttribute("aria-valuenow", String(split));
    handle.setAttribute("aria-valuetext", `${split} % image, ${100 - split} % classes`);
  };
  const move = (split: number): void => {
    set(split);
    onMove(split);
  };
  handle.addEventListener("pointerdown", (event) => {
    handle.setPointerCapture(event.pointerId);
    handle.focus({ preventScroll: true });
    event.preventDefault();
  });
  handle.addEventListener("pointermove", (event) => {
    if (!handle.hasPointerCapture(event.pointerId)) return;
    const box = frame.getBoundingClientRect();
    move(clampSplit(((event.clientX - box.left) / box.width) * 100));
  });
  handle.addEventListener("keydown", (event) => {
    const split = splitAfterKey(event.key, current);
    if (split === null) return;
    event.preventDefault();
    move(split);
  });
  return { set };
}
