// The page: tabs, theme, key, legends, and the parts of it.

import { call, storedKey, storeKey } from "./api.js";
import { watchTokens } from "./card.js";
import { compareTab } from "./compare.js";
import { completeTab } from "./complete.js";
import { byId, failed } from "./dom.js";
import { watchServer } from "./live.js";
import { scoreTab } from "./score.js";
import { HOTTEST, shade } from "./tokens.js";

const THEMES = { auto: "automatic", light: "light", dark: "dark" };
const TABS = ["complete", "score", "compare"];

function tabs() {
  const select = (name, focus = false) => {
    for (const other of TABS) {
      const tab = byId(`${other}-tab`);
      tab.ariaSelected = String(other === name);
      tab.tabIndex = other === name ? 0 : -1;
      byId(other).hidden = other !== name;
    }
    if (focus) byId(`${name}-tab`).focus();
    history.replaceState(null, "", `#${name}`);
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

/** Returns askForKey(why): opens the dialog, and is true once a key was given. */
function keyDialog(onKey) {
  const [dialog, input] = [byId("key-dialog"), byId("key")];
  let asked = null;
  const askForKey = (why) => {
    byId("key-why").textContent = `${why ? `The server says: ${why}. ` : ""}It stays in this tab and is forgotten with it.`;
    asked ??= new Promise((resolve) => {
      input.value = storedKey();
      dialog.returnValue = "cancel";
      dialog.addEventListener("close", () => resolve(dialog.returnValue === "save"), { once: true });
      dialog.showModal();
    }).then((given) => {
      asked = null;
      if (given) storeKey(input.value.trim());
      if (given) onKey();
      return given;
    });
    return asked;
  };
  byId("key-button").addEventListener("click", () => askForKey(""));
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

/** The model's name, asked for once; the context sets the limit of what may be asked for. */
function modelOf(askForKey) {
  let asked = null;
  const ask = async () => {
    const { data } = await (await call("v1/models", { askForKey })).json();
    byId("model").textContent = data[0].id;
    byId("max_tokens").max = data[0].max_model_len - 1;
    byId("max_tokens").parentElement.querySelector("[type=range]").max = data[0].max_model_len - 1;
    return data[0].id;
  };
  return () => {
    asked ??= ask().catch((error) => {
      asked = null;
      throw error;
    });
    return asked;
  };
}

/** What is folded on a narrow window; style.css shows all of it on a wide one. */
function folds() {
  for (const button of document.querySelectorAll("[aria-expanded]")) {
    const set = (open) => {
      button.ariaExpanded = String(open);
      button.textContent = open ? "Hide" : "Show";
    };
    button.addEventListener("click", () => set(button.ariaExpanded !== "true"));
    // the browser cannot point at a wrong value that is folded away
    byId(button.getAttribute("aria-controls")).addEventListener("invalid", () => set(true), true);
  }
}

const select = tabs();
const askForKey = keyDialog(watchServer());
const server = { askForKey, model: modelOf(askForKey) };
themeButton();
legends();
folds();
completeTab(server, (text) => {
  select("score", true);
  byId("score-text").value = text;
  byId("score-form").requestSubmit();
});
scoreTab(server);
compareTab(server);
watchTokens(byId("card"));
server.model().catch((error) => failed("complete-error", error));
