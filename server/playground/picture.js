// A part of the page as a picture: its backgrounds and its lines of text where the browser has put them.

const MARGIN = 20; // px
const SCALE = 2; // pixels of a PNG to one of the page

const pen = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
const colors = new Map(); // CSS to #rrggbb, blended over the paper

/** {width, height, paper, boxes, lines} of elements that are shown, from the left upper corner of all of them. */
export function markOf(elements) {
  const paper = getComputedStyle(elements[0].closest(".card")).backgroundColor;
  const boxes = [];
  const lines = [];
  for (const element of elements.flatMap((root) => [root, ...root.querySelectorAll("*")])) {
    const style = getComputedStyle(element);
    const fill = colorOf(style.backgroundColor, paper);
    if (fill !== colorOf(paper, paper) && !element.matches("select")) {
      for (const box of element.getClientRects()) boxes.push({ box, fill, radius: parseFloat(style.borderTopLeftRadius) });
    }
    const font = { family: style.fontFamily, size: parseFloat(style.fontSize), weight: style.fontWeight };
    const told = element.matches("select") ? menuLine(element) : [...element.childNodes].flatMap(linesOf);
    for (const { text, box } of told) lines.push({ text, box, font, fill: colorOf(style.color, paper) });
  }
  const all = [...boxes, ...lines].map(({ box }) => box);
  const left = Math.min(...all.map((box) => box.left)) - MARGIN;
  const top = Math.min(...all.map((box) => box.top)) - MARGIN;
  const moved = ({ box, ...mark }) => ({ ...mark, x: box.left - left, y: box.top - top, width: box.width, height: box.height });
  return {
    width: Math.ceil(Math.max(...all.map((box) => box.right)) - left + MARGIN),
    height: Math.ceil(Math.max(...all.map((box) => box.bottom)) - top + MARGIN),
    paper: colorOf(paper, paper),
    boxes: boxes.map(moved),
    lines: lines.map(moved).map((line) => ({ ...line, y: line.y + ascentOf(line.font) })),
  };
}

function colorOf(color, paper) {
  const key = `${color} ${paper}`;
  if (!colors.has(key)) {
    for (const layer of [paper, color]) {
      pen.fillStyle = layer;
      pen.fillRect(0, 0, 1, 1);
    }
    const bytes = [...pen.getImageData(0, 0, 1, 1).data].slice(0, 3);
    colors.set(key, `#${bytes.map((byte) => byte.toString(16).padStart(2, "0")).join("")}`);
  }
  return colors.get(key);
}

const fontOf = ({ weight, size, family }) => `${weight} ${size}px ${family}`;

function ascentOf(font) {
  pen.font = fontOf(font);
  return pen.measureText("x").fontBoundingBoxAscent;
}

/** [{text, box}] of a text node, a line each; none of other nodes and of white space. */
function linesOf(node) {
  if (node.nodeType !== Node.TEXT_NODE) return [];
  const range = document.createRange();
  const found = [];
  let at = 0;
  for (const character of node.data) {
    range.setStart(node, at);
    range.setEnd(node, (at += character.length));
    const box = range.getClientRects()[0];
    if (!box?.width) continue;
    const line = found.at(-1);
    if (line && Math.abs(line.box.top - box.top) < 1) {
      line.text += character;
      line.box = new DOMRect(line.box.left, line.box.top, box.right - line.box.left, box.height);
    } else found.push({ text: character, box });
  }
  return found.filter(({ text }) => text.trim());
}

function menuLine(menu) {
  const box = menu.getBoundingClientRect();
  const text = menu.selectedOptions[0].textContent;
  const height = parseFloat(getComputedStyle(menu).fontSize) * 1.2;
  pen.font = fontOf({ family: getComputedStyle(menu).fontFamily, size: height / 1.2, weight: 400 });
  const { width } = pen.measureText(text);
  return [{ text, box: new DOMRect(box.left, box.top + (box.height - height) / 2, width, height) }];
}

const escaped = (text) =>
  text.replace(/[&<>"]/g, (sign) => `&#${sign.codePointAt(0)};`).replace(/[\0-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]/g, "\ufffd");

/** The picture as the text of an SVG file. */
export function asSvg({ width, height, paper, boxes, lines }) {
  const number = (value) => String(Math.round(value * 100) / 100);
  const place = ({ x, y }) => `x="${number(x)}" y="${number(y)}"`;
  const rects = boxes.map(
    (box) =>
      `<rect ${place(box)} width="${number(box.width)}" height="${number(box.height)}" rx="${number(box.radius)}" fill="${box.fill}"/>`,
  );
  const texts = lines.map(
    ({ text, font, fill, ...line }) =>
      `<text ${place(line)} fill="${fill}" font-family="${escaped(font.family)}" font-size="${number(font.size)}" ` +
      `font-weight="${font.weight}" textLength="${number(line.width)}" lengthAdjust="spacingAndGlyphs" xml:space="preserve">${escaped(text)}</text>`,
  );
  return [
    `<svg xmlns="http://www.w3.org/2000/svg" width="${width}" height="${height}" viewBox="0 0 ${width} ${height}">`,
    `<rect width="${width}" height="${height}" fill="${paper}"/>`,
    ...rects,
    ...texts,
    "</svg>\n",
  ].join("\n");
}

/** The picture as a PNG, a Blob. */
export function asPng({ width, height, paper, boxes, lines }) {
  const canvas = new OffscreenCanvas(width * SCALE, height * SCALE);
  const context = canvas.getContext("2d");
  context.scale(SCALE, SCALE);
  context.fillStyle = paper;
  context.fillRect(0, 0, width, height);
  for (const { x, y, width: w, height: h, radius, fill } of boxes) {
    context.fillStyle = fill;
    context.beginPath();
    context.roundRect(x, y, w, h, radius);
    context.fill();
  }
  for (const { x, y, text, font, fill } of lines) {
    context.font = fontOf(font);
    context.fillStyle = fill;
    context.fillText(text, x, y);
  }
  return canvas.convertToBlob();
}
