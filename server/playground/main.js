// The page: tabs, theme, key, legends, and the parts of it.

import { call, storeKey, storedKey } from "./api.js";
import { watchTokens } from "./card.js";
import { compareTab } from "./compare.js";
import { completeTab } from "./complete.js";
import { byId } from "./dom.js";
import { watchServer } from "./live.js";
import { scoreTab } from "./score.js";
import { HOTTEST, shade } from "./tokens.js";

const THEMES = { auto: "automatic", light: "light", dark: "dark" };
const TABS = ["complete", "score", "compare"];

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
    history.replaceState(null, "", `#${name}`);
    shown[name]();
  };
  for (const [i, name] of TABS.entries()) {
    const tab = byId(`${name}-tab`);
    tab.addEventListener("click", () => select(name));
    tab.addEventListener("keydown", ({ key }) => {
      const step = { ArrowRight: 1, ArrowLeft: TABS.length - 1 }[key];
      if (step) select(TABS[(i + step) % TABS.length], true);
    });
  }
  const asked = location.hash.slice(1);
  if (TABS.includes(asked)) select(asked);
  else shown[TABS[0]]();
  return select;
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

function legends() {
  const percents = ["100", "25", "6.3", "1.6", "0.4", "0.1", "≤ 0.02"];
  for (const legend of document.querySelectorAll("[data-legend]")) {
    const inBits = legend.dataset.legend === "bits";
    const title = document.createElement("span");
    title.textContent = inBits ? "Surprisal, bits" : "Probability, %";
    const scale = document.createElement("ol");
    for (let bits = 0; bits <= HOTTEST; bits += 2) {
      const step = document.createElement("li");
      const swatch = Object.assign(document.createElement("i"), { className: "heat" });
      shade(swatch, bits);
      const inBitsLabel = bits < HOTTEST ? String(bits) : `≥ ${bits}`;
      step.append(swatch, inBits ? inBitsLabel : percents[bits / 2]);
      scale.append(step);
    }
    legend.append(title, scale);
  }
}

/** The model's name, asked for once, and shown with what the model says of itself. */
function modelOf(askForKey) {
  let asked = null;
  const ask = async () => {
    const { data } = await (await call("v1/models", { askForKey })).json();
    const { id, description, max_model_len: context } = data[0];
    byId("model").textContent = id;
    byId("model").title = id;
    byId("about").textContent =
      description ??
      `A language model that continues a text, of up to ${context.toLocaleString("en")} tokens, and tells how probable it finds every token.`;
    return id;
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
const server = { askForKey, model: modelOf(askForKey) };
themeButton();
legends();
folds();
watchTokens(byId("card"));
const scoring = scoreTab(server);
const completing = completeTab(server, (text) => {
  scoring.open(text);
  select("score", true);
});
const comparing = compareTab(server);
// whoever comes sees a result at once
const select = tabs({
  complete: once(completing.start),
  score: once(scoring.start),
  compare: once(comparing.start),
});
