// What the shown text takes in the server's cache, beside the same model without low ranks.

import { byId } from "./dom.js";

const UNITS = ["bytes", "KB", "MB", "GB", "TB"];

/** "1.23 MB" of bytes. */
export function sizeOf(bytes) {
  const power = bytes < 1000 ? 0 : Math.min(Math.floor(Math.log10(bytes) / 3), UNITS.length - 1);
  return `${power ? (bytes / 1000 ** power).toPrecision(3) : bytes} ${UNITS[power]}`;
}

/** Returns show(tokens). The bars are shares of what the dense model takes for the longest text. */
export function cacheMeter(server) {
  return async (tokens) => {
    const { cache_bytes_per_token: own, dense_cache_bytes_per_token: dense, max_model_len: longest } = await server.card();
    for (const [name, each] of [["own", own], ["dense", dense]]) {
      byId(`cache-${name}`).textContent = sizeOf(tokens * each);
      byId(`cache-${name}-bar`).style.setProperty("--p", (tokens * each) / (longest * dense));
    }
    const ratio = (dense / own).toFixed(1);
    byId("cache-about").textContent =
      ratio === "1.0"
        ? `${tokens.toLocaleString("en")} tokens. This model caches whole keys and values.`
        : `${tokens.toLocaleString("en")} tokens, in ${ratio} times less memory than whole keys and values take.`;
  };
}
