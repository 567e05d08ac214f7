// The page: a form, the drawings under way, and the finished pictures.

import * as client from "./client.js";
import * as mixer from "./mixer.js";
import { parametersOf } from "./png.js";

const byId = (id) => document.getElementById(id);
const STRIP = 7; // Pictures of a strip, both ends included.
let model = null;
let running = null; // The AbortController of the drawing under way.

// Builds the form from what the server has; asks for a key first if it needs one.
async function start() {
  try {
    model = await client.model();
  } catch (error) {
    if (error.status !== 401) return say(error.message);
    byId("key-fields").hidden = false;
    byId("server-state").textContent = "This server needs an API key.";
    byId("key").focus();
    return;
  }
  byId("key-fields").hidden = true;
  byId("model-name").textContent = model.name;
  document.title = `${model.name} · dmm-jax`;
  mixer.build(model.styles);
  const sizes = model.sizes.map((size) => [`${size.width}x${size.height}`, `${size.width} × ${size.height}`]);
  fill("size", sizes);
  fill("solver", model.solvers.map((solver) => [solver.name, solver.label]));
  fill("spacing", model.spacings.map((spacing) => [spacing.name, spacing.label]));
  for (const id of ["strip-from", "strip-to"]) fill(id, model.styles.map((name) => [name, name]));
  byId("strip-to").selectedIndex = Math.min(1, model.styles.length - 1);
  byId("count").max = model.limits.images;
  byId("steps").max = model.limits.steps;
  byId("prompt").value = model.example_prompt || byId("prompt").value;
  byId("guidance").value = model.sampling.guidance_scale;
  byId("rescale").value = model.sampling.guidance_rescale;
  byId("steps").value = Math.min(model.sampling.num_inference_steps, model.limits.steps);
  setSolver(model.sampling.solver);
  watchSolver();
  watchServer();
}

function fill(id, options, chosen) {
  byId(id).replaceChildren(...options.map(([value, label]) => new Option(label, value, false, value === chosen)));
}

// Shows whether the server can draw now; asks again until it can.
async function watchServer() {
  const ready = await client.isReady();
  byId("server-state").textContent = ready ? `${model.styles.length || "No"} styles, ready` : "The server is preparing …";
  setTimeout(watchServer, ready ? 20000 : 1000);
}

function watchSolver() {
  byId("spacing").disabled = model.unspaced.includes(byId("solver").value);
}

function say(text) {
  byId("message").textContent = text;
}

// Returns the body of a request for these styles; the form decides everything else.
function bodyFor(styles, count) {
  const value = (id) => byId(id).value, number = (id) => Number(value(id));
  const [width, height] = value("size").split("x").map(Number);
  const spacing = byId("spacing").disabled ? "" : value("spacing");
  const seeds = Array.from({ length: count }, (_, index) => (number("seed") + index) % 2 ** 32);
  return {
    prompt: value("prompt"), negative_prompt: value("negative") || null, styles, seeds, width, height,
    steps: number("steps"), guidance_scale: number("guidance"), guidance_rescale: number("rescale"),
    solver: [value("solver"), spacing].filter(Boolean).join("_"),
  };
}

// Draws all styles with all seeds of the form; as several requests where the server limits their images.
async function draw(styles, count, kind, title) {
  if (running || !byId("form").reportValidity()) return;
  say("");
  const body = bodyFor(styles, count), pictures = styles.length * count;
  const figures = addBatch(kind, title, body, pictures);
  const perRequest = Math.max(1, Math.floor(model.limits.images / count));
  running = new AbortController();
  setBusy(true);
  let done = 0;
  try {
    for (let first = 0; first < styles.length; first += perRequest) {
      const part = { ...body, styles: styles.slice(first, first + perRequest) };
      await client.draw(part, (name, data) => {
        const figure = figures[first * count + data.index];
        if (name === "start") data.images.forEach((image, index) => caption(figures[first * count + index], image));
        if (name === "progress") showProgress(figure, data);
        if (name === "image") showImage(figure, data);
        if (name === "failed") showFailure(figure, data.error.message);
        if (name === "image") byId("live").textContent = `Picture ${++done} of ${pictures} is finished.`;
      }, running.signal);
    }
  } catch (error) {
    const wait = error.retryAfter ? ` Try again in ${error.retryAfter} s.` : "";
    if (error.name !== "AbortError") say(error.message + wait);
    for (const figure of figures) if (!figure.dataset.done) figure.remove();
    if (!figures.some((figure) => figure.dataset.done)) figures.batch.remove();
    byId("empty").hidden = Boolean(document.querySelector(".batch"));
  } finally {
    running = null;
    setBusy(false);
  }
}

function setBusy(busy) {
  for (const id of ["draw", "compare", "strip"]) byId(id).disabled = busy;
  byId("stop").hidden = !busy;
  byId("results").setAttribute("aria-busy", String(busy));
}

function element(tag, className = "", text = "") {
  const made = document.createElement(tag);
  made.className = className;
  made.textContent = text;
  return made;
}

// Adds an empty batch at the top of the results; returns its figures.
function addBatch(kind, title, body, count) {
  byId("empty").hidden = true;
  const batch = element("section", `batch ${kind}`), grid = element("div", "pictures");
  batch.append(element("h2", "", body.prompt || "(no prompt)"), element("p", "soft", title), grid);
  const figures = Array.from({ length: count }, () => {
    const figure = element("figure"), frame = element("button", "frame"), image = new Image(), bar = element("progress");
    frame.type = "button";
    frame.disabled = true;
    Object.assign(image, { width: body.width, height: body.height, alt: "Not yet drawn", className: "draft" });
    image.src = blank(body.width, body.height);
    bar.max = 1;
    bar.setAttribute("aria-label", "Progress");
    frame.append(image, bar);
    figure.append(frame, element("figcaption"));
    grid.append(figure);
    return figure;
  });
  byId("results").prepend(batch);
  figures.batch = batch;
  if (matchMedia("(max-width: 52rem)").matches) batch.scrollIntoView({ block: "start" });
  return figures;
}

const blank = (width, height) =>
  `data:image/svg+xml,${encodeURIComponent(`<svg xmlns="http://www.w3.org/2000/svg" width="${width}" height="${height}"/>`)}`;

function caption(figure, { style, seed }) {
  figure.querySelector("figcaption").replaceChildren(element("span", "", style ?? model.name), element("span", "", `seed ${seed}`));
}

function showProgress(figure, { step, num_steps: steps, queued_ahead: ahead, preview }) {
  const bar = figure.querySelector("progress");
  if (step) bar.value = step / steps;
  bar.setAttribute("aria-valuetext", step ? `step ${step} of ${steps}` : `waiting behind ${ahead} pictures`);
  if (preview) figure.querySelector("img").src = `data:image/png;base64,${preview}`;
}

function showImage(figure, { png, parameters, style, text }) {
  const image = figure.querySelector("img"), frame = figure.querySelector(".frame");
  image.src = `data:image/png;base64,${png}`;
  image.className = "";
  image.alt = `${parameters.prompt || "no prompt"}, ${style ?? model.name}, seed ${parameters.seed}`;
  frame.disabled = false;
  frame.setAttribute("aria-label", `Show larger: ${image.alt}`);
  frame.addEventListener("click", () => view(image.src, image.alt, text));
  figure.querySelector("progress").remove();
  figure.dataset.done = "yes";
  const links = element("span", "links"), save = element("a", "", "save"), use = element("button", "", "use");
  Object.assign(save, { href: image.src, download: `${style ?? model.name}_seed${parameters.seed}.png` });
  save.setAttribute("aria-label", "Save this picture");
  Object.assign(use, { type: "button", title: "Restore these settings" });
  use.setAttribute("aria-label", "Restore the settings of this picture");
  use.addEventListener("click", () => restore(parameters));
  links.append(use, save);
  figure.querySelector("figcaption").append(links);
}

function showFailure(figure, message) {
  figure.classList.add("failed");
  figure.dataset.done = "yes";
  figure.querySelector(".frame").replaceChildren(element("span", "", message));
}

function view(source, name, text) {
  byId("viewer-image").src = source;
  byId("viewer-image").alt = name;
  byId("viewer-text").textContent = text;
  byId("viewer").showModal();
}

// Shows the settings of a picture in the form; says which of them this server does not have.
function restore(said) {
  const missing = [];
  const set = (id, value) => {
    if (value !== undefined && value !== null) byId(id).value = value;
  };
  set("prompt", said.prompt);
  set("negative", said.negative_prompt);
  set("seed", said.seed);
  set("steps", said.steps);
  set("guidance", said.guidance_scale);
  set("rescale", said.guidance_rescale ?? 0);
  byId("count").value = 1;
  if (said.width) {
    const size = `${said.width}x${said.height}`, known = [...byId("size").options].some((option) => option.value === size);
    if (known) set("size", size);
    else missing.push(`the size ${size}`);
  }
  if (said.solver && !setSolver(said.solver)) missing.push(`the solver ${said.solver}`);
  if ((said.mixing ?? "rows") !== "rows") missing.push("the mixing of predictions");
  if (said.styles && model.styles.length) mixer.restore(said.styles);
  say(missing.length ? `Restored, but this server does not have ${missing.join(" or ")}.` : "");
  byId("live").textContent = "The settings are restored.";
  byId("prompt").focus();
}

// Chooses solver and spacing by our name or A1111's; returns whether both are known.
function setSolver(name) {
  const letters = (text) => text.toLowerCase().replaceAll("+", "p").replace(/[ _-]/g, "");
  for (const solver of model.solvers) {
    for (const spacing of model.spacings) {
      const label = spacing.name ? ` ${spacing.label}` : "";
      const spellings = [`${solver.name}_${spacing.name}`, solver.label + label].map(letters);
      if (!spellings.includes(letters(name))) continue;
      byId("solver").value = solver.name;
      byId("spacing").value = spacing.name;
      watchSolver();
      return true;
    }
  }
  return false;
}

async function restoreFile(file) {
  try {
    restore(parametersOf(await file.arrayBuffer()));
  } catch (error) {
    say(error.message);
  }
}

function currentStyle() {
  return model.styles.length ? byId("style-text").value.trim() || null : null;
}

byId("form").addEventListener("submit", (event) => {
  event.preventDefault();
  const style = currentStyle(), count = Number(byId("count").value);
  if (model.styles.length && !style) return say("Slide at least one style.");
  draw([style], count, count === 1 ? "single" : "several", style ?? model.name);
});
byId("compare").addEventListener("click", () => draw(model.styles, 1, "compare", `All styles, seed ${byId("seed").value}`));
byId("strip").addEventListener("click", () => {
  const [from, to] = [byId("strip-from").value, byId("strip-to").value];
  if (from === to) return say("Choose two different styles.");
  const mixes = Array.from({ length: STRIP }, (_, index) => {
    const share = index / (STRIP - 1);
    return mixer.textOf(share === 0 ? { [from]: 1 } : share === 1 ? { [to]: 1 } : { [from]: 1 - share, [to]: share });
  });
  draw(mixes, 1, "strip", `From ${from} to ${to}, seed ${byId("seed").value}`);
});
byId("stop").addEventListener("click", () => running?.abort());
byId("dice").addEventListener("click", () => (byId("seed").value = crypto.getRandomValues(new Uint32Array(1))[0]));
byId("solver").addEventListener("change", watchSolver);
byId("key").addEventListener("change", () => (client.setKey(byId("key").value), start()));
byId("file").addEventListener("change", () => byId("file").files[0] && restoreFile(byId("file").files[0]));
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) byId("form").requestSubmit();
  if (event.key === "Escape" && !byId("viewer").open) running?.abort();
});
for (const name of ["dragenter", "dragover"]) {
  document.addEventListener(name, (event) => (event.preventDefault(), document.body.classList.add("dropping")));
}
document.addEventListener("dragleave", (event) => event.relatedTarget || document.body.classList.remove("dropping"));
document.addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("dropping");
  if (event.dataTransfer.files[0]) restoreFile(event.dataTransfer.files[0]);
});
start();
