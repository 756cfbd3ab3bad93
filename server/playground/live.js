// The strip that shows what the server does now, read from its Prometheus metrics.

import { call } from "./api.js";
import { byId } from "./dom.js";

const EVERY = 1000; // ms
const LONGEST = 30_000; // ms, between tries while the server does not answer
const HISTORY = 60; // points of the little curve

/** Prometheus' text as name to value, labels summed over; histogram buckets are left out. */
export function parseMetrics(text) {
  const found = {};
  for (const line of text.split("\n")) {
    const parts = /^(lpa:\w+)(?:\{.*\})? (\S+)/.exec(line);
    if (!parts || parts[1].endsWith("_bucket")) continue;
    found[parts[1]] = (found[parts[1]] ?? 0) + Number(parts[2]);
  }
  return found;
}

/** Polls while the page is visible; returns a function that asks at once, for when a key was given. */
export function watchServer() {
  let [timer, wait, last] = [null, EVERY, null];
  const history = new Array(HISTORY).fill(0);

  async function poll() {
    clearTimeout(timer);
    if (document.hidden) return; // visibilitychange goes on
    try {
      const signal = AbortSignal.timeout(10_000);
      const now = parseMetrics(await (await call("metrics", { signal })).text());
      show({ ...now, at: performance.now() });
      wait = EVERY;
    } catch (error) {
      wait = Math.min(wait * 2, LONGEST);
      last = null;
      blank(error.status === 401 ? "Shown once a key is given" : "The server does not answer");
    }
    clearTimeout(timer);
    timer = setTimeout(poll, wait);
  }

  function show(now) {
    const tokens = (now["lpa:generation_tokens_total"] ?? 0) + (now["lpa:scored_tokens_total"] ?? 0);
    const rate = last ? Math.max(0, (tokens - last.tokens) / ((now.at - last.at) / 1000)) : 0;
    last = { tokens, at: now.at };
    byId("live").classList.remove("away");
    byId("live").removeAttribute("title");
    byId("live-running").textContent = now["lpa:num_requests_running"] ?? "–";
    byId("live-waiting").textContent = now["lpa:num_requests_waiting"] ?? "–";
    byId("live-rate").textContent = Math.round(rate);
    byId("live-cache").textContent = `${((now["lpa:kv_cache_usage_perc"] ?? 0) * 100).toFixed(1)} %`;
    history.push(rate);
    history.shift();
    const top = Math.max(...history, 1);
    const points = history.map((value, i) => `${i},${19 - (18 * value) / top}`);
    byId("live-history").firstElementChild.setAttribute("points", points.join(" "));
  }

  document.addEventListener("visibilitychange", () => {
    last = null; // the rate would be that of the whole absence
    if (!document.hidden) poll();
  });
  poll();
  return poll;
}

function blank(why) {
  byId("live").classList.add("away");
  byId("live").title = why;
  for (const name of ["running", "waiting", "rate", "cache"]) byId(`live-${name}`).textContent = "–";
}
