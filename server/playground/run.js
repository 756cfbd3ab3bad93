// A form whose button runs something, and stops it while it runs.

import { announce, count, failed, isRunKey, toDefault } from "./dom.js";

const SLOW = 300; // ms, after which progress is shown

/**
 * Wires a form. `work(signal, progress)` does it, may throw ApiError, and may call progress(done, all) of tokens.
 * `remedies(error)` are what this tab can do about an error, beside what every tab can.
 *
 * Returns {start, restart, stop}: `start` runs unless something runs, `restart` ends that first, `stop` only ends it.
 */
export function runs(form, server, { place, work, remedies = () => ({}) }) {
  const button = form.querySelector(".primary");
  const label = button.textContent;
  const bar = form.querySelector(".progress");
  let running = null; // AbortController
  let again = false; // whether to run once more after the end

  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    if (running) return running.abort();
    running = new AbortController();
    const { signal } = running;
    button.textContent = "Stop";
    form.classList.add("running");
    failed(place, null);
    const slow = bar && setTimeout(() => (bar.hidden = false), SLOW);
    try {
      await work(signal, (done, all) => running?.signal === signal && showProgress(bar, done, all));
    } catch (error) {
      if (error.name !== "AbortError") failed(place, error, { ...common(error), ...remedies(error) });
      else if (!again) announce("Stopped");
    } finally {
      running = null;
      button.textContent = label;
      form.classList.remove("running");
      clearTimeout(slow);
      hideProgress(bar);
      if (again) form.requestSubmit();
      again = false;
    }
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && !document.querySelector("dialog[open]")) running?.abort();
  });
  form.addEventListener("keydown", (event) => {
    if (event.target.matches("textarea") && isRunKey(event)) restart();
  });

  const common = (error) => ({
    ...retries(server, error, start),
    reset: (control) => {
      toDefault(control);
      start();
    },
  });
  const start = () => running || form.requestSubmit();
  const restart = () => {
    again = Boolean(running);
    if (running) running.abort();
    else form.requestSubmit();
  };
  return { start, restart, stop: () => running?.abort() };
}

/** What can be done about any error: `again()`, or that with another key. */
export const retries = (server, error, again) => ({ again, key: async () => (await server.askForKey(error)) && again() });

function showProgress(bar, done, all) {
  bar.firstElementChild.value = done / all;
  bar.lastElementChild.textContent = `${count(done)} of ${count(all)} tokens`;
}

function hideProgress(bar) {
  if (!bar) return;
  bar.hidden = true;
  bar.firstElementChild.removeAttribute("value"); // it moves until something is known
  bar.lastElementChild.textContent = "";
}

/**
 * Dims a form's results while they are not of what `asked()` gives now. Returns a function to call with what they are of.
 */
export function dims(form, asked) {
  let shown = null;
  const look = () => form.classList.toggle("stale", shown !== null && shown !== asked());
  for (const kind of ["input", "change"]) form.addEventListener(kind, look);
  return (what) => {
    shown = what;
    look();
  };
}
