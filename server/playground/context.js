// How many tokens the prompt has, and so how many may follow it.

import { ApiError, call } from "./api.js";
import { byId, write } from "./dom.js";

const PAUSE = 300; // ms without typing, after which the prompt is counted

/**
 * Keeps max tokens within what the context leaves beside the prompt, and shows both; `onCount(tokens)` hears of the
 * prompt's tokens too.
 *
 * `settle(signal)` waits until that is so and gives the number of the prompt's tokens; it throws ApiError if nothing is
 * left at all. `shorten()` then keeps the prompt's end.
 */
export function watchContext(server, prompt, onCount) {
  const number = byId("max_tokens");
  let wanted = number.valueAsNumber; // by the user, and may be more than fits
  let counted = { text: null, tokens: [], context: 0 };
  let timer = null;

  async function count(options) {
    const text = prompt.value;
    if (counted.text === text) return;
    const body = { model: await server.model(), prompt: text };
    const { tokens, max_model_len: context } = await (await call("tokenize", { body, ...options })).json();
    counted = { text, tokens, context };
    show();
    onCount(tokens.length);
  }

  const left = () => counted.context - counted.tokens.length;

  function show() {
    const [used, context] = [counted.tokens.length, counted.context].map((value) => value.toLocaleString("en"));
    byId("prompt-size").textContent = `${used} of ${context} tokens`;
    number.max = Math.max(1, left());
    number.value = Math.min(wanted, number.max);
    const slider = number.parentElement.querySelector("[type=range]");
    slider.max = number.max;
    slider.value = number.value;
  }

  number.addEventListener("input", () => {
    wanted = number.valueAsNumber;
    if (counted.text !== null && wanted > Number(number.max)) show();
  });
  number.form.addEventListener("reset", () => {
    wanted = Number(number.defaultValue);
    if (counted.text !== null) setTimeout(show);
  });
  prompt.addEventListener("input", () => {
    clearTimeout(timer);
    // typing opens no dialog for a key; other errors are shown when the prompt is sent
    timer = setTimeout(() => count({}).catch(() => {}), PAUSE);
  });

  const settle = async (signal) => {
    await count({ signal, askForKey: server.askForKey });
    if (left() < 1) throw new ApiError("the prompt fills the context", 400, { code: "context_length_exceeded" });
    return counted.tokens.length;
  };
  const shorten = async () => {
    const keep = counted.context - Math.min(wanted, counted.context >> 1);
    const body = { model: await server.model(), tokens: counted.tokens.slice(-keep) };
    write(prompt, (await (await call("detokenize", { body, askForKey: server.askForKey })).json()).prompt);
  };
  return { settle, shorten, full: () => left() < 1 };
}
