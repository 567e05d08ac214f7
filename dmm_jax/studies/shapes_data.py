"""The study's teachers, and its training data: rendered pictures, pictures drawn by the teachers, and mixtures."""

import dataclasses
import pathlib
import shutil
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from dmm_jax.checkpoints import naming
from dmm_jax.checkpoints.checkpoint import Checkpoint, Component
from dmm_jax.checkpoints.modelspec import Recipe
from dmm_jax.checkpoints.write import write_single_file
from dmm_jax.data.cache import LatentCache, partial_folder
from dmm_jax.data.cache_writer import CacheWriter
from dmm_jax.distill.teacher_samples import prepare_cache
from dmm_jax.studies.shapes_rows import MADE, RENDERED, SHARES, SHORT, STYLES, cache_path, study_config, teacher_path
from dmm_jax.world import architecture, training
from dmm_jax.world.recipe import shipped_world
from dmm_jax.world.scenes import sample_scenes

CHUNK_SIZE = 512  # Examples in memory while caches are mixed.


def make_teachers(out: pathlib.Path, styles: Sequence[str], plan: training.Plan, bank_size: int) -> None:
    """Fine-tunes the shipped base on each style and writes the teachers; existing files are not trained again."""
    world, dtype = shipped_world(), jnp.bfloat16 if jax.default_backend() == "gpu" else jnp.float32
    graphs = training.graphs_of(world.configs, world.tokenizer, dtype)
    fit = training.Fit(training.denoising_loss(*graphs, train_text=False), plan, 5e-4)
    (out / "teachers").mkdir(parents=True, exist_ok=True)
    for name in styles:
        number, path = STYLES.index(name), teacher_path(out, name)
        if path.exists():
            continue
        bank = training.make_bank(100 + number, bank_size, world.tokenizer, style=name)
        data = training.add_latents(bank, world.configs["vae"], world.base["vae"], dtype)
        data |= {"text_encoder": world.base["text_encoder"]}
        params = fit({"unet": world.base["unet"]}, data, name, seed=10 + number)
        unet = Component(dict(architecture.UNET_CONFIG), lambda params=params: naming.to_torch(params["unet"]))
        stock = Checkpoint(path, "single-file", {"unet": unet}, dict(architecture.SCHEDULER_CONFIG), None, None)
        write_single_file(path, stock, "float16", Recipe(f"study, {name}", [], None))


def prepare(out: pathlib.Path, data: Iterable[str], num_made: int) -> None:
    """Makes the caches of some data, with `num_made` pictures per teacher; complete caches are not made again."""
    names = set(data)
    shares = {name: share for name, share in SHARES.items() if name in names}
    if RENDERED in names or shares:
        prepare_cache(study_config(out, STYLES, 1, 0))
    captions = sample_scenes(np.random.default_rng(1), num_made)[1]
    if MADE in names or shares:
        _draw_with_teachers(out, MADE, captions)
    if SHORT in names:
        _draw_with_teachers(out, SHORT, [short(caption) for caption in captions])
    for name, share in shares.items():
        rendered, made = (LatentCache(cache_path(out, part)) for part in (RENDERED, MADE))
        mix(rendered, made, pathlib.Path(cache_path(out, name)), share)


def short(caption: str) -> str:
    """Returns the first object's colour and shape: a caption shortened to two words, as a brief user writes."""
    return " ".join(caption.split()[2:4])


def _draw_with_teachers(out: pathlib.Path, name: str, prompts: Sequence[str]) -> None:
    """Has every teacher draw every prompt once, into the cache `name`."""
    config = study_config(out, STYLES, 1, 0)
    path = out / f"prompts_{name}.txt"
    path.write_text("\n".join(prompts) + "\n", encoding="utf-8")
    config.data.kind, config.data.source, config.data.cache = "prompts", str(path), cache_path(out, name)
    config.data.num_examples = len(prompts) * len(STYLES)
    prepare_cache(config)


def mix(rendered: LatentCache, made: LatentCache, folder: pathlib.Path, share: float) -> LatentCache:
    """Writes a cache as large as the smaller of two: a share of `made`'s first examples, then `rendered`'s first.

    Training shuffles, so each batch has this share on average.
    """
    if folder.exists():
        return LatentCache(folder)
    shutil.rmtree(partial_folder(folder), ignore_errors=True)
    count = min(len(rendered), len(made))
    num_made = round(share * count)
    source = f"{num_made} of [{made.header.source}], {count - num_made} of [{rendered.header.source}]"
    writer = CacheWriter(folder, dataclasses.replace(rendered.header, source=source, count=0, dropped=0, shards=()))
    with writer.shard(0) as shard:
        for cache, size in ((made, num_made), (rendered, count - num_made)):
            for start in range(0, size, CHUNK_SIZE):
                examples = [cache[k] for k in range(start, min(start + CHUNK_SIZE, size))]
                latents, input_ids, time_ids = (
                    np.stack([example[name] for example in examples]) for name in ("latents", "input_ids", "time_ids")
                )
                ids = [example["id"] for example in examples]
                shard.add(latents.astype(np.float32), input_ids, time_ids[:, :4], ids)
    return writer.finish(1)
