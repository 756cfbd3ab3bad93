// The Chat tab: a conversation with a model that has a chat template.

import { announce, byId, element, toDefault, write } from "./dom.js";
import { CHAT, generate, sentenceOf } from "./generate.js";
import { runs } from "./run.js";
import { anySeed, sampling } from "./sampling.js";
import { addSliders } from "./sliders.js";
import { roam, textBefore } from "./tokens.js";

const NAMES = { user: "You", assistant: "Model" };

/** Wires the tab. Returns what `runs` does, and `requests()`, of which the last answer is one. */
export function chatTab(server) {
  const [form, log, text, system, kept] = ["chat-form", "chat-log", "chat-text", "chat-system", "chat-messages"].map(byId);
  let messages = []; // {role, content}, oldest first, without the system's
  let last = null; // {history, seed} of the last answer
  let begun = null; // {at, prefix}: an answer to be written anew from there

  addSliders(form);
  roam(log);

  /** The request for an answer to `history`, whose last message may be the beginning of it. */
  async function body(history, ownSeed) {
    const first = system.value.trim() ? [{ role: "system", content: system.value }] : [];
    const goesOn = history.at(-1)?.role === "assistant" ? { continue_final_message: true } : {};
    return { model: await server.model(), messages: [...first, ...history], seed: ownSeed, ...sampling(form), ...goesOn };
  }

  async function work(signal) {
    const anew = begun;
    begun = null;
    const said = anew ? "" : text.value;
    if (!anew && !said.trim()) return text.focus();
    const { at, prefix } = anew ?? { at: messages.length + 1, prefix: "" };
    const history = anew ? messages.slice(0, at) : [...messages, { role: "user", content: said }];
    const answered = prefix ? [...history, { role: "assistant", content: prefix }] : history;
    const asked = await body(answered, anySeed());
    const bubble = drawn("assistant", prefix && element("span", { className: "before", textContent: prefix }));
    const begin = () => {
      while (log.children.length > Math.min(at, messages.length)) log.lastChild.remove();
      if (said) {
        log.append(drawn("user", said));
        write(text, "");
      }
      log.append(bubble);
      messages = [...history, { role: "assistant", content: prefix }];
      last = { history: answered, seed: asked.seed };
    };
    const show = (facts) => {
      if (!bubble.isConnected) return; // a new chat was begun
      messages[at].content = prefix + facts.text;
      byId("chat-facts").textContent = sentenceOf(facts);
      requestAnimationFrame(toEnd);
    };
    try {
      const output = bubble.lastChild;
      await generate(server, CHAT, asked, { output, begin, show, signal });
      announce(messages[at].content);
    } catch (error) {
      if (error.name !== "AbortError") begun = anew; // to try again
      throw error;
    } finally {
      keep();
    }
  }

  function drawn(role, ...content) {
    const said = element("div", { className: "prose" }, ...content.filter(Boolean));
    if (role === "assistant") said.classList.add("tokens");
    return element("li", { className: role }, element("span", { className: "who", textContent: NAMES[role] }), said);
  }

  const toEnd = () => (log.scrollTop = log.scrollHeight); // once a frame: it makes the browser lay out all tokens

  /** The conversation is a control of the form, which a link can hold. */
  function keep() {
    kept.value = messages.length ? JSON.stringify(messages) : "";
    byId("chat-new").disabled = !messages.length;
  }

  kept.addEventListener("input", () => {
    try {
      const read = JSON.parse(kept.value);
      messages = read.map(({ role, content }) => ({ role: role in NAMES ? role : "user", content: String(content) }));
    } catch {
      messages = [];
    }
    const end = messages.at(-1)?.role === "assistant" ? -1 : messages.length;
    last = messages.length ? { history: messages.slice(0, end), seed: anySeed() } : null;
    log.replaceChildren(...messages.map(({ role, content }) => drawn(role, content)));
    keep();
  });

  const remedies = () => ({
    fit: () => {
      toDefault(byId("chat-max_tokens"));
      run.start();
    },
  });
  const run = runs(form, server, { place: "chat-error", work, remedies });

  text.addEventListener("input", () => (begun = null));
  text.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.ctrlKey || event.metaKey || event.isComposing) return;
    event.preventDefault();
    run.start();
  });
  log.addEventListener("branch", ({ target, detail }) => {
    const bubble = target.closest("li");
    begun = { at: [...log.children].indexOf(bubble), prefix: textBefore(bubble.lastChild, target) + detail };
    run.restart();
  });
  byId("chat-new").addEventListener("click", () => {
    run.stop();
    byId("chat-facts").textContent = "";
    write(kept, "");
    text.focus();
  });
  async function requests() {
    const { history, seed } = last ?? { history: [{ role: "user", content: text.value }], seed: anySeed() };
    return [[CHAT.path, await body(history, seed)]];
  }
  return { ...run, requests };
}
