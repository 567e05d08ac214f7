"""The page of a gallery: every picture under its prompt, in every style, with its parameters to copy."""

from collections.abc import Sequence

from dmm_jax.gallery import page
from dmm_jax.gallery.png import Parameters, sampler_name

MAX_COLUMNS = 8  # More styles continue in a second line, so that no picture is outside the window.
_STYLE = """
main { max-width: 110rem; padding: 2rem 1rem 4rem; }
section { margin: 2.2rem 0 0; } section h2 { font: 600 1rem/1.4 inherit; margin: 0 0 .6rem; overflow-wrap: anywhere; }
.row { display: grid; gap: .6rem; grid-template-columns: repeat(var(--columns), minmax(0, 1fr)); }
.row figure { margin: 0; min-width: 0; } .row img { width: 100%; border-radius: 6px; cursor: zoom-in; }
.row figcaption { overflow-wrap: anywhere; margin: .3rem 0 0; line-height: 1.3; }
button { font: inherit; font-size: .8rem; color: var(--accent); background: none; border: 1px solid var(--line);
  border-radius: 6px; padding: .1rem .6rem; cursor: pointer; }
dialog { border: 0; padding: .8rem; background: var(--card); color: var(--ink); border-radius: 8px; cursor: zoom-out; }
dialog::backdrop { background: rgb(0 0 0 / .8); }
dialog img { width: min(92vw, 84vh * var(--aspect, 1)); image-rendering: auto; } dialog p { margin: .5rem 0 0; }
@media (max-width: 44rem) { .row { grid-template-columns: repeat(2, minmax(0, 1fr)); } }
"""
_SCRIPT = """
const zoom = document.querySelector("dialog"), links = [...document.querySelectorAll(".row a")];
let shown = 0;
function show(number) {
  shown = (number + links.length) % links.length;
  const picture = links[shown].querySelector("img"), large = zoom.querySelector("img");
  large.src = links[shown].href;
  large.style.setProperty("--aspect", picture.naturalWidth / picture.naturalHeight);
  zoom.querySelector("p").textContent = picture.alt;
  if (!zoom.open) zoom.showModal();
}
links.forEach((link, number) => link.addEventListener("click", event => { event.preventDefault(); show(number); }));
zoom.addEventListener("click", () => zoom.close());
zoom.addEventListener("keydown", event => {
  const step = {ArrowRight: 1, ArrowLeft: -1}[event.key];
  if (step) show(shown + step);
});
document.querySelectorAll("button").forEach(button => button.addEventListener("click", async () => {
  const text = button.nextElementSibling.textContent;
  try { await navigator.clipboard.writeText(text); } catch {
    const area = document.body.appendChild(document.createElement("textarea"));
    area.value = text; area.select(); document.execCommand("copy"); area.remove();
  }
  button.textContent = "copied";
}));
"""


def gallery_page(
    files: Sequence[str], parameters: Sequence[Parameters], row_labels: Sequence[str], column_labels: Sequence[str]
) -> str:
    """Returns the page; files and parameters are row after row. It needs no network, and works without its script."""
    first, width = parameters[0], len(column_labels)
    mixing = "" if first.mixing == "rows" else f", {page.escape(first.mixing)} mixed"
    sections = []
    for row, label in enumerate(row_labels):
        part = slice(row * width, (row + 1) * width)
        cells = "".join(map(_cell, files[part], parameters[part], column_labels))
        sections.append(f'<section><h2>{page.escape(label)}</h2>\n<div class="row">{cells}</div></section>')
    body = (
        f"<h1>{page.escape(first.model)}</h1>\n"
        f'<p class="soft">{first.steps} steps of {page.escape(sampler_name(first.solver))}, guidance '
        f"{first.guidance_scale:g}, {first.width}×{first.height}{mixing}. Every PNG carries its own parameters; "
        '<a href="grid.png">grid.png</a> shows them all. A click enlarges a picture; arrow keys show the next.</p>\n'
        + "\n".join(sections)
        + f'\n<dialog><img alt=""><p></p></dialog>\n<script>{_SCRIPT}</script>'
    )
    columns = f".row {{ --columns: {min(width, MAX_COLUMNS)}; }}"
    return page.render("dmm_jax samples", body, columns + _STYLE)


def _cell(file, parameters, label):
    name, alt = page.escape(file), page.escape(f"{label}: {parameters.prompt}")
    return (
        f'<figure><a href="{name}"><img src="{name}" alt="{alt}" loading="lazy"></a>'
        f"<figcaption>{page.escape(label)}</figcaption><details><summary>seed {parameters.seed}</summary>"
        f"<button>copy</button><pre>{page.escape(parameters.a1111_text())}</pre></details></figure>"
    )
