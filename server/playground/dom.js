// What the tabs share of the page.

import { explain } from "./errors.js";

export const byId = (id) => document.getElementById(id);

/** A number with its thousands apart. */
export const count = (number) => number.toLocaleString("en");

/** Tell a screen reader. */
export const announce = (text) => (byId("announce").textContent = text);

export const isRunKey = ({ key, ctrlKey, metaKey }) => key === "Enter" && (ctrlKey || metaKey);

/** An element with properties and children. */
export function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

/** Give a text a new value, as if it were typed; the caret is at its end. */
export function write(text, value) {
  text.value = value;
  text.setSelectionRange(value.length, value.length);
  text.scrollTop = text.scrollHeight;
  text.dispatchEvent(new Event("input", { bubbles: true }));
}

/** Set a control to what it was when the page was opened. */
export function toDefault(control) {
  control.value = control.defaultValue ?? [...control.options].find(({ defaultSelected }) => defaultSelected)?.value;
  control.dispatchEvent(new Event("input", { bubbles: true }));
  control.dispatchEvent(new Event("change", { bubbles: true }));
}

/**
 * Show an error, or none, in its place, and mark the control that it names.
 *
 * `remedies` has, by the names of errors.js, what this tab can do about an error; the one that fits becomes a button.
 */
export function failed(place, error, remedies = {}) {
  const form = byId(place).closest("form");
  for (const marked of form.querySelectorAll("[aria-invalid]")) marked.removeAttribute("aria-invalid");
  byId(place).replaceChildren();
  if (!error) return;
  const name = error.param?.split("[")[0] ?? "";
  const control = name && form.querySelector(`#${CSS.escape(name)}, [name="${CSS.escape(name)}"]`);
  const label = control && control.closest(".control")?.querySelector("label, span")?.firstChild.textContent.trim();
  const { message, remedy, button } = explain(error, label, remedies);
  byId(place).append(message);
  if (remedy) {
    const made = element("button", { type: "button", className: "remedy", textContent: button });
    made.addEventListener("click", () => remedies[remedy](control));
    byId(place).append(" ", made);
  }
  if (!control) return;
  control.setAttribute("aria-invalid", "true");
  const folded = control.closest("details");
  if (folded) folded.open = true;
}
