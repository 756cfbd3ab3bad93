// The card beside a token: its probability, and what else it could have been, to branch there.

import { element } from "./dom.js";
import { bitsOf, blankName, pieceOf, textOf } from "./tokens.js";

const GAP = 8; // px
const SHOWN = 5; // alternatives

/** "12.3 %" of a probability. */
function percent(p) {
  if (p >= 0.9995) return "100 %";
  return p >= 0.0001 ? `${(p * 100).toFixed(p >= 0.1 ? 1 : 2)} %` : "< 0.01 %";
}

/**
 * Shows the card at the token that has the pointer, the focus or the last tap.
 *
 * While a token has the focus, its alternatives can be chosen: the token then gets the event "branch" with the
 * alternative's text as its `detail`.
 */
export function watchTokens(card) {
  let anchor = null;
  let dismissed = null; // the token with the focus whose card was sent away

  const hide = () => {
    anchor?.removeAttribute("aria-describedby");
    anchor = null;
    card.hidden = true;
  };
  const show = (span) => {
    if (span === anchor) return;
    hide();
    anchor = span;
    const piece = pieceOf(span);
    card.replaceChildren(...(piece.tokens.length > 1 ? partsOf(piece) : alternativesOf(piece.tokens[0])));
    card.hidden = false;
    span.setAttribute("aria-describedby", card.id);
    place(card, span);
  };
  const focused = () => {
    if (card.contains(document.activeElement)) return anchor;
    return document.activeElement?.matches(".token") ? document.activeElement : null;
  };
  const back = () => {
    const span = focused();
    if (span && span !== dismissed) show(span);
    else hide();
    card.classList.toggle("held", anchor !== null && anchor === span); // style.css lets the pointer in
  };

  document.addEventListener("pointerover", ({ target, pointerType }) => {
    if (pointerType === "touch" || card.contains(target)) return; // a tap gives the focus
    if (!target.matches?.(".token")) return back();
    show(target);
    card.classList.toggle("held", target === focused());
  });
  document.addEventListener("focusin", ({ target }) => {
    if (!card.contains(target)) dismissed = null;
    back();
  });
  document.addEventListener("focusout", () => setTimeout(back));
  document.addEventListener("keydown", (event) => {
    const choices = [...card.querySelectorAll("button")];
    const at = choices.indexOf(event.target);
    if (event.key === "Escape") {
      if (at >= 0) return anchor.focus();
      dismissed = focused();
      return hide();
    }
    const enters = event.target === anchor && ["Enter", " ", "ArrowDown"].includes(event.key);
    const to = enters ? 0 : at >= 0 ? { ArrowDown: at + 1, ArrowUp: at - 1 }[event.key] : undefined;
    if (!choices[to]) return;
    event.preventDefault();
    choices[to].focus();
  });
  card.addEventListener("click", ({ target }) => {
    const choice = target.closest("button");
    if (!choice) return;
    const span = anchor;
    hide();
    span.dispatchEvent(new CustomEvent("branch", { bubbles: true, detail: choice.value }));
  });
  document.addEventListener("scroll", () => anchor && place(card, anchor), { passive: true, capture: true });
  addEventListener("resize", hide);
}

function place(card, span) {
  const box = span.getClientRects()[0] ?? span.getBoundingClientRect();
  const page = document.documentElement.getBoundingClientRect(); // without the scroll bar
  const { offsetWidth: width, offsetHeight: height } = card;
  const left = Math.max(GAP, Math.min(box.left, page.width - width - GAP));
  const below = box.bottom + GAP + height <= innerHeight;
  card.style.left = `${left}px`;
  card.style.top = `${Math.max(GAP, below ? box.bottom + GAP : box.top - GAP - height)}px`;
}

const hint = (textContent) => element("p", { className: "hint", textContent });

function head(label, bits) {
  const value = bits === null ? "not scored" : `${bits.toFixed(2)} bits`;
  return element("p", { className: "card-token" }, element("b", {}, label), element("span", {}, value));
}

function alternativesOf(token) {
  if (token.logprob === null) return [head(token.label, null)];
  const shown = token.alternatives.filter(({ chosen }, i) => i < SHOWN || chosen);
  const rest = shown.reduce((left, { logprob }) => left - Math.exp(logprob), 1);
  const rows = element("div", { className: "bars" }, ...shown.map(choice), bar("all others", Math.max(rest, 0), "rest"));
  const rank = token.rank ? `Rank ${token.rank} of the model's guesses. ` : "";
  return [head(token.label, bitsOf(token.logprob)), rows, hint(`${rank}Select one to continue with it from here.`)];
}

/** An alternative as a button, if it is a text that one can go on from. */
function choice({ bytes, label, logprob, chosen }) {
  const text = textOf(bytes);
  const made = bar(label, Math.exp(logprob), chosen ? "chosen" : "", text ? "button" : "div");
  return text ? Object.assign(made, { type: "button", value: text }) : made;
}

/** Tokens that only together make characters: how probable each was. */
function partsOf({ text, tokens, bits }) {
  const scored = tokens.filter(({ logprob }) => logprob !== null);
  const rows = scored.map(({ label, logprob }) => bar(label, Math.exp(logprob), "chosen"));
  const why = hint(`${tokens.length} tokens, which have bytes that are no text alone`);
  return [head(blankName(text) ?? text, bits), element("div", { className: "bars" }, ...rows), why];
}

function bar(label, p, kind, tag = "div") {
  const fill = element("i", { className: `bar ${kind}` });
  fill.style.setProperty("--p", p);
  const [name, value] = [["label", label], ["value", percent(p)]].map(([part, text]) =>
    element("span", { className: `${part} ${kind}`, textContent: text }),
  );
  return element(tag, { className: "row" }, name, fill, value);
}
