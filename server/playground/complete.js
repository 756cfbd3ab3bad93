// The Complete tab: a prompt, a stream of tokens, and the controls of sampling.

import { call } from "./api.js";
import { chunks } from "./stream.js";
import { assembler, bitsOf, bytesOf, draw, labelOf, pieceOf, roam } from "./tokens.js";
import { announce, byId, failed, isRunKey } from "./dom.js";

const NEUTRAL = { top_p: 1, top_k: 0, min_p: 0, presence_penalty: 0, frequency_penalty: 0, repetition_penalty: 1 };
const ALTERNATIVES = 5;
const ENDS = { length: "max tokens reached", stop: "end of text" };

/** Wires the tab; `scoreText(text)` opens the Score tab on a text. */
export function completeTab(server, scoreText) {
  const [form, prompt, output, run] = ["complete-form", "prompt", "completion", "run"].map(byId);
  let running = null; // AbortController
  let text = ""; // of the completion

  addSliders(form);
  roam(output);

  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    if (running) return running.abort();
    running = new AbortController();
    run.textContent = "Stop";
    output.classList.add("streaming");
    failed("complete-error", null);
    for (const id of ["continue", "copy", "to-score"]) byId(id).disabled = true;
    announce("Writing");
    const before = document.createElement("span");
    before.className = "before";
    before.textContent = prompt.value;
    output.replaceChildren(before);
    text = "";
    const began = performance.now();
    const facts = { began, first: null, tokens: 0, bits: 0, end: "" };
    try {
      await write(facts);
    } catch (error) {
      if (error.name === "AbortError") facts.end = "stopped";
      else failed("complete-error", error);
    } finally {
      running = null;
      run.textContent = "Complete";
      output.classList.remove("streaming");
      for (const id of ["continue", "copy", "to-score"]) byId(id).disabled = !text;
      showFacts(facts);
      announce(facts.tokens ? `${facts.tokens} tokens: ${text}` : "Nothing was written");
    }
  });

  async function write(facts) {
    const body = { model: await server.model(), prompt: prompt.value, ...sampling() };
    const extra = { stream: true, stream_options: { include_usage: true }, logprobs: ALTERNATIVES };
    const { signal } = running;
    const response = await call("v1/completions", { body: { ...body, ...extra }, signal, askForKey: server.askForKey });
    const { push, flush } = assembler();
    const add = (piece) => piece && output.append(...draw(piece));
    for await (const { choices } of chunks(response)) {
      for (const choice of choices) {
        facts.first ??= performance.now();
        text += choice.text;
        for (const token of tokensOf(choice.logprobs)) {
          facts.tokens += 1;
          facts.bits += bitsOf(token.logprob);
          add(push(token));
        }
        if (choice.finish_reason) facts.end = endOf(choice);
      }
      showFacts(facts);
    }
    add(flush());
    strikeBeyond(output, text);
  }

  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && running) running.abort();
  });
  prompt.addEventListener("keydown", (event) => isRunKey(event) && !running && form.requestSubmit());
  form.addEventListener("reset", () => setTimeout(() => form.dispatchEvent(new Event("input"))));
  byId("continue").addEventListener("click", () => {
    prompt.value += text;
    run.focus(); // this button is about to be disabled
    form.requestSubmit();
  });
  byId("copy").hidden = !navigator.clipboard; // only over https and from this machine
  byId("copy").addEventListener("click", async () => {
    await navigator.clipboard.writeText(prompt.value + text);
    announce("Copied");
  });
  byId("to-score").addEventListener("click", () => scoreText(prompt.value + text));
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

/** A slider beside every number that has both limits; the keyboard has the number itself. */
function addSliders(form) {
  for (const control of form.querySelectorAll(".control:not(.plain, .wide)")) {
    const number = control.querySelector("input");
    const slider = Object.assign(document.createElement("input"), { type: "range", tabIndex: -1 });
    for (const name of ["min", "max", "step"]) slider[name] = number[name];
    slider.setAttribute("aria-hidden", "true");
    slider.defaultValue = number.value;
    slider.addEventListener("input", () => (number.value = slider.value));
    number.addEventListener("input", () => (slider.value = number.value));
    control.append(slider);
  }
}
