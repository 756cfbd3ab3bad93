// The fields that say how a text is cut into windows.

import { byId } from "./dom.js";

const ABOUT = {
  sliding: "A text that fits the context is one window; a longer one is read in windows that overlap. Every token is scored once, with as much before it as fits.",
  full: "One window: the text must fit the model's context.",
  rolling: "Windows side by side with one token of context, as lm-evaluation-harness does it.",
  chunks: "Blocks of the window's length, the second half of each scored, as llama-perplexity does it.",
};

/** Fill `place` from the template. `read()` gives the fields of the request, those left empty not among them. */
export function methodFields(place) {
  place.append(byId("method-template").content.cloneNode(true));
  const [method, length, stride, bos] = ["method", "max_length", "stride", "add_bos"].map((name) =>
    place.querySelector(`[name="${name}"]`),
  );
  const explain = () => {
    stride.disabled = method.value !== "sliding";
    place.querySelector("[data-about]").textContent = ABOUT[method.value];
  };
  method.addEventListener("change", explain);
  explain();

  const read = () => {
    const fields = { method: method.value };
    if (length.value) fields.max_length = length.valueAsNumber;
    if (stride.value && !stride.disabled) fields.stride = stride.valueAsNumber;
    if (bos.value) fields.add_bos = bos.value === "true";
    return fields;
  };
  const choose = (name) => {
    method.value = name;
    method.dispatchEvent(new Event("change", { bubbles: true }));
  };
  return { read, choose };
}
