"""What the study's rows are trained on: its teachers, and caches of what is rendered and what the teachers draw."""

import dataclasses
import pathlib
import shutil
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from dmm_jax.checkpoints import naming
from dmm_jax.checkpoints.checkpoint import Checkpoint, Component
from dmm_jax.checkpoints.write import Recipe, write_single_file
from dmm_jax.data.cache import LatentCache, partial_folder
from dmm_jax.data.cache_writer import CacheWriter
from dmm_jax.distill.teacher_samples import prepare_cache
from dmm_jax.studies.shapes_rows import MADE, RENDERED, SHARES, SHORT, STYLES, cache_path, study_config, teacher_path
from dmm_jax.world import architecture, recipe
from dmm_jax.world.scenes import sample_scenes

EXAMPLES_AT_ONCE = 512


def make_teachers(out: pathlib.Path, styles: Sequence[str], plan: recipe.Plan, bank_size: int) -> None:
    """Fine-tunes the base that ships on each of some styles of the study; what is there is not trained again."""
    source, dtype = recipe.shipped_world(), jnp.bfloat16 if jax.default_backend() == "gpu" else jnp.float32
    graphs = recipe.graphs_of(source.text_config, source.tokenizer, dtype)
    fit = recipe.Fit(recipe.denoising_loss(*graphs, train_text=False), plan, 5e-4)
    (out / "teachers").mkdir(parents=True, exist_ok=True)
    for name in styles:
        number, path = STYLES.index(name), teacher_path(out, name)
        if path.exists():
            continue
        bank = recipe.make_bank(100 + number, bank_size, source.tokenizer, style=name)
        data = recipe.add_latents(bank, source.base["vae"], dtype) | {"text_encoder": source.base["text_encoder"]}
        params = fit({"unet": source.base["unet"]}, data, name, seed=10 + number)
        unet = Component(dict(architecture.UNET_CONFIG), lambda params=params: naming.to_torch(params["unet"]))
        stock = Checkpoint(path, "single-file", {"unet": unet}, dict(architecture.SCHEDULER_CONFIG), None, None)
        write_single_file(path, stock, "float16", Recipe(f"study, {name}", [], None))


def prepare(out: pathlib.Path, data: Iterable[str], num_made: int) -> None:
    """Makes the caches of some data; of what the teachers draw, `num_made` each. What is whole is left alone."""
    wanted = set(data)
    mixed = {name: share for name, share in SHARES.items() if name in wanted}
    if RENDERED in wanted or mixed:
        prepare_cache(study_config(out, STYLES, 1, 0))
    captions = sample_scenes(np.random.default_rng(1), num_made)[1]
    if MADE in wanted or mixed:
        _draw(out, MADE, captions)
    if SHORT in wanted:
        _draw(out, SHORT, [short(caption) for caption in captions])
    for name, share in mixed.items():
        mix(
            *(LatentCache(cache_path(out, part)) for part in (RENDERED, MADE)),
            pathlib.Path(cache_path(out, name)),
            share,
        )


def short(caption: str) -> str:
    """Returns the first object's colour and shape, all that is left of a caption as a user would be brief."""
    return " ".join(caption.split()[2:4])


def _draw(out: pathlib.Path, name: str, prompts: Sequence[str]) -> None:
    """Lets every teacher draw every prompt once."""
    config = study_config(out, STYLES, 1, 0)
    path = out / f"prompts_{name}.txt"
    path.write_text("\n".join(prompts) + "\n", encoding="utf-8")
    config.data.source, config.data.num_examples = "teachers", len(prompts) * len(STYLES)
    config.data.prompts, config.data.cache = str(path), cache_path(out, name)
    prepare_cache(config)


def mix(rendered: LatentCache, made: LatentCache, folder: pathlib.Path, share: float) -> LatentCache:
    """Writes a cache as large as the smaller of two, of which a share are `made`'s first, the rest `rendered`'s.

    Training shuffles, so that a share of the examples is a share of every batch in the mean.
    """
    if folder.exists():
        return LatentCache(folder)
    shutil.rmtree(partial_folder(folder), ignore_errors=True)
    count = min(len(rendered), len(made))
    num_made = round(share * count)
    told = f"{num_made} of [{made.header.source}], {count - num_made} of [{rendered.header.source}]"
    writer = CacheWriter(folder, dataclasses.replace(rendered.header, source=told, count=0, dropped=0, shards=()))
    for cache, size in ((made, num_made), (rendered, count - num_made)):
        for start in range(0, size, EXAMPLES_AT_ONCE):
            examples = [cache[k] for k in range(start, min(start + EXAMPLES_AT_ONCE, size))]
            latents, input_ids, time_ids = (
                np.stack([example[name] for example in examples]) for name in ("latents", "input_ids", "time_ids")
            )
            writer.add(latents.astype(np.float32), input_ids, time_ids[:, :4], [one["id"] for one in examples], 0)
    return writer.finish()
