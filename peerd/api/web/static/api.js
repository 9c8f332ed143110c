// Sends requests to the daemon, with the token if there is one, and turns failures into errors that say what happened.

const TOKEN = "peerd.token";

export class ApiError extends Error {
  constructor(status, message, retryAfterS = null) {
    super(message);
    this.status = status;
    this.retryAfterS = retryAfterS;
  }
}

/** Take the token from the link's fragment (`#token=...`), and take it out of the address bar and the history. */
export function takeToken() {
  const found = new URLSearchParams(location.hash.slice(1)).get("token");
  if (found) {
    setToken(found);
    history.replaceState(null, "", `${location.pathname}#chat`);
  }
}

export function setToken(token) {
  localStorage.setItem(TOKEN, token);
}

function headers(more = {}) {
  const token = localStorage.getItem(TOKEN);
  return token ? { ...more, authorization: `Bearer ${token}` } : more;
}

async function ask(path, options = {}) {
  let response;
  try {
    response = await fetch(path, { ...options, headers: headers(options.headers) });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, "The daemon does not answer. Is peerd still running?");
  }
  if (response.ok) return response;
  if (response.status === 401) document.dispatchEvent(new CustomEvent("peerd:login"));
  throw await errorOf(response);
}

async function errorOf(response) {
  let message = `${response.status} ${response.statusText}`;
  try {
    message = (await response.json()).error.message;
  } catch {
    // Not one of our errors, so only its status is known.
  }
  const retry = Number(response.headers.get("retry-after"));
  return new ApiError(response.status, message, retry > 0 ? retry : null);
}

export async function getJson(path, signal) {
  return (await ask(path, { signal })).json();
}

/**
 * The pieces of a chat answer, as they come. `body`: as OpenAI has it, without `stream`. Raises ApiError, also for an
 * error in mid-stream, and AbortError once `signal` aborts.
 */
export async function* streamChat(body, signal) {
  const response = await ask("/v1/chat/completions", {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true, include_chain: true } }),
    signal,
  });
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const piece = JSON.parse(data);
    if (piece.error) throw new ApiError(502, piece.error.message);
    yield piece;
  }
  throw new ApiError(0, "The answer was cut off: the daemon closed the connection.");
}

/** The data of server-sent events. */
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const parts = (rest + value).split("\n\n");
      rest = parts.pop();
      for (const part of parts) if (part.startsWith("data: ")) yield part.slice(6);
    }
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, "The answer was cut off: the connection to the daemon broke.");
  } finally {
    reader.cancel().catch(() => {});
  }
}
