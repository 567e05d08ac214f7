// Reads the parameters that PNG files carry: dmm-jax's exact JSON, or the text of AUTOMATIC1111's web UI.

const SIGNATURE = [137, 80, 78, 71, 13, 10, 26, 10];

// Returns {keyword: text} of the text chunks (tEXt, and iTXt without compression) of a PNG in an ArrayBuffer.
export function textChunks(buffer) {
  const bytes = new Uint8Array(buffer), view = new DataView(buffer), chunks = {};
  if (!SIGNATURE.every((byte, place) => bytes[place] === byte)) throw new Error("This file is not a PNG.");
  for (let place = 8; place + 12 <= bytes.length; ) {
    const length = view.getUint32(place), kind = String.fromCharCode(...bytes.subarray(place + 4, place + 8));
    const data = bytes.subarray(place + 8, Math.min(place + 8 + length, bytes.length));
    const end = data.indexOf(0);
    if (kind === "tEXt" && end > 0) chunks[latin1(data.subarray(0, end))] = latin1(data.subarray(end + 1));
    if (kind === "iTXt" && end > 0 && data[end + 1] === 0) {
      const language = data.indexOf(0, end + 3), translated = data.indexOf(0, language + 1);
      chunks[latin1(data.subarray(0, end))] = new TextDecoder().decode(data.subarray(translated + 1));
    }
    if (kind === "IEND") break;
    place += 12 + length;
  }
  return chunks;
}

const latin1 = (bytes) => new TextDecoder("latin1").decode(bytes);

// Returns the parameters of a picture, named as in our JSON; fields that the file does not state are absent.
export function parametersOf(buffer) {
  const chunks = textChunks(buffer);
  if (chunks.dmm_jax) {
    try {
      return JSON.parse(chunks.dmm_jax);
    } catch {
      // Another program changed the chunk: the text may still be whole.
    }
  }
  if (chunks.parameters) return fromA1111(chunks.parameters);
  throw new Error("This PNG carries no parameters.");
}

// Reads A1111's text: the prompt, "Negative prompt: ...", and a last line of "Name: value" pairs.
export function fromA1111(text) {
  const lines = text.trim().split("\n"), found = {};
  const last = lines.length && /^Steps: \d+/.test(lines.at(-1)) ? lines.pop() : "";
  const start = lines.findIndex((line) => line.startsWith("Negative prompt: "));
  found.prompt = lines.slice(0, start < 0 ? undefined : start).join("\n");
  found.negative_prompt = start < 0 ? "" : lines.slice(start).join("\n").slice("Negative prompt: ".length);
  const fields = {};
  for (const [, name, value] of last.matchAll(/([\w ]+): ("(?:\\.|[^"\\])*"|[^,]*)(?:, |$)/g)) {
    fields[name.trim()] = value.startsWith('"') ? JSON.parse(value) : value;
  }
  const numbers = { Steps: "steps", Seed: "seed", "CFG scale": "guidance_scale", "CFG Rescale phi": "guidance_rescale" };
  for (const [name, ours] of Object.entries(numbers)) {
    if (Number.isFinite(Number.parseFloat(fields[name]))) found[ours] = Number.parseFloat(fields[name]);
  }
  const size = /^(\d+)x(\d+)$/.exec(fields.Size ?? "");
  if (size) [found.width, found.height] = [Number(size[1]), Number(size[2])];
  if (fields.Sampler) found.solver = [fields.Sampler, fields["Schedule type"]].filter((part) => part && part !== "Automatic").join(" ");
  if (fields.Style) found.styles = fields.Style;
  if (fields["Style mixing"]) found.mixing = fields["Style mixing"];
  return found;
}
