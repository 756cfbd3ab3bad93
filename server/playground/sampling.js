// The controls of sampling, as fields of a request.

const NEUTRAL = { top_p: 1, top_k: 0, min_p: 0, presence_penalty: 0, frequency_penalty: 0, repetition_penalty: 1 };
const SEEDS = 2 ** 32;

/** Those of a form, by their `name`s; what is empty or would change nothing is left out. */
export function sampling(form) {
  const fields = {};
  for (const { name, valueAsNumber: value } of form.querySelectorAll(".sampling input[type=number]")) {
    if (!Number.isNaN(value) && value !== NEUTRAL[name]) fields[name] = value;
  }
  const stop = form.querySelector("[name=stop]")?.value.split("\n").filter(Boolean) ?? [];
  if (stop.length) fields.stop = stop;
  return fields;
}

/** A seed for those who gave none: with it the text can be had again. */
export const anySeed = () => Math.floor(Math.random() * SEEDS);
