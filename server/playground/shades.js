// What a token's shade means: how probable it was, or which of the model's guesses.
//
// Every token carries both depths, in [0, 1]; style.css takes the one that the root's data-shade names.

import { element } from "./dom.js";

const HOTTEST = 12; // bits at which the shade is full
const RANKS = [1, 2, 3, 5, 10, 20]; // the last rank of every step of the scale but one
const STEPS = RANKS.length; // from none to full

/** A completion's ranks are found among this many alternatives: all that the scale tells apart. */
export const RANKED = RANKS.at(-1);

const LABELS = {
  percent: ["Probability, %", ["100", "25", "6.3", "1.6", "0.4", "0.1", "≤ 0.02"]],
  bits: ["Surprisal, bits", ["0", "2", "4", "6", "8", "10", "≥ 12"]],
  rank: ["Rank", ["1", "2", "3", "4–5", "6–10", "11–20", "> 20"]],
};

/** Depth of a surprisal. */
export const depthOfBits = (bits) => Math.min(Math.max(bits, 0), HOTTEST) / HOTTEST;

/** Depth of a rank, which counts from 1; null is one beyond RANKED. */
export function depthOfRank(rank) {
  const step = RANKS.findIndex((last) => rank !== null && rank <= last);
  return (step < 0 ? STEPS : step) / STEPS;
}

export function shade(span, bits, rank) {
  span.style.setProperty("--bits", depthOfBits(bits));
  span.style.setProperty("--rank", depthOfRank(rank));
}

/** Fill the legends; each has a menu that says what the shade of all maps means. */
export function legends() {
  const all = [...document.querySelectorAll("[data-legend]")].map((place) => {
    const own = place.dataset.legend;
    const options = [own, "rank"].map((name) => element("option", { value: name === own ? "" : name, textContent: LABELS[name][0] }));
    const menu = element("select", { ariaLabel: "Shade by" }, ...options);
    const steps = LABELS[own][1].map((_, step) => {
      const swatch = element("i", { className: "heat" });
      for (const name of ["--bits", "--rank"]) swatch.style.setProperty(name, step / STEPS);
      return element("li", {}, swatch, "");
    });
    place.append(menu, element("ol", {}, ...steps));
    menu.addEventListener("change", () => show(menu.value));
    return { own, menu, steps };
  });
  const show = (chosen) => {
    document.documentElement.dataset.shade = chosen;
    for (const { own, menu, steps } of all) {
      for (const option of menu.options) option.defaultSelected = option.value === chosen; // a form's reset leaves it
      menu.value = chosen;
      for (const [i, step] of steps.entries()) step.lastChild.data = LABELS[chosen || own][1][i];
    }
  };
  show("");
}
