// Talks to the server: what it has, and drawing with progress.

let key = sessionStorage.getItem("dmm-jax-key") ?? "";

export function setKey(value) {
  key = value;
  sessionStorage.setItem("dmm-jax-key", value);
}

// Fetches an address; throws an Error whose message is the server's own sentence.
async function ask(path, options = {}) {
  const headers = { ...options.headers, ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  let answer;
  try {
    answer = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server does not answer. Is it still running?");
  }
  if (answer.ok) return answer;
  const body = await answer.json().catch(() => ({}));
  const problem = new Error(body.error?.message ?? `The server answered ${answer.status}.`);
  problem.status = answer.status;
  problem.retryAfter = Number(answer.headers.get("Retry-After")) || 0;
  throw problem;
}

export const model = async () => (await ask("/api/model")).json();
export const isReady = async () => (await fetch("/readyz").catch(() => ({ ok: false }))).ok;

// Draws, and calls on(name, data) for every event of the stream.
export async function draw(body, on, signal) {
  const text = JSON.stringify({ ...body, stream: true });
  const answer = await ask("/api/draw", { method: "POST", headers: { "Content-Type": "application/json" }, body: text, signal });
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let waiting = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const blocks = (waiting + value).split("\n\n");
    waiting = blocks.pop();
    for (const block of blocks) {
      const name = /^event: (.*)$/m.exec(block)?.[1], data = /^data: (.*)$/m.exec(block)?.[1];
      if (name) on(name, JSON.parse(data));
    }
  }
}
