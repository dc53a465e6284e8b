/** Numbers and server texts for people. Pure. */

/** An area with about three digits: 850 m², 12.3 ha, 4.56 km². */
export function formatArea(m2: number): string {
  if (m2 < 1e4) return `${round(m2, m2 < 10 ? 1 : 0)} m²`;
  if (m2 < 1e6) return `${digits(m2 / 1e4)} ha`;
  return `${digits(m2 / 1e6)} km²`;
}

export function formatShare(share: number): string {
  if (share > 0 && share < 0.001) return "< 0.1 %";
  return `${round(share * 100, 1)} %`;
}

export function formatPosition(lon: number, lat: number): string {
  const part = (value: number, plus: string, minus: string): string =>
    `${Math.abs(value).toFixed(5)}° ${value < 0 ? minus : plus}`;
  return `${part(lat, "N", "S")}, ${part(lon, "E", "W")}`;
}

export function formatCount(count: number): string {
  return count.toLocaleString("en-GB");
}

/** The text of an attribution, which may be HTML: tags go, the common entities become characters. */
export function plainText(html: string): string {
  const entities: Record<string, string> = { amp: "&", lt: "<", gt: ">", quot: '"', copy: "©", nbsp: " ", "#39": "'" };
  return html
    .replace(/<[^>]*>/g, "")
    .replace(/&(#39|[a-z]+);/gi, (whole, name: string) => entities[name.toLowerCase()] ?? whole)
    .replace(/\s+/g, " ")
    .trim();
}

function digits(value: number): string {
  return round(value, value < 10 ? 2 : value < 100 ? 1 : 0);
}

function round(value: number, places: number): string {
  return value.toLocaleString("en-GB", { minimumFractionDigits: places, maximumFractionDigits: places });
}
