// Requests as one would send them from elsewhere: with curl, and in Python with OpenAI's client.

const METHODS = { "v1/completions": "completions", "v1/chat/completions": "chat.completions" };
const ANSWERS = { "v1/completions": "answer.choices[0].text", "v1/chat/completions": "answer.choices[0].message.content" };
const OPENAI = new Set(
  "model prompt messages temperature max_tokens top_p presence_penalty frequency_penalty seed stop".split(" "),
); // what the client's methods have parameters for; all else goes in extra_body
const KEY = "LPA_API_KEY"; // the variable that has the key, which is never written out

const shell = (text) => `'${text.replaceAll("'", "'\\''")}'`;

/** Commands that send `requests`, [path, body] each, to the server at `base`, which ends in "/". */
export function shellCode(base, requests, withKey) {
  const command = ([path, body]) =>
    [
      `curl ${shell(base + path)}`,
      `-H 'Content-Type: application/json'`,
      ...(withKey ? [`-H "Authorization: Bearer $${KEY}"`] : []),
      `-d ${shell(JSON.stringify(body, null, 2))}`,
    ].join(" \\\n  ");
  return `${requests.map(command).join("\n\n")}\n`;
}

/** A program that sends them. */
export function pythonCode(base, requests, withKey) {
  const other = requests.some(([path]) => !(path in METHODS));
  const imports = [...(withKey ? ["import os"] : []), ...(other ? ["import httpx"] : []), "from openai import OpenAI"];
  const key = withKey ? `os.environ["${KEY}"]` : '"none is needed"';
  const client = `client = OpenAI(base_url="${base}v1", api_key=${key})`;
  return `${imports.join("\n")}\n\n${client}\n\n${requests.map(program).join("\n")}`;
}

function program([path, body]) {
  if (!(path in METHODS)) {
    return `answer = client.post("/${path.replace("v1/", "")}", body=${literal(body)}, cast_to=httpx.Response)\nprint(answer.json())\n`;
  }
  const entries = Object.entries(body);
  const known = entries.filter(([name]) => OPENAI.has(name));
  const extra = entries.filter(([name]) => !OPENAI.has(name));
  if (extra.length) known.push(["extra_body", Object.fromEntries(extra)]);
  const fields = known.map(([name, value]) => `    ${name}=${literal(value, "    ")},\n`).join("");
  return `answer = client.${METHODS[path]}.create(\n${fields})\nprint(${ANSWERS[path]})\n`;
}

/** A value of JSON as Python writes it. */
export function literal(value, indent = "") {
  if (value === null) return "None";
  if (typeof value === "boolean") return value ? "True" : "False";
  if (typeof value !== "object") return JSON.stringify(value);
  const deeper = `${indent}    `;
  const [open, close, items] = Array.isArray(value)
    ? ["[", "]", value.map((item) => literal(item, deeper))]
    : ["{", "}", Object.entries(value).map(([name, item]) => `${JSON.stringify(name)}: ${literal(item, deeper)}`)];
  return items.length ? `${open}\n${items.map((item) => `${deeper}${item},\n`).join("")}${indent}${close}` : open + close;
}
