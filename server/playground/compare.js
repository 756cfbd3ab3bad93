// The Compare tab: two texts, or two methods on one text, side by side.

import { announce, byId } from "./dom.js";
import { methodFields } from "./method.js";
import { dims, runs } from "./run.js";
import { drawMap, figure, score, scoreRequest } from "./score.js";
import { roam } from "./tokens.js";

const bits = ({ nll_sum: nats }) => nats / Math.LN2;
const ROWS = [
  ["Perplexity", (scored) => scored.perplexity, 2],
  ["Bits per byte", (scored) => scored.bits_per_byte, 3],
  ["Bits per token", (scored) => bits(scored) / scored.num_tokens, 3],
  ["Bits in all", bits, 1],
  ["Tokens scored", (scored) => scored.num_tokens, 0],
];

/** Wires the tab. Returns what `runs` does, and `requests()`. */
export function compareTab(server) {
  const [form, same, a, b] = ["compare-form", "same-text", "a-text", "b-text"].map(byId);
  const [methodA, methodB] = ["a", "b"].map((side) => methodFields(form.querySelector(`[data-method="${side}"]`)));
  const maps = [byId("a-map"), byId("b-map")];
  maps.forEach(roam);
  drawTable(null, null);

  let own = b.value; // B's text while it shows A's
  same.addEventListener("change", () => {
    b.readOnly = same.checked;
    if (same.checked) [own, b.value] = [b.value, a.value];
    else b.value = own;
  });
  a.addEventListener("input", () => same.checked && (b.value = a.value));

  const asked = () => JSON.stringify([a.value, methodA.read(), b.value, methodB.read()]);
  const showsOf = dims(form, asked);

  const bothSides = () => [{ text: a.value, method: methodA.read() }, { text: b.value, method: methodB.read() }];
  const requests = () => Promise.all(bothSides().map((side) => scoreRequest(server, side.text, side.method)));

  async function work(signal, progress) {
    const of = asked();
    const sides = bothSides();
    announce("Scoring");
    const progressOf = (side) => (done, all) => {
      Object.assign(side, { done, all });
      const known = sides.filter((other) => other.all);
      progress(...["done", "all"].map((name) => known.reduce((sum, other) => sum + other[name], 0)));
    };
    const both = sides.map((side) => score(server, side.text, side.method, signal, progressOf(side)));
    const [scoredA, scoredB] = await Promise.all(both);
    drawTable(scoredA, scoredB);
    drawMap(maps[0], scoredA);
    drawMap(maps[1], scoredB);
    byId("verdict").textContent = verdict(scoredA, scoredB, sides[0].text === sides[1].text);
    showsOf(of);
    announce(byId("verdict").textContent);
  }

  const by = (name) => () => {
    methodA.choose(name);
    methodB.choose(name);
    run.start();
  };
  const remedies = () => ({ sliding: by("sliding"), rolling: by("rolling") });
  const run = runs(form, server, { place: "compare-error", work, remedies });
  return { ...run, requests };
}

function drawTable(scoredA, scoredB) {
  byId("compare-table").replaceChildren(
    ...ROWS.map(([name, value, digits]) => {
      const row = document.createElement("tr");
      const head = Object.assign(document.createElement("th"), { scope: "row", textContent: name });
      const values = [scoredA, scoredB].map((scored) => scored && value(scored));
      const ratio = values[0] && values[1] ? `×${(values[1] / values[0]).toFixed(2)}` : "–";
      const shown = [...values.map((number) => figure(number, digits)), ratio];
      row.append(head, ...shown.map((text) => Object.assign(document.createElement("td"), { textContent: text })));
      return row;
    }),
  );
}

function verdict(scoredA, scoredB, sameText) {
  // two texts have tokens of different lengths, so bytes are what they have in common
  const byBytes = !sameText && scoredA.bits_per_byte != null && scoredB.bits_per_byte != null;
  const [field, unit] = byBytes ? ["bits_per_byte", "bits per byte"] : ["perplexity", "perplexity"];
  const [valueA, valueB] = [scoredA[field], scoredB[field]];
  if (valueA === null || valueB === null) return "The perplexity of one of them is too large for a number.";
  const change = Math.abs(valueB / valueA - 1) * 100;
  if (change < 0.05) return `A and B have the same ${unit}, ${figure(valueA, 3)}.`;
  const [low, high, least, most] = valueA < valueB ? ["A", "B", valueA, valueB] : ["B", "A", valueB, valueA];
  const more = ((most / least - 1) * 100).toFixed(most / least < 1.1 ? 1 : 0);
  return sameText
    ? `One text, two methods: ${high} reads ${more} % more ${unit} than ${low}.`
    : `The model finds ${low} the easier text: ${high} takes ${more} % more ${unit}.`;
}
