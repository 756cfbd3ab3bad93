// The page: tabs, theme, key, legends, and the parts of it.

import { call, storeKey, storedKey } from "./api.js";
import { batchesTab } from "./batches.js";
import { watchTokens } from "./card.js";
import { chatTab } from "./chat.js";
import { compareTab } from "./compare.js";
import { completeTab } from "./complete.js";
import { byId } from "./dom.js";
import { readFragment, restore } from "./link.js";
import { watchServer } from "./live.js";
import { scoreTab } from "./score.js";
import { legends } from "./shades.js";
import { shareDialog } from "./share.js";
import { textBefore } from "./tokens.js";

const THEMES = { auto: "automatic", light: "light", dark: "dark" };
const TABS = ["complete", "chat", "score", "compare", "batches"];

/** `shown` has what to do when a tab comes to be seen, by its name. Returns select(name, focus). */
function tabs(shown) {
  const select = (name, focus = false) => {
    for (const other of TABS) {
      const tab = byId(`${other}-tab`);
      tab.ariaSelected = String(other === name);
      tab.tabIndex = other === name ? 0 : -1;
      byId(other).hidden = other !== name;
    }
    if (focus) byId(`${name}-tab`).focus();
    if (readFragment(location.hash.slice(1)).tab !== name) history.replaceState(null, "", `#${name}`);
    shown[name]();
  };
  for (const name of TABS) {
    const tab = byId(`${name}-tab`);
    tab.addEventListener("click", () => select(name));
    tab.addEventListener("keydown", ({ key }) => {
      const there = TABS.filter((other) => !byId(`${other}-tab`).hidden);
      const step = { ArrowRight: 1, ArrowLeft: there.length - 1 }[key];
      if (step) select(there[(there.indexOf(name) + step) % there.length], true);
    });
  }
  return select;
}

/** Opens the tab that the address names, with what a link says of it; the chat's only where the model has one. */
async function openAddressed(server, select) {
  const { tab, entries } = readFragment(location.hash.slice(1));
  const known = server.card().then(
    (card) => (byId("chat-tab").hidden = !card.chat),
    () => true, // the tab that opens says what is wrong
  );
  const lacking = tab === "chat" && (await known);
  const name = TABS.includes(tab) && !lacking ? tab : TABS[0];
  if (entries.length && name === tab) restore(byId(`${name}-form`), entries);
  select(name);
}

function themeButton() {
  const root = document.documentElement;
  const button = byId("theme-button");
  const show = () => {
    button.ariaLabel = `Theme: ${THEMES[root.dataset.theme]}`;
    button.title = button.ariaLabel;
  };
  button.addEventListener("click", () => {
    const names = Object.keys(THEMES);
    root.dataset.theme = names[(names.indexOf(root.dataset.theme) + 1) % names.length];
    localStorage.setItem("lpa-theme", root.dataset.theme);
    show();
  });
  show();
}

/** Returns askForKey(error): opens the dialog, says what was wrong, and is true once a key was given. */
function keyDialog(onKey) {
  const [dialog, input] = [byId("key-dialog"), byId("key")];
  let asked = null;
  const askForKey = (error) => {
    byId("key-wrong").textContent = error?.hadKey ? "The server does not know this key." : "";
    input.ariaInvalid = String(Boolean(error?.hadKey));
    byId("key-why").textContent = error && !error.hadKey ? "This server wants one. " : "";
    asked ??= new Promise((resolve) => {
      input.value = storedKey();
      dialog.returnValue = "cancel";
      dialog.addEventListener("close", () => resolve(dialog.returnValue === "save"), { once: true });
      dialog.showModal();
      input.select();
    }).then((given) => {
      asked = null;
      if (given) storeKey(input.value.trim());
      if (given) onKey();
      return given;
    });
    return asked;
  };
  byId("key-button").addEventListener("click", async () => {
    if (await askForKey(null)) await call("v1/models", { askForKey }).catch(() => {}); // asks again if it is wrong
  });
  return askForKey;
}

/** What the server says of the model, fetched once; its name is shown, with what the model says of itself. */
function cardOf(askForKey) {
  let asked = null;
  const ask = async () => {
    const { data } = await (await call("v1/models", { askForKey })).json();
    const [card] = data;
    const { id, description, max_model_len: context } = card;
    byId("model").textContent = id;
    byId("model").title = id;
    byId("about").textContent =
      description ??
      `A language model that continues a text, of up to ${context.toLocaleString("en")} tokens, and tells how probable it finds every token.`;
    return card;
  };
  return () => {
    asked ??= ask().catch((error) => {
      asked = null;
      throw error;
    });
    return asked;
  };
}

/** `action`, but only the first time. */
function once(action) {
  let done = false;
  return () => {
    if (!done) action();
    done = true;
  };
}

/** What is folded on a narrow window; style.css shows all of it on a wide one. */
function folds() {
  for (const button of document.querySelectorAll("button[aria-expanded]")) {
    const set = (open) => {
      button.ariaExpanded = String(open);
      button.textContent = open ? "Hide" : "Show";
    };
    button.addEventListener("click", () => set(button.ariaExpanded !== "true"));
    // the browser cannot point at a wrong value that is folded away
    byId(button.getAttribute("aria-controls")).addEventListener("invalid", () => set(true), true);
  }
}

const askForKey = keyDialog(watchServer());
const card = cardOf(askForKey);
const server = { askForKey, card, model: async () => (await card()).id };
themeButton();
legends();
folds();
watchTokens(byId("card"));
const score = scoreTab(server);
const complete = completeTab(server, (text) => {
  score.open(text);
  select("score", true);
});
const [compare, chat, batches] = [compareTab(server), chatTab(server), batchesTab(server)];
shareDialog({ complete, chat, score, compare });
for (const map of document.querySelectorAll("#score .tokens, #compare .tokens")) {
  map.addEventListener("branch", ({ target, detail }) => {
    shown.complete = () => {};
    select("complete");
    complete.branch(textBefore(map, target) + detail);
  });
}
// the first look at a tab shows a result at once
const shown = {
  complete: once(complete.start),
  chat: () => {},
  score: once(score.start),
  compare: once(compare.start),
  batches: batches.start,
};
const select = tabs(shown);
openAddressed(server, select);
addEventListener("hashchange", () => readFragment(location.hash.slice(1)).entries.length && location.reload());
