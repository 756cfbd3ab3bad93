// Calls to the server's API, with a key where it asks for one.

const STORED_KEY = "lpa-api-key";

/** OpenAI's error object, or the want of an answer (status 0). */
export class ApiError extends Error {
  constructor(message, status, { param = null, code = null, hadKey = false, broken = false } = {}) {
    super(message);
    this.status = status;
    this.param = param; // the field at fault
    this.code = code;
    this.hadKey = hadKey; // whether a key was sent
    this.broken = broken; // whether the answer had begun
  }
}

export const storedKey = () => sessionStorage.getItem(STORED_KEY) ?? "";

export function storeKey(key) {
  if (key) sessionStorage.setItem(STORED_KEY, key);
  else sessionStorage.removeItem(STORED_KEY);
}

/**
 * The response to a GET, or to a POST if there is a body, which is sent as JSON unless it is a form; throws ApiError
 * unless it is a success.
 * After a 401, `askForKey(error)` is awaited, and the call made again with the key it stored if it returns true.
 */
export async function call(path, { body, signal, askForKey } = {}) {
  for (;;) {
    const key = storedKey();
    const response = await send(path, key, body, signal);
    if (response.ok) return response;
    const error = await errorOf(response, key);
    if (error.status !== 401) throw error;
    if (storedKey() !== key) continue; // another call was given a new one meanwhile
    if (!askForKey || !(await askForKey(error))) throw error;
  }
}

async function send(path, key, body, signal) {
  const headers = {};
  if (key) headers.Authorization = `Bearer ${key}`;
  const isForm = body instanceof FormData; // the browser names its type
  if (body && !isForm) headers["Content-Type"] = "application/json";
  try {
    const content = isForm ? body : body && JSON.stringify(body);
    return await fetch(path, { method: body ? "POST" : "GET", headers, body: content, signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("the server cannot be reached", 0);
  }
}

async function errorOf(response, key) {
  const hadKey = Boolean(key);
  try {
    const { error } = await response.json();
    return new ApiError(error.message, response.status, { param: error.param, code: error.code, hadKey });
  } catch {
    return new ApiError(`the server answered with status ${response.status}`, response.status, { hadKey });
  }
}
