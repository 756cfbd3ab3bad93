// What went wrong, in people's words, and what can be done about it.

const BUTTONS = {
  again: "Try again",
  key: "Give a key",
  fit: "Use what fits",
  shorten: "Keep the end of the prompt",
  sliding: "Use sliding windows",
  rolling: "Use rolling windows",
  begin: "Score the beginning",
  reset: "Use the default",
};

const OF_STATUS = {
  0: ["The server does not answer.", "again"],
  401: ["This server wants an API key.", "key"],
  429: ["The server has more to do than it takes on. In a moment it may have time.", "again"],
  499: ["An operator of the server has ended this request.", "again"],
  500: ["The server failed while it computed this; its log says why.", "again"],
  502: ["The server behind this address does not answer.", "again"],
  503: ["The server is stopping, or its engine has ended.", "again"],
  504: ["This took longer than the server allows.", "again"],
};

/**
 * {message, remedy, button} of an ApiError: a sentence, and the name of what helps and its button's text, if one of
 * `remedies` does. `label` is what the page calls the field at fault.
 */
export function explain(error, label, remedies) {
  const [message, ...names] = sentence(error, label, remedies);
  const remedy = names.find((name) => name in remedies);
  return { message, remedy, button: BUTTONS[remedy] };
}

function sentence(error, label, remedies) {
  const { status, code, param, message } = error;
  if (status === 401 && error.hadKey) return ["The server does not know this key.", "key"];
  if (status === 0 && error.broken) return ["The connection was lost in the middle of the answer.", "again"];
  if (status in OF_STATUS) return OF_STATUS[status];
  if (status === 413) return [`This is larger than the server takes in one request. ${sentenceOf(message)}`, "begin"];
  if (/method 'full' takes at most/.test(message)) return ["The text is longer than one window.", "sliding"];
  if (code === "context_length_exceeded") {
    if ("shorten" in remedies) return ["The prompt takes all that the model can read at once.", "shorten"];
    return ["The prompt and max tokens are together more than the model can read at once.", "fit"];
  }
  if (/no token to score/.test(message)) {
    return ["There is nothing to score: nothing stands before the only token, to predict it from.", "rolling"];
  }
  if (param === "input" && /chunks/.test(message)) return [sentenceOf(message.replace(/^input: /, "The text ")), "sliding"];
  const reason = param && message.startsWith(`${param}: `) ? message.slice(param.length + 2) : message;
  return label ? [sentenceOf(`${label}: ${reason}`), "reset"] : [sentenceOf(message)];
}

const sentenceOf = (text) => text.charAt(0).toUpperCase() + text.slice(1) + (/[.!?]$/.test(text) ? "" : ".");
