// The Complete tab: a prompt, a stream of tokens, and the controls of sampling.

import { call } from "./api.js";
import { announce, byId, write } from "./dom.js";
import { watchRoom } from "./room.js";
import { dims, runs } from "./run.js";
import { addSliders } from "./sliders.js";
import { chunks } from "./stream.js";
import { assembler, bitsOf, bytesOf, draw, labelOf, pieceOf, roam } from "./tokens.js";

const NEUTRAL = { top_p: 1, top_k: 0, min_p: 0, presence_penalty: 0, frequency_penalty: 0, repetition_penalty: 1 };
const ALTERNATIVES = 5;
const ENDS = { length: "max tokens reached", stop: "end of text" };
const WITH_TEXT = ["continue", "copy", "to-score"]; // buttons that need a completion

/** Wires the tab; `scoreText(text)` opens the Score tab on a text. Returns what `runs` does. */
export function completeTab(server, scoreText) {
  const [form, prompt, output] = ["complete-form", "prompt", "completion"].map(byId);
  let shown = { prompt: "", text: "" }; // the completion on the page
  const room = watchRoom(server, prompt);
  const showsOf = dims(form, () => prompt.value);

  addSliders(form);
  roam(output);

  async function work(signal) {
    const stopped = () => (facts.end = "stopped");
    const facts = { began: 0, first: null, tokens: 0, bits: 0, end: "" };
    signal.addEventListener("abort", stopped);
    try {
      await room.settle(signal);
      facts.began = performance.now();
      await stream(facts, signal);
    } finally {
      output.classList.remove("streaming");
      if (facts.first !== null) {
        for (const id of WITH_TEXT) byId(id).disabled = !shown.text;
        showFacts(facts);
        announce(`${facts.tokens} tokens: ${shown.text}`);
      }
    }
  }

  /** What is on the page stays there until the first token is. */
  async function stream(facts, signal) {
    const asked = prompt.value;
    const body = { model: await server.model(), prompt: asked, ...sampling() };
    const extra = { stream: true, stream_options: { include_usage: true }, logprobs: ALTERNATIVES };
    const response = await call("v1/completions", { body: { ...body, ...extra }, signal, askForKey: server.askForKey });
    const { push, flush } = assembler();
    const add = (piece) => piece && output.append(...draw(piece));
    for await (const { choices } of chunks(response)) {
      for (const choice of choices) {
        if (facts.first === null) begin(asked);
        facts.first ??= performance.now();
        shown.text += choice.text;
        for (const token of tokensOf(choice.logprobs)) {
          facts.tokens += 1;
          facts.bits += bitsOf(token.logprob);
          add(push(token));
        }
        if (choice.finish_reason) facts.end = endOf(choice);
      }
      if (facts.first !== null) showFacts(facts);
    }
    add(flush());
    strikeBeyond(output, shown.text);
  }

  function begin(asked) {
    shown = { prompt: asked, text: "" };
    showsOf(asked);
    for (const id of WITH_TEXT) byId(id).disabled = true;
    const before = document.createElement("span");
    before.className = "before";
    before.textContent = asked;
    output.replaceChildren(before);
    output.classList.add("streaming");
  }

  const run = runs(form, server, {
    place: "complete-error",
    work,
    remedies: () => {
      if (!room.full()) return { fit: () => run.start() };
      return { shorten: () => room.shorten().then(run.start, run.start) };
    },
  });

  countChanges(form);
  for (const chip of document.querySelectorAll("#chips button")) {
    chip.addEventListener("click", () => {
      write(prompt, chip.textContent);
      run.restart();
    });
  }
  byId("continue").addEventListener("click", () => {
    write(prompt, shown.prompt + shown.text);
    // this button is about to be disabled; where there is no keyboard, the focus would bring one up
    if (matchMedia("(pointer: fine)").matches) prompt.focus();
    else byId("run").focus();
    run.restart();
  });
  byId("copy").hidden = !navigator.clipboard; // only over https and from this machine
  byId("copy").addEventListener("click", async () => {
    await navigator.clipboard.writeText(shown.prompt + shown.text);
    announce("Copied");
  });
  byId("to-score").addEventListener("click", () => scoreText(shown.prompt + shown.text));
  return run;
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

/** The controls as fields of the request; those that would change nothing are left out. */
function sampling() {
  const fields = { temperature: byId("temperature").valueAsNumber, max_tokens: byId("max_tokens").valueAsNumber };
  for (const [name, neutral] of Object.entries(NEUTRAL)) {
    const value = byId(name).valueAsNumber;
    if (value !== neutral) fields[name] = value;
  }
  if (byId("seed").value !== "") fields.seed = byId("seed").valueAsNumber;
  const stop = byId("stop").value.split("\n").filter(Boolean);
  if (stop.length) fields.stop = stop;
  return fields;
}

function* tokensOf(logprobs) {
  for (const [i, text] of logprobs.tokens.entries()) {
    const alternatives = Object.entries(logprobs.top_logprobs[i]).map(([other, logprob]) => ({
      label: labelOf(bytesOf(other)),
      logprob,
      chosen: other === text,
    }));
    const rank = 1 + alternatives.findIndex(({ chosen }) => chosen);
    const bytes = bytesOf(text);
    yield {
      bytes,
      label: labelOf(bytes),
      logprob: logprobs.token_logprobs[i],
      rank: rank <= ALTERNATIVES ? rank : null, // the chosen token comes last if it is not among the best
      alternatives,
      offset: logprobs.text_offset[i],
    };
  }
}

/** Strike out what is not part of the text: a stop text, the mark of the end. */
function strikeBeyond(output, text) {
  let left = [...text].length; // characters of the text that are not yet passed
  for (const span of output.querySelectorAll(".token")) {
    const [all, own] = [[...pieceOf(span).text].length, [...span.textContent]];
    const inside = Math.max(0, left - (all - own.length));
    left -= all;
    if (inside >= own.length) continue;
    const beyond = document.createElement("s");
    beyond.textContent = own.slice(inside).join("");
    span.replaceChildren(own.slice(0, inside).join(""), beyond);
  }
}

function endOf({ finish_reason: reason, stop_reason: stop }) {
  return typeof stop === "string" ? `ended at “${stop}”` : ENDS[reason] ?? reason;
}

function showFacts({ began, first, tokens, bits, end }) {
  const seconds = (performance.now() - (first ?? began)) / 1000;
  const parts = tokens
    ? [
        `${tokens} tokens`,
        tokens > 1 && seconds > 0 ? `${Math.round((tokens - 1) / seconds)} a second` : "",
        `first after ${Math.round(first - began)} ms`,
        `${(bits / tokens).toFixed(1)} bits each`,
        end,
      ]
    : [end];
  byId("complete-facts").textContent = parts.filter(Boolean).join(" · ");
}
