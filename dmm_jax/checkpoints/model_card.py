"""The model card of an export: what hubs read, whom the styles come from, what was measured, how to use it."""

import json
import re
from collections.abc import Mapping, Sequence

from dmm_jax.checkpoints import licenses
from dmm_jax.checkpoints.architecture import SDXL
from dmm_jax.runtime.storage import Location

NAME, GRID = "README.md", "grid.png"
HUB_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")  # How hubs write the licences that they know.
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")  # What hubs take as the name of a model; anything else they refuse.
SPECIAL = re.compile(r"([\\`*_{}\[\]()<>#+!|~$&-])")
USE = {
    "dmm": """```python
import dmm_jax

pipe = dmm_jax.Pipeline.from_pretrained("PATH")
images = pipe(["a prompt"], styles={styles}, num_inference_steps=25, guidance_scale=7.0)
```""",
    "diffusers": """```python
import diffusers

pipe = diffusers.DiffusionPipeline.from_pretrained("PATH")
image = pipe("a prompt", num_inference_steps=25, guidance_scale=7.0).images[0]
```""",
    "single-file": "`model.safetensors` is a checkpoint for ComfyUI, A1111, Forge and diffusers' `from_single_file`.",
    "style-lora": "`style_lora.safetensors` is used at strength 1 on the stock export of the mix that its metadata "
    "names (`dmm_jax.lora_base`), and on nothing else.",
}
# Where a reader finds how the UNet was trained, or does not.
SCHEDULES = {
    "v_prediction": "predicts the velocity (v-prediction)",
    "rescale_betas_zero_snr": "was trained down to a signal-to-noise ratio of zero",
}
TOLD_BY_FOLDERS = (
    "`scheduler/scheduler_config.json` says so, and diffusers and dmm_jax obey it. ComfyUI and A1111 must be told."
)
TOLD_BY_FILES = """The file says so by empty tensors, which ComfyUI and A1111 read. diffusers does not; tell it:

```python
pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config, OPTIONS)
```"""


def card(
    formats: Sequence[str],
    title: str,
    styles: Sequence[str],
    family: str,
    parents: Mapping[str, Mapping],
    license: str,
    measured: Mapping | None,
    has_grid: bool,
    schedule: Mapping,
) -> str:
    """Returns the text of a card, Markdown under a YAML head.

    Args:
      formats: of what the card lies beside: "dmm" or "diffusers" in a folder; "single-file", "style-lora".
      styles: of the merged model, in row order.
      family: its architecture, by ModelSpec's name.
      parents: `provenance.record` by "base" and style; empty where they are not to be told.
      license: of all parents together.
      measured: `evaluate`'s metrics.json, if it was run.
      has_grid: whether grid.png lies beside it.
      schedule: the scheduler's config.
    """
    merged = f"{len(styles)} checkpoints distilled into one UNet (DMM, arXiv:2504.12364) with dmm_jax"
    all_of_them = formats == ["dmm"]
    what = f"{merged}; styles are selected and mixed per image." if all_of_them else f"One style or mix of {merged}."
    parts = [_head(license, family, parents), f"# {_plain(title)}", what]
    if has_grid:
        parts.append(f"![Samples of every style]({GRID})")
    parts += ["## Styles", _table(_style_rows(styles, parents))]
    parts.append(f"Licences that the parents state: {_plain(license or licenses.UNKNOWN)}.")
    if measured:
        parts += ["## Measured", _table(_measured_rows(measured)), _recipe(measured)]
    parts += ["## Use", *(USE[fmt].replace("{styles}", json.dumps(styles[0])) for fmt in formats)]
    parts += _schedule(schedule, "single-file" in formats)
    return "\n\n".join(parts) + "\n"


def _head(license, family, parents):
    """Returns the YAML that hubs read; JSON's strings are YAML's."""
    known = HUB_LICENSE.fullmatch(license) and license != licenses.UNKNOWN
    lines = [f"license: {license}" if known else "license: other"]
    if not known:
        lines.append(f"license_name: {json.dumps(license or licenses.UNKNOWN)}")
    tags = ["stable-diffusion-xl" if family == SDXL else "stable-diffusion", "text-to-image", "merge", "dmm"]
    lines += ["library_name: diffusers", "pipeline_tag: text-to-image", f"tags: {json.dumps(tags)}"]
    named = [parent.get("hub", parent["file"]) for parent in parents.values()]
    named = [name for name in dict.fromkeys(named) if HUB_NAME.fullmatch(name)]
    if named:
        lines += [f"base_model: {json.dumps(named)}", "base_model_relation: merge"]
    return "\n".join(["---", *lines, "---"])


def _style_rows(styles, parents):
    if not parents:
        return [("style",), *((name,) for name in styles)]
    names = [*(["base"] if "base" in parents else []), *(name for name in styles if name in parents)]
    rows = [(name, parents[name]["file"], _hashes(parents[name]), parents[name]["license"]) for name in names]
    return [("style", "from", "files, by their AutoV2 hash", "licence"), *rows]


def _hashes(parent):
    """Returns what hubs find a parent's files by: the first ten digits of each one's SHA-256."""
    files = [file["autov2"] for file in parent.get("files", ())]
    loras = [f"{lora['autov2']} * {lora['weight']:g}" for lora in parent.get("loras", ())]
    return " + ".join([" ".join(files), *loras])


def _schedule(config, in_a_file) -> list[str]:
    options = {"prediction_type": "v_prediction"} if config.get("prediction_type") == "v_prediction" else {}
    options |= {"rescale_betas_zero_snr": True} if config.get("rescale_betas_zero_snr") else {}
    if not options:
        return []
    said = " and ".join(text for name, text in SCHEDULES.items() if name in (*options, *options.values()))
    told = TOLD_BY_FILES.replace("OPTIONS", ", ".join(f"{name}={value!r}" for name, value in options.items()))
    return [
        f"This UNet {said}: with other settings its pictures are noise. " + (told if in_a_file else TOLD_BY_FOLDERS)
    ]


def _measured_rows(measured):
    columns = {"student": [row[k] for k, row in enumerate(measured["matrix"])]}
    columns |= {name: measured[name] for name in ("floor", "base", *measured.get("weight_merges", ()))}
    yield ("style", *columns)
    for number, style in enumerate(measured["styles"]):
        yield (style, *(f"{values[number]:.2f}" for values in columns.values()))


def _recipe(measured):
    said = {name: measured["settings"][name] for name in ("num_inference_steps", "guidance_scale", "solver")}
    options = ", ".join(f"{name} {value}" for name, value in said.items())
    return _plain(
        f"{measured['distance']} to the style's own teacher over {measured['n']} pictures a style ({options}); the "
        "floor is the teacher against itself with other noise."
    )


def _table(rows) -> str:
    head, *others = ([_plain(cell) for cell in row] for row in rows)
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *others))


def _plain(text: str) -> str:
    """Returns text that Markdown shows as it is, on one line."""
    return SPECIAL.sub(r"\\\1", " ".join(str(text).split()))


def grid_of(workdir: Location) -> Location | None:
    """Returns the last sample grid that `train` drew into a workdir, or None."""
    drawn = sorted((workdir / "samples").glob("step_*.png"))
    return drawn[-1] if drawn else None


def measured_of(workdir: Location, styles: Sequence[str]) -> dict | None:
    """Returns the metrics.json that `evaluate` wrote into a workdir for these styles, or None."""
    path = workdir / "report" / "metrics.json"
    if not path.is_file():
        return None
    measured = json.loads(path.read_text(encoding="utf-8"))
    return measured if list(measured["styles"]) == list(styles) else None
