// The card beside a token: its probability and what else it could have been.

import { bitsOf, blankName, pieceOf } from "./tokens.js";

const GAP = 8; // px
const element = (tag, className, text = "") => {
  const made = document.createElement(tag);
  made.className = className;
  made.textContent = text;
  return made;
};

/** "12.3 %" of a probability. */
function percent(p) {
  if (p >= 0.9995) return "100 %";
  return p >= 0.0001 ? `${(p * 100).toFixed(p >= 0.1 ? 1 : 2)} %` : "< 0.01 %";
}

/** Shows the card at the token that has the pointer, the focus or the last tap. */
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
  const focused = () => (document.activeElement?.matches(".token") ? document.activeElement : null);
  const back = () => (focused() && focused() !== dismissed ? show(focused()) : hide());

  document.addEventListener("pointerover", ({ target, pointerType }) => {
    if (pointerType === "touch") return; // a tap gives the focus
    if (target.matches?.(".token")) show(target);
    else back();
  });
  document.addEventListener("focusin", () => {
    dismissed = null;
    back();
  });
  document.addEventListener("focusout", () => setTimeout(back));
  document.addEventListener("keydown", ({ key }) => {
    if (key !== "Escape") return;
    dismissed = focused();
    hide();
  });
  addEventListener("scroll", () => anchor && place(card, anchor), { passive: true });
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

function head(label, bits) {
  const made = element("p", "card-token");
  made.append(element("b", "", label), element("span", "", bits === null ? "not scored" : `${bits.toFixed(2)} bits`));
  return made;
}

function alternativesOf(token) {
  if (token.logprob === null) return [head(token.label, null)];
  const rows = element("div", "bars");
  let rest = 1;
  for (const { label, logprob, chosen } of token.alternatives) {
    rest -= Math.exp(logprob);
    rows.append(...bar(label, Math.exp(logprob), chosen ? "chosen" : ""));
  }
  rows.append(...bar("all others", Math.max(rest, 0), "rest"));
  const rank = token.rank ? [element("p", "hint", `Rank ${token.rank} of the model's guesses`)] : [];
  return [head(token.label, bitsOf(token.logprob)), rows, ...rank];
}

/** Tokens that only together make characters: how probable each was. */
function partsOf({ text, tokens, bits }) {
  const rows = element("div", "bars");
  for (const { label, logprob } of tokens) {
    if (logprob !== null) rows.append(...bar(label, Math.exp(logprob), "chosen"));
  }
  return [head(blankName(text) ?? text, bits), rows, element("p", "hint", `${tokens.length} tokens, which have bytes that are no text alone`)];
}

function bar(label, p, kind) {
  const fill = element("i", `bar ${kind}`);
  fill.style.setProperty("--p", p);
  return [element("span", `label ${kind}`, label), fill, element("span", `value ${kind}`, percent(p))];
}
