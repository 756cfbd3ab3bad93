// The Batches tab: a file of requests goes up, its progress is shown, and the answers come down.

import { call } from "./api.js";
import { save } from "./clipboard.js";
import { announce, byId, count, element, failed } from "./dom.js";
import { retries, runs } from "./run.js";

const SOON = 1000; // ms between looks at batches that run
const LATER = 10_000; // ms, where none runs
const MOST = 100; // batches that are shown
const HEAD = 4 << 20; // bytes of a file that its first line is looked for in
const MOST_ERRORS = 5; // of a batch's file that are shown

const STATUS = {
  validating: "Checking the file",
  in_progress: "Running",
  finalizing: "Writing the answers",
  completed: "Done",
  failed: "Not run",
  cancelling: "Being cancelled",
  cancelled: "Cancelled",
  expired: "Out of time",
};
const CANCELLABLE = ["validating", "in_progress"];
const ACTIVE = [...CANCELLABLE, "finalizing", "cancelling"];
const OFF = "batches_are_off";

/** The endpoint that a file's first line names; the server says what is wrong with a line that names none. */
async function endpointOf(file) {
  const text = await file.slice(0, HEAD).text();
  try {
    return String(JSON.parse(text.split("\n").find((line) => line.trim())).url);
  } catch {
    return "/v1/completions";
  }
}

/** Requests to try it with. */
function exampleOf(model) {
  const prompts = ["It was a dark night, and", "The old man looked at me and said,", "At last the princess opened the door, and there"];
  const lines = prompts.map((prompt, i) => ({
    custom_id: `request-${i + 1}`,
    method: "POST",
    url: "/v1/completions",
    body: { model, prompt, max_tokens: 40 },
  }));
  return new File([lines.map((line) => `${JSON.stringify(line)}\n`).join("")], "example.jsonl");
}

/** Wires the tab. Returns {start}, to be called whenever the tab comes to be seen. */
export function batchesTab(server) {
  const [form, input, list] = ["batches-form", "batches-file", "batches-list"].map(byId);
  const { askForKey } = server;
  const items = new Map(); // by id
  let timer = null;

  async function upload(signal) {
    const [file] = input.files;
    const body = new FormData();
    body.append("purpose", "batch");
    body.append("file", file);
    announce("Sending the file");
    const kept = await (await call("v1/files", { body, signal, askForKey })).json();
    const endpoint = await endpointOf(file);
    const asked = { input_file_id: kept.id, endpoint, completion_window: "24h", metadata: { filename: file.name.slice(0, 512) } };
    await call("v1/batches", { body: asked, signal, askForKey });
    form.reset();
    announce("The batch is in the queue");
    await look();
  }

  /** Show the batches as they are now, and look again after a while if the tab is still seen. */
  async function look() {
    clearTimeout(timer);
    if (byId("batches").hidden || document.hidden) return;
    let wait = LATER;
    try {
      const { data, has_more: more } = await (await call(`v1/batches?limit=${MOST}`, { askForKey })).json();
      failed("batches-list-error", null);
      show(data, more);
      if (data.some(({ status }) => ACTIVE.includes(status))) wait = SOON;
    } catch (error) {
      if (error.code === OFF) return off();
      failed("batches-list-error", error, retries(server, error, look));
      if (error.status === 401) return;
    }
    clearTimeout(timer); // of a look that has begun meanwhile
    timer = setTimeout(look, wait);
  }

  function off() {
    form.hidden = true;
    byId("batches-off").hidden = false;
  }

  function show(batches, more) {
    for (const [i, batch] of batches.entries()) {
      const item = items.get(batch.id) ?? itemOf(batch.id);
      items.set(batch.id, item);
      item.show(batch);
      if (list.children[i] !== item.node) list.insertBefore(item.node, list.children[i] ?? null);
    }
    while (list.children.length > batches.length) list.lastElementChild.remove();
    byId("batches-facts").textContent = more ? `The latest ${MOST}` : "";
  }

  /** A batch's entry, which is kept while the batch goes on, so that the focus stays where it is. */
  function itemOf(id) {
    const name = element("strong");
    const status = element("span", { className: "batch-status" });
    const counts = element("span", { className: "hint" });
    const bar = element("progress", { max: 1 });
    const wrong = element("ul", { className: "error" });
    const place = element("p", { className: "error", id: `error-${id}`, role: "alert" });
    const button = (text, action) => {
      const made = element("button", { type: "button", textContent: text });
      made.addEventListener("click", () => act(place.id, action));
      return made;
    };
    const output = button("Save answers", () => download(shown.output_file_id, `${id}_output.jsonl`));
    const errors = button("Save errors", () => download(shown.error_file_id, `${id}_error.jsonl`));
    const cancel = button("Cancel", () => call(`v1/batches/${id}/cancel`, { body: {}, askForKey }).then(look));
    const head = element("div", { className: "batch-head" }, name, status);
    const node = element("li", {}, head, bar, counts, wrong, element("div", { className: "actions" }, output, errors, cancel, place));
    let shown = null;
    const update = (batch) => {
      const { total, completed, failed: bad } = batch.request_counts;
      const before = shown?.status;
      shown = batch;
      name.textContent = batch.metadata?.filename ?? batch.input_file_id;
      status.textContent = STATUS[batch.status];
      node.dataset.status = batch.status;
      bar.hidden = !ACTIVE.includes(batch.status);
      bar.ariaLabel = `Lines of ${name.textContent}`;
      if (batch.status === "in_progress" && total) bar.value = (completed + bad) / total;
      else bar.removeAttribute("value");
      const begun = new Date(1000 * batch.created_at).toLocaleString();
      const lines = total ? `${count(completed)} of ${count(total)} lines answered${bad ? `, ${count(bad)} failed` : ""} · ` : "";
      counts.textContent = `${lines}${batch.endpoint} · ${begun}`;
      output.hidden = !batch.output_file_id;
      errors.hidden = !batch.error_file_id;
      cancel.hidden = !CANCELLABLE.includes(batch.status);
      const problems = batch.errors?.data ?? [];
      wrong.hidden = !problems.length;
      wrong.replaceChildren(...problems.slice(0, MOST_ERRORS).map(({ line, message }) => element("li", {}, line ? `Line ${line}: ${message}` : message)));
      if (problems.length > MOST_ERRORS) wrong.append(element("li", {}, `… and ${problems.length - MOST_ERRORS} more`));
      if (before && before !== batch.status && !ACTIVE.includes(batch.status)) announce(`${name.textContent}: ${STATUS[batch.status]}`);
    };
    return { node, show: update };
  }

  async function act(place, action) {
    failed(place, null);
    try {
      await action();
    } catch (error) {
      failed(place, error, retries(server, error, () => act(place, action)));
    }
  }

  const download = async (id, name) => save(name, await (await call(`v1/files/${id}/content`, { askForKey })).blob());

  runs(form, server, { place: "batches-error", work: upload });
  byId("batches-example").addEventListener("click", () =>
    act("batches-error", async () => {
      const files = new DataTransfer();
      files.items.add(exampleOf(await server.model()));
      input.files = files.files;
    }),
  );
  document.addEventListener("visibilitychange", look);
  return { start: look };
}
