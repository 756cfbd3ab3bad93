// The dialog to take something along: a link, the heat map as a picture, the request as code.

import { storedKey } from "./api.js";
import { copies, save } from "./clipboard.js";
import { shellCode, pythonCode } from "./code.js";
import { byId } from "./dom.js";
import { entriesOf, fragmentOf } from "./link.js";
import { asPng, asSvg, markOf } from "./picture.js";

const LONGEST = 60_000; // characters of a link; some browsers and most messengers cut longer ones

/**
 * Wires every button of the class "share". `tabs` has by name {requests, seed}: of the tab's requests, and of the seed
 * that made what it shows, if one did.
 */
export function shareDialog(tabs) {
  const [dialog, link, why, code] = ["share-dialog", "share-link", "share-why", "share-code"].map(byId);
  let open = { tab: "", requests: [] };

  const showCode = () => {
    const form = byId("share-form");
    const base = new URL(".", location.href.split("#")[0]).href;
    const write = form.elements.language.value === "python" ? pythonCode : shellCode;
    code.textContent = write(base, open.requests, Boolean(storedKey()));
  };

  async function show(tab) {
    open = { tab, requests: await tabs[tab].requests() };
    const entries = new Map(entriesOf(byId(`${tab}-form`)));
    const seed = tabs[tab].seed;
    if (seed && seed.value() !== null) entries.set(seed.name, seed.value());
    const url = `${location.href.split("#")[0]}#${fragmentOf(tab, [...entries])}`;
    const fits = url.length <= LONGEST;
    link.value = fits ? url : "";
    link.disabled = byId("share-copy-link").disabled = !fits;
    why.textContent = fits ? "Text, settings and seed are in the link itself." : "The text is too long for a link.";
    byId("share-picture").disabled = !byId(tab).querySelector(".token");
    showCode();
    dialog.showModal();
    link.select();
  }

  /** The tab's legend and maps; the dialog is closed, so that they are shown as they are. */
  const picture = () => markOf([...byId(open.tab).querySelectorAll(".legend, .tokens:not(:empty)")]);
  const name = (kind) => `${open.tab}.${kind}`;

  for (const button of document.querySelectorAll("button.share")) {
    button.addEventListener("click", () => show(button.closest("[role=tabpanel]").id));
  }
  byId("share-svg").addEventListener("click", () => save(name("svg"), new Blob([asSvg(picture())], { type: "image/svg+xml" })));
  byId("share-png").addEventListener("click", async () => save(name("png"), await asPng(picture())));
  byId("share-form").addEventListener("change", showCode);
  copies(byId("share-copy-link"), () => link.value);
  copies(byId("share-copy-code"), () => code.textContent);
}
