/** Building page elements. Text always goes in as text nodes, never as markup. */

type Child = Node | string | null;

interface Options {
  readonly class?: string;
  readonly attributes?: Readonly<Record<string, string>>;
  readonly onClick?: () => void;
}

export function el<K extends keyof HTMLElementTagNameMap>(
  tag: K, options: Options = {}, ...children: Child[]
): HTMLElementTagNameMap[K] {
  const element = document.createElement(tag);
  if (options.class !== undefined) element.className = options.class;
  for (const [name, value] of Object.entries(options.attributes ?? {})) element.setAttribute(name, value);
  if (options.onClick !== undefined) element.addEventListener("click", options.onClick);
  element.append(...children.filter((child): child is Node | string => child !== null));
  return element;
}

/** Finds an element that the page is known to hold. */
export function byId<T extends HTMLElement = HTMLElement>(id: string): T {
  const element = document.getElementById(id);
  if (element === null) throw new Error(`The page has no element #${id}.`);
  return element as T;
}

/** Replaces what `root` holds; the keyboard focus stays at the same place in the order of its controls. */
export function fill(root: HTMLElement, ...children: Node[]): void {
  const controls = (): HTMLElement[] => [...root.querySelectorAll<HTMLElement>("button, input")];
  const focused = controls().indexOf(document.activeElement as HTMLElement);
  root.replaceChildren(...children);
  if (focused >= 0) controls()[focused]?.focus({ preventScroll: true });
}
