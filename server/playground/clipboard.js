// Buttons that copy, and files that are saved.

import { announce } from "./dom.js";

const SAID = 1500; // ms that a button says that it has copied

/** Have a button copy what `text()` gives; it is hidden where the browser lets no page do that, as on plain http. */
export function copies(button, text) {
  const label = button.textContent;
  let timer = null;
  button.hidden = !navigator.clipboard;
  button.addEventListener("click", async () => {
    await navigator.clipboard.writeText(text());
    announce("Copied");
    button.textContent = "Copied";
    clearTimeout(timer);
    timer = setTimeout(() => (button.textContent = label), SAID);
  });
}

/** Offer a Blob as a file. */
export function save(name, blob) {
  const link = Object.assign(document.createElement("a"), { download: name, href: URL.createObjectURL(blob) });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}
