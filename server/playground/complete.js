// The Complete tab: a prompt, a stream of tokens, and the controls of sampling.

import { cacheMeter } from "./cache.js";
import { watchContext } from "./context.js";
import { copies } from "./clipboard.js";
import { announce, byId, element, write } from "./dom.js";
import { COMPLETION, generate, sentenceOf } from "./generate.js";
import { dims, runs } from "./run.js";
import { anySeed, sampling } from "./sampling.js";
import { addSliders } from "./sliders.js";
import { roam, textBefore } from "./tokens.js";

const WITH_TEXT = ["continue", "copy", "to-score"]; // buttons that need a completion

/**
 * Wires the tab; `scoreText(text)` opens the Score tab on a text. Returns what `runs` does, `branch(text)`, which goes on
 * from another text, and `requests()`, of which the shown completion is the answer.
 */
export function completeTab(server, scoreText) {
  const [form, prompt, output] = ["complete-form", "prompt", "completion"].map(byId);
  let shown = { prompt: "", text: "", seed: null, nodes: [], facts: "" }; // the completion on the page
  const left = []; // completions that branches went off from
  const meter = cacheMeter(server);
  const context = watchContext(server, prompt, meter);
  const showsOf = dims(form, () => prompt.value);

  addSliders(form);
  roam(output);

  const body = async (seed) => ({ model: await server.model(), prompt: prompt.value, seed, ...sampling(form) });

  async function work(signal) {
    const used = await context.settle(signal);
    const asked = await body(anySeed());
    const begin = () => {
      shown = { prompt: asked.prompt, text: "", seed: asked.seed };
      showsOf(asked.prompt);
      output.replaceChildren(element("span", { className: "before", textContent: asked.prompt }));
    };
    const show = (facts) => {
      shown.text = facts.text;
      byId("complete-facts").textContent = sentenceOf(facts);
      meter(used + facts.tokens);
      for (const id of WITH_TEXT) byId(id).disabled = !shown.text;
    };
    const { tokens } = await generate(server, COMPLETION, asked, { output, begin, show, signal });
    announce(`${tokens} tokens: ${shown.text}`);
  }

  const run = runs(form, server, {
    place: "complete-error",
    work,
    remedies: () => {
      if (!context.full()) return { fit: () => run.start() };
      return { shorten: () => context.shorten().then(run.start, run.start) };
    },
  });

  /** Go on from a text; "Back" brings what is shown now. */
  function branch(text) {
    left.push({ ...shown, nodes: [...output.childNodes], facts: byId("complete-facts").textContent });
    byId("back").hidden = false;
    goOn(text);
  }

  function goOn(text) {
    write(prompt, text);
    // where there is no keyboard, the focus of a text would bring one up
    if (matchMedia("(pointer: fine)").matches) prompt.focus();
    else byId("run").focus();
    run.restart();
  }

  function back() {
    run.stop();
    shown = left.pop();
    byId("back").hidden = !left.length;
    write(prompt, shown.prompt);
    output.replaceChildren(...shown.nodes);
    byId("complete-facts").textContent = shown.facts;
    for (const id of WITH_TEXT) byId(id).disabled = !shown.text;
    showsOf(shown.prompt);
    output.querySelector(".token")?.focus();
  }

  countChanges(form);
  for (const chip of document.querySelectorAll("#chips button")) {
    chip.addEventListener("click", () => {
      write(prompt, chip.textContent);
      run.restart();
    });
  }
  output.addEventListener("branch", ({ target, detail }) => branch(textBefore(output, target) + detail));
  byId("back").addEventListener("click", back);
  byId("continue").addEventListener("click", () => goOn(shown.prompt + shown.text));
  copies(byId("copy"), () => shown.prompt + shown.text);
  byId("to-score").addEventListener("click", () => scoreText(shown.prompt + shown.text));
  const requests = async () => [[COMPLETION.path, await body(shown.seed ?? anySeed())]];
  return { ...run, branch, requests, seed: { name: "seed", value: () => shown.seed } };
}

/** Say how many of the folded controls are not as they were. */
function countChanges(form) {
  const folded = form.querySelector("details");
  const controls = [...folded.querySelectorAll("input:not([type=range]), textarea")];
  const count = () => {
    const changed = controls.filter((control) => control.value !== control.defaultValue).length;
    folded.querySelector("small").textContent = changed ? `${changed} changed` : "";
  };
  form.addEventListener("input", count);
  form.addEventListener("reset", () => setTimeout(count));
}
