// What the tabs share of the page.

export const byId = (id) => document.getElementById(id);

/** Tell a screen reader. */
export const announce = (text) => (byId("announce").textContent = text);

export const isRunKey = ({ key, ctrlKey, metaKey }) => key === "Enter" && (ctrlKey || metaKey);

/** Show an error, or none, in its place, and mark the control that it names. */
export function failed(place, error) {
  const form = byId(place).closest("form");
  for (const marked of form.querySelectorAll("[aria-invalid]")) marked.removeAttribute("aria-invalid");
  byId(place).textContent = error?.message ?? "";
  if (!error?.param) return;
  const name = error.param.split("[")[0];
  form.querySelector(`#${CSS.escape(name)}, [name="${CSS.escape(name)}"]`)?.setAttribute("aria-invalid", "true");
}
