// The sliders that mix styles, and the same mix as text.

const byId = (id) => document.getElementById(id);
let sliders = [];

// Makes one slider per style; the first style is on.
export function build(styles) {
  sliders = styles.map((name, index) => {
    const row = document.createElement("div"), label = document.createElement("label");
    const slider = document.createElement("input"), output = document.createElement("output");
    row.className = "slider";
    Object.assign(slider, { type: "range", min: 0, max: 100, step: 1, value: index ? 0 : 100, id: `style-${index}` });
    slider.name = name;
    Object.assign(label, { htmlFor: slider.id, textContent: name, title: name });
    output.htmlFor = slider.id;
    slider.addEventListener("input", () => show(true));
    row.append(label, slider, output);
    byId("styles").append(row);
    return { name, slider, output, row };
  });
  byId("mixer").hidden = byId("compare").hidden = byId("strip-fields").hidden = !styles.length;
  byId("style-text").addEventListener("input", () => follow(byId("style-text").value));
  byId("even").addEventListener("click", () => set(Object.fromEntries(styles.map((name) => [name, 1]))));
  byId("shuffle").addEventListener("click", () => {
    const chosen = [...styles].sort(() => Math.random() - 0.5).slice(0, 1 + Math.floor(Math.random() * 3));
    set(Object.fromEntries(chosen.map((name) => [name, 0.2 + Math.random()])));
  });
  byId("style-example").textContent = `${styles.at(-1)}:500:${styles[0]}`;
  show(true);
}

// Returns {name: weight} of the sliders; the weights sum to 1.
function weights() {
  const total = sliders.reduce((sum, one) => sum + Number(one.slider.value), 0);
  return Object.fromEntries(sliders.filter((one) => Number(one.slider.value)).map((one) => [one.name, one.slider.value / total]));
}

// Shows the share of each style, and writes the mix as text if asked to.
function show(writes) {
  const mix = weights();
  for (const { name, slider, output, row } of sliders) {
    const share = Math.round(100 * (mix[name] ?? 0));
    output.textContent = `${share} %`;
    slider.setAttribute("aria-valuetext", `${share} percent of the mix`);
    row.classList.toggle("on", share > 0);
  }
  if (writes) byId("style-text").value = textOf(mix);
}

// Moves the sliders to a mix; the largest weight is a full slider.
function set(mix, writes = true) {
  const largest = Math.max(...Object.values(mix));
  for (const { name, slider } of sliders) slider.value = Math.round((100 * (mix[name] ?? 0)) / largest);
  show(writes);
}

// Moves the sliders to a text, if it is a mix of known styles with positive weights; a schedule leaves them at 0.
function follow(text) {
  const mix = {};
  const simple = text.split(",").every((part) => {
    const [name, weight] = part.includes("=") ? part.split("=") : [part, "1"];
    mix[name.trim()] = Number(weight);
    return sliders.some((one) => one.name === name.trim()) && Number(weight) > 0;
  });
  if (simple) set(mix, false);
  else for (const one of sliders) one.slider.value = 0;
  if (!simple) show(false);
}

export function textOf(mix) {
  const names = Object.keys(mix);
  if (names.length < 2) return names[0] ?? "";
  return names.map((name) => `${name}=${Number(mix[name].toFixed(3))}`).join(",");
}

// Shows a style as the server writes it: a name, a mix as text or as an object, or a schedule.
export function restore(style) {
  const isSchedule = Array.isArray(style);
  const one = (mix) => (typeof mix === "string" ? mix : textOf(mix));
  const text = isSchedule
    ? style.map(([start, mix], index) => (index ? `:${[start].flat().join("-")}:` : "") + one(mix)).join("")
    : one(style ?? "");
  byId("style-text").value = text;
  follow(text);
}
