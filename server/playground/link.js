// Links that open the page with the same text, settings and seed: all of it in the fragment, which no server is sent.

/** What a control is called in a link; those without a name are no part of it. */
function nameOf(control) {
  const method = control.closest("[data-method]")?.dataset.method;
  return method ? `${method}-${control.name}` : control.id;
}

const isSwitch = ({ type }) => type === "checkbox";
const isText = (control) => control.matches("textarea.prose");
const valueOf = (control) => (isSwitch(control) ? String(control.checked) : control.value);
const controlsOf = (form) => [...form.querySelectorAll("input, select, textarea")].filter(nameOf);

function isDefault(control) {
  if (isSwitch(control)) return control.checked === control.defaultChecked;
  if (control.matches("select")) return control.selectedOptions[0]?.defaultSelected || control.selectedIndex === 0;
  return control.value === control.defaultValue;
}

/** [name, value] of a form's texts, and of the settings that are not as the page has them. */
export function entriesOf(form) {
  const told = controlsOf(form).filter((control) => isText(control) || !isDefault(control));
  return told.map((control) => [nameOf(control), valueOf(control)]);
}

/** The fragment, without its "#". */
export const fragmentOf = (tab, entries) => `${tab}?${new URLSearchParams(entries)}`;

/** {tab, entries} of a fragment; there are no entries if it only names a tab. */
export function readFragment(fragment) {
  const [tab, query = ""] = fragment.split(/\?(.*)/s);
  return { tab, entries: [...new URLSearchParams(query)] };
}

/** Set a form's controls as a link has them; what it does not know is as on a new page. */
export function restore(form, entries) {
  form.reset();
  const told = new Map(entries);
  for (const control of controlsOf(form)) {
    const value = told.get(nameOf(control));
    if (isSwitch(control)) control.checked = value === "true";
    else if (control.options ? [...control.options].some((option) => option.value === value) : value !== undefined) control.value = value;
    for (const kind of ["input", "change"]) control.dispatchEvent(new Event(kind, { bubbles: true }));
  }
}
