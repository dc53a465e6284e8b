/** The configuration that the server writes into the page. */

export interface Config {
  /** Routes of the class layer, without a slash at the end. */
  readonly endpoint: string;
  /** TiTiler's own routes for the image. */
  readonly sourceEndpoint: string;
  readonly codebooksUrl: string;
  readonly url: string | null;
  readonly codebook: string | null;
  readonly demoUrl: string | null;
}

/**
 * Reads the configuration.
 *
 * @param text Content of the page's `#config` element.
 * @param page Address of the page; endpoints may be relative to it.
 * @throws Error if it is no JSON object with an endpoint.
 */
export function parseConfig(text: string, page: string): Config {
  let raw: unknown;
  try {
    raw = JSON.parse(text);
  } catch {
    throw new Error("The server did not configure this page.");
  }
  const fields = (raw ?? {}) as Record<string, unknown>;
  const given = (key: string): string | null => {
    const value = fields[key];
    return typeof value === "string" && value !== "" ? value : null;
  };
  const endpoint = given("endpoint");
  if (endpoint === null) throw new Error("The server did not configure this page.");
  const absolute = (address: string): string => sameScheme(new URL(address, page).href, page).replace(/\/+$/, "");
  const source = absolute(given("source_endpoint") ?? endpoint.replace(/\/geocentroids\/*$/, ""));
  return {
    endpoint: absolute(endpoint),
    sourceEndpoint: source,
    codebooksUrl: absolute(given("codebooks_url") ?? new URL("../geocentroids/codebooks", `${source}/`).href),
    url: given("url"),
    codebook: given("codebook"),
    demoUrl: given("demo_url"),
  };
}

/**
 * Gives an address on the page's own host the page's scheme.
 *
 * Behind a proxy that ends TLS and does not say so, a server writes http addresses into an https page, and
 * the browser would block them as mixed content.
 */
export function sameScheme(address: string, page: string): string {
  const secure = page.startsWith("https:") && address.startsWith("http:");
  if (!secure) return address;
  const host = /^http:\/\/([^/?#]*)/.exec(address)?.[1];
  return host === new URL(page).host ? `https${address.slice("http".length)}` : address;
}
