// Builds the viewer into dist/, or with --tests the unit tests into build/tests/.
import { createHash } from "node:crypto";
import { copyFile, mkdir, readdir, readFile, rm, writeFile } from "node:fs/promises";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import { build } from "esbuild";

const root = dirname(fileURLToPath(import.meta.url));
const at = (...parts) => join(root, ...parts);

if (process.argv.includes("--tests")) {
  await rm(at("build", "tests"), { recursive: true, force: true });
  const tests = (await readdir(at("tests"))).filter((name) => name.endsWith(".test.ts"));
  await build({
    entryPoints: tests.map((name) => at("tests", name)),
    outdir: at("build", "tests"),
    bundle: true,
    platform: "node",
    format: "esm",
    target: "node20",
    logLevel: "warning",
  });
} else {
  await rm(at("dist"), { recursive: true, force: true });
  await mkdir(at("dist"), { recursive: true });
  await build({
    entryPoints: { app: at("src", "main.ts"), style: at("src", "style.css") },
    outdir: at("dist"),
    bundle: true,
    minify: true,
    format: "esm",
    target: "es2022",
    define: { WORKER_FILE: JSON.stringify(`./worker.js?v=${await workerVersion()}`) },
    legalComments: "none", // all notices are in THIRD_PARTY.txt
    logLevel: "warning",
  });
  // MapLibre's worker stays a file of its own: a page with a strict CSP starts no worker from a blob.
  const worker = await readFile(at("node_modules/maplibre-gl/dist/maplibre-gl-worker.mjs"), "utf8");
  await writeFile(at("dist", "worker.js"), worker.replace(/\n\/\/# sourceMappingURL=.*$/, "\n"));
  await copyFile(at("src", "icon.svg"), at("dist", "icon.svg"));
  await writeFile(at("dist", "THIRD_PARTY.txt"), await notices());

  // A changed file gets a changed address, so the server may let browsers keep assets.
  let html = await readFile(at("src", "index.html"), "utf8");
  for (const name of ["app.js", "style.css", "icon.svg"]) {
    const hash = createHash("sha256").update(await readFile(at("dist", name))).digest("hex");
    html = html.replaceAll(`__GEOCENTROIDS_ASSETS__/${name}`, `$&?v=${hash.slice(0, 10)}`);
  }
  await writeFile(at("dist", "index.html"), html);
}

/** The worker is MapLibre's file, so its release is what tells one from another. */
async function workerVersion() {
  return JSON.parse(await readFile(at("node_modules/maplibre-gl/package.json"), "utf8")).version;
}

/** Licence texts of everything that ends up in the bundle. */
async function notices() {
  const lock = JSON.parse(await readFile(at("package-lock.json"), "utf8"));
  const parts = [];
  for (const [path, entry] of Object.entries(lock.packages)) {
    if (path === "" || entry.dev || entry.optional) continue;
    const files = await readdir(at(path));
    const licence = files.find((name) => /^licen[cs]e/i.test(name));
    const text = licence ? await readFile(at(path, licence), "utf8") : "";
    parts.push(`${path.replace(/^.*node_modules\//, "")} ${entry.version} (${entry.license})\n\n${text.trim()}\n`);
  }
  return parts.join(`\n${"-".repeat(80)}\n\n`);
}
