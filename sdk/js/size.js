// How large the SDK is for a page that bundles it: minified and compressed. `npm run size`
import { gzipSync } from "node:zlib";
import { build } from "esbuild";

export const BYTES_MAX = 25 * 1024;

export async function size() {
  const entry = new URL("src/index.js", import.meta.url).pathname;
  const { outputFiles } = await build({ entryPoints: [entry], bundle: true, minify: true, format: "esm", target: "es2022", write: false });
  const [{ contents }] = outputFiles;
  return { minified: contents.length, gzipped: gzipSync(contents, { level: 9 }).length };
}

if (process.argv[1] === new URL(import.meta.url).pathname) {
  const { minified, gzipped } = await size();
  console.log(`@tidings/client: ${(minified / 1024).toFixed(1)} KB minified, ${(gzipped / 1024).toFixed(1)} KB gzipped (goal: ${BYTES_MAX / 1024})`);
}
