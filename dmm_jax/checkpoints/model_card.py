"""Makes the model card of an export: a head for hubs, the origin of each style, measurements, and how to use it."""

import json
import re
from collections.abc import Mapping, Sequence

from dmm_jax.checkpoints import licenses
from dmm_jax.checkpoints.architecture import SDXL
from dmm_jax.checkpoints.formats.lora_tools import READERS
from dmm_jax.runtime.errors import UserError
from dmm_jax.runtime.storage import Location, read_json

NAME, GRID = "README.md", "grid.png"
HUB_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")  # The form of the licence names that hubs know.
SPECIAL = re.compile(r"([\\`*_{}\[\]()<>#+!|~$&-])")
USE = {
    "dmm": """```python
import dmm_jax

pipe = dmm_jax.Pipeline.from_pretrained("PATH")
images = pipe(["a prompt"], styles={styles}, {drawing})
```""",
    "diffusers": """```python
import diffusers

pipe = diffusers.DiffusionPipeline.from_pretrained("PATH")
image = pipe("a prompt", {drawing}).images[0]
```""",
    "single-file": "`model.safetensors` is a checkpoint for ComfyUI, A1111, Forge and diffusers' `from_single_file`.",
    "style-lora": "Each `style_lora*.safetensors` is used at strength 1 on the stock export of the mix that its "
    "metadata names (`dmm_jax.lora_base`), and on nothing else.",
    "lora": "Each `lora*.safetensors` turns the base that its metadata names (`dmm_jax.lora_base`) into a style, at "
    "strength 1.",
}
# For a UNet of another size than the published ones.
TOY_USE = {
    "single-file": "`model.safetensors` is a checkpoint for dmm_jax. ComfyUI, A1111, Forge and diffusers' "
    "`from_single_file` do not load it: they know the published sizes of Stable Diffusion alone.",
}
TOY_LORA = "dmm_jax (`BASE + FILE`) reads everything in it. ComfyUI and A1111 load no checkpoint of this size."
# {scheduler field or value: what it says about the UNet}
SCHEDULES = {
    "v_prediction": "predicts the velocity (v-prediction)",
    "rescale_betas_zero_snr": "was trained down to a signal-to-noise ratio of zero",
}
SCHEDULE_IN_FOLDERS = (
    "`scheduler/scheduler_config.json` says so, and diffusers and dmm_jax obey it. "
    "In ComfyUI and A1111, set it by hand."
)
SCHEDULE_IN_FILES = """The file says so by empty tensors, which ComfyUI and A1111 read. For diffusers, set it:

```python
pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config, OPTIONS)
```"""
SCHEDULE_IN_LORAS = """No tool reads this from a LoRA: it does as the base says. Where that says otherwise, set it by
hand, in ComfyUI by the node ModelSamplingDiscrete, in diffusers by

```python
pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config, OPTIONS)
```"""
RESCALE = "A guidance rescale of 0.7 (`guidance_rescale`, or CFG rescale) keeps its pictures from overexposure."
SCHEDULE_PLACES = {  # {what to do: the formats for which it is true}
    SCHEDULE_IN_FOLDERS: ("dmm", "diffusers"),
    SCHEDULE_IN_FILES: ("single-file",),
    SCHEDULE_IN_LORAS: ("lora", "style-lora"),
}
CLIP_SKIP = """The text encoder has clip skip {0} built in: leave the clip skip of every tool at 1 (all up to {0} draw
the same)."""


def card(
    formats: Sequence[str],
    title: str,
    styles: Sequence[str],
    family: str,
    parents: Mapping[str, Mapping],
    license: str,
    metrics: Mapping | None,
    has_grid: bool,
    schedule: Mapping,
    sampling: Mapping,
    clip_skip: int = 1,
    tools: Sequence[str] = (),
    mix: Sequence[str] = (),
    is_published_size: bool = True,
) -> str:
    """Returns the text of a card, Markdown under a YAML head.

    Args:
      formats: the formats in the card's folder: "dmm" or "diffusers" alone; or some of the formats that are files.
      styles: the names of the merged model's styles, in row order; none for a LoRA of another checkpoint.
      family: its architecture, by ModelSpec's name.
      parents: `provenance.record` by "base" and style; empty if the card is not to name them.
      license: the licences of all parents together.
      metrics: the metrics.json that `evaluate` wrote, or None.
      has_grid: whether the card's folder holds grid.png.
      schedule: the scheduler's config.
      sampling: how its pictures are drawn: arguments of `Pipeline.__call__`.
      clip_skip: of the text encoder in the folder.
      tools: for which its LoRAs were written.
      mix: the names of the styles that are folded into the files; () if each style has a file, or one file has all.
      is_published_size: whether the UNet has a size that stock tools know.
    """
    about = f"{len(styles)} checkpoints distilled into one UNet (DMM, arXiv:2504.12364) with dmm_jax"
    if not styles:
        about = "The difference between a fine-tuned checkpoint and its base, made with dmm_jax"
    elif formats == ["dmm"]:
        about += "; styles are selected and mixed per image"
    elif mix:
        about = f"The {'style' if len(mix) == 1 else 'mix of'} {', '.join(map(escaped, mix))} of {about}"
    else:
        about = f"Each style, in a file of its own, of {about}"
    styles = mix or styles
    parts = [_head(license, family, parents), f"# {escaped(title)}", f"{about}."]
    if has_grid:
        parts.append(f"![Samples of every style]({GRID})")
    parts += ["## Styles", _table(_style_rows(styles, parents))] if styles else []
    parts.append(f"Licences that the parents state: {escaped(license or licenses.UNKNOWN)}.")
    if metrics:
        parts += ["## Measured", *_measured(metrics, styles)]
    drawing = f"num_inference_steps={sampling['num_inference_steps']}, guidance_scale={sampling['guidance_scale']}"
    style = json.dumps(next(iter(styles), ""))
    use = USE if is_published_size else USE | TOY_USE
    parts += ["## Use", *(use[fmt].replace("{drawing}", drawing).replace("{styles}", style) for fmt in formats)]
    if {"lora", "style-lora"} & set(formats):
        readers = ". ".join(READERS[tool] for tool in READERS if tool in tools)
        parts.append(f"{readers}." if is_published_size else TOY_LORA)
    parts += _schedule(schedule, formats)
    parts += [CLIP_SKIP.format(clip_skip)] if clip_skip != 1 else []
    return "\n\n".join(parts) + "\n"


def _head(license, family, parents):
    """Returns the YAML that hubs read. JSON's strings are valid in YAML."""
    is_known = HUB_LICENSE.fullmatch(license) and license != licenses.UNKNOWN
    lines = [f"license: {license}" if is_known else "license: other"]
    if not is_known:
        lines.append(f"license_name: {json.dumps(license or licenses.UNKNOWN)}")
    tags = ["stable-diffusion-xl" if family == SDXL else "stable-diffusion", "text-to-image", "merge", "dmm"]
    lines += ["library_name: diffusers", "pipeline_tag: text-to-image", f"tags: {json.dumps(tags)}"]
    files = [file for parent in parents.values() for file in (parent, *parent.get("loras", ()))]
    names = list(dict.fromkeys(file["hub"] for file in files if "hub" in file))
    if names:  # The table below names the rest, which no hub knows.
        lines += [f"base_model: {json.dumps(names)}", "base_model_relation: merge"]
    return "\n".join(["---", *lines, "---"])


def _style_rows(styles, parents):
    if not parents:
        return [("style",), *((name,) for name in styles)]
    no_parent = {"file": "images, by fit-style", "license": ""}
    named = {name: parents.get(name, no_parent) for name in (*(["base"] if "base" in parents else []), *styles)}
    rows = [(name, parent["file"], _hashes(parent), parent["license"]) for name, parent in named.items()]
    return [("style", "from", "files, by their AutoV2 hash", "licence"), *rows]


def _hashes(parent):
    """Returns the AutoV2 hashes by which hubs find a parent's files."""
    files = [file["autov2"] for file in parent.get("files", ())]
    loras = [f"{lora['autov2']} * {lora['weight']:g}" for lora in parent.get("loras", ())]
    return " + ".join([" ".join(files), *loras])


def _schedule(config, formats) -> list[str]:
    options = {"prediction_type": "v_prediction"} if config.get("prediction_type") == "v_prediction" else {}
    options |= {"rescale_betas_zero_snr": True} if config.get("rescale_betas_zero_snr") else {}
    if not options:
        return []
    facts = " and ".join(text for name, text in SCHEDULES.items() if name in (*options, *options.values()))
    arguments = ", ".join(f"{name}={value!r}" for name, value in options.items())
    places = [text for text, kinds in SCHEDULE_PLACES.items() if set(kinds) & set(formats)]
    where = "\n\n".join(places).replace("OPTIONS", arguments)
    parts = [f"This UNet {facts}: with other settings its pictures are noise. {where}"]
    return parts + [RESCALE] * ("rescale_betas_zero_snr" in options)


def _measured(metrics, styles) -> list[str]:
    return [_table(_metric_rows(metrics, styles)), _metric_notes(metrics)]


def _metric_rows(metrics, styles):
    columns = {"student": [row[k] for k, row in enumerate(metrics["matrix"])]}
    columns |= {name: metrics[name] for name in ("floor", "base", *metrics.get("weight_merges", ()))}
    yield ("style", *columns)
    for number, style in enumerate(metrics["styles"]):
        if style in styles:
            yield (style, *(f"{values[number]:.2f}" for values in columns.values()))


def _metric_notes(metrics):
    settings = (f"{name} {metrics['settings'][name]}" for name in ("num_inference_steps", "guidance_scale", "solver"))
    return escaped(
        f"{metrics['distance']} to the style's own teacher over {metrics['n']} pictures per style "
        f"({', '.join(settings)}); the floor is the teacher compared with itself under other noise."
    )


def _table(rows) -> str:
    head, *body = ([escaped(cell) for cell in row] for row in rows)
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *body))


def escaped(text: str) -> str:
    """Returns text that Markdown shows unchanged, on one line."""
    return SPECIAL.sub(r"\\\1", " ".join(str(text).split()))


def grid_of(workdir: Location) -> Location | None:
    """Returns the path of the newest sample grid in a workdir, or None."""
    return max((workdir / "samples").glob("step_*.png"), default=None)


def metrics_of(workdir: Location, styles: Sequence[str]) -> dict | None:
    """Returns the metrics.json in a workdir, if `evaluate` has written it for these styles, else None.

    Raises:
      UserError: the file is damaged.
    """
    path = workdir / "report" / "metrics.json"
    if not path.is_file():
        return None
    metrics = read_json(path)
    try:
        if list(metrics["styles"]) != list(styles) or "matrix" not in metrics:
            return None  # The report is about other styles, or about pairs of pictures alone.
        _measured(metrics, styles)
        return metrics
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError):
        raise UserError(f"{path} is damaged. Run `dmm-jax evaluate` again, or delete it.") from None
