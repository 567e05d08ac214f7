"""`dmm-jax evaluate`: compares the student with its teachers, next to the base model and merges of weights.

The style matrix has one row per style of the student and one column per teacher (arXiv:2504.12364, 4.2). The student
draws from other noise than the teachers, and so does the floor (a teacher compared with itself): so the two are
comparable.
"""

import os
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from dmm_jax.checkpoints.formats import hub
from dmm_jax.checkpoints.parents import open_base
from dmm_jax.config.options import SHAPES_WORLD, style_names
from dmm_jax.config.serialization import load_config
from dmm_jax.evaluation import clip, lpips
from dmm_jax.evaluation.compared_models import OTHER_DTYPE, ComparedModels, merge_settings
from dmm_jax.evaluation.feature_networks import NONE, SHAPES, draws_shapes_world, open_feature_network
from dmm_jax.evaluation.fidelity import paired_fidelity
from dmm_jax.evaluation.kernel_distances import NUM_SUBSETS, SUBSET_SIZE
from dmm_jax.evaluation.options import Options
from dmm_jax.evaluation.prompts import choose_prompts
from dmm_jax.evaluation.published_weights import Weights
from dmm_jax.evaluation.report import write_report
from dmm_jax.evaluation.report_sections import Interpolation, Pairs
from dmm_jax.evaluation.samples import Pictures, Sampler, concatenate, kernel_distance
from dmm_jax.evaluation.style_matrix import style_matrix
from dmm_jax.runtime import metrics
from dmm_jax.runtime.errors import UserError
from dmm_jax.runtime.processes import say
from dmm_jax.runtime.progress import Progress
from dmm_jax.runtime.storage import Location, in_bucket, locate
from dmm_jax.text.prompt_grammar import PLAIN

TEACHER_SEED, OTHER_SEED = 10_000_000, 20_000_000  # Picture k's noise has this seed + k.
NUM_SHOWN = 6  # Pairs of pictures per style in the report.
NUM_MIXES = 11  # Pictures from the first style to the last.
MANY = 5000  # Pictures for which a CPU needs many minutes; the demo draws fewer.


class Evaluation(NamedTuple):
    """The numbers of an evaluation, as `report/metrics.json` holds them, and the path of the report's page."""

    results: dict[str, object]
    page: Location


@hub.cache_only()
def evaluate(workdir: str | os.PathLike, options: Options | None = None) -> Evaluation:
    """Evaluates a training workdir; writes `report/index.html` and `report/metrics.json` there.

    Raises:
      UserError: the workdir holds no student, an option or the network cannot be used, or the network does not suit
        these pictures. Every check comes before any drawing.
    """
    started, workdir, options = time.perf_counter(), locate(workdir), options or Options()
    config = load_config(workdir)
    _check_report(workdir / "report")
    training_log = metrics.read_log(workdir / "metrics.jsonl")
    features = _features(options, config)
    num_prompts = options.num_pairs if features == NONE else max(options.num_images, options.num_pairs)
    prompts = choose_prompts(config, max(num_prompts, 2), options.prompts_file)
    grammar = PLAIN if prompts.are_captions else options.prompt_grammar or config.sampling.prompt_grammar
    config.sampling.prompt_grammar = grammar
    network = None if features == NONE else open_feature_network(features)
    perceptual = lpips.load(options.lpips_file) if options.lpips_file else None
    scorer = clip.Scorer.open(options.clip_folder, prompts.lines) if options.clip_folder else None
    sampling = options.solver_options(config)
    if prompts.are_captions:
        sampling["num_chunks"] = config.data.num_chunks  # As in training.
    names = style_names(config)
    say(f"Reading the student, the base and {len(names)} teachers")
    models = ComparedModels(config, workdir)
    total = num_drawn(options, len(names), network is not None)
    _say_amount(total, len(names) + (1 if network is None else 2 + len(options.weight_merges)), network is not None)
    progress = Progress(total, "drawing")
    sampler = Sampler(network, scorer, prompts.lines, options, sampling, progress)
    if network is None:
        results, pairs = _compare_pairs(models, sampler, perceptual)
    else:
        results, pairs = _compare(models, sampler, perceptual, options.weight_merges)
        results["settings"] |= merge_settings(options.weight_merges)
    results["settings"] |= sampler.settings | prompts.settings | _conditions(config)
    results["settings"]["prompt grammar"] = grammar
    results["settings"] |= {} if perceptual is None else lpips.settings(perceptual)
    results["settings"]["fidelity's floor"] = f"the teacher in {OTHER_DTYPE[config.dtype]} against {config.dtype}"
    results["weights"] = models.digests()
    results["command"] = options.command(workdir.name)
    results["timings"] = {"evaluation (s)": time.perf_counter() - started}
    interpolation = _interpolation(models, sampler)
    progress.bar.close()
    page = write_report(workdir / "report", results, pairs, interpolation, training_log, _links(workdir))
    return Evaluation(results, page)


def num_drawn(options: Options, num_styles: int, has_network: bool) -> int:
    """Returns how many images an evaluation draws: with a network each model's set, and always pairs and mixes."""
    pairs, mixes = options.num_pairs, NUM_MIXES if num_styles > 1 else 0
    if not has_network:
        return num_styles * 4 * pairs + mixes  # Teacher, teacher with other noise, student, rounded teacher.
    images = options.num_images
    per_style = 2 * max(images, pairs) + images + 2 * pairs
    return num_styles * per_style + (1 + len(options.weight_merges)) * images + mixes


def _say_amount(total: int, num_models: int, has_network: bool) -> None:
    """Prints how many images are drawn, and on a CPU how to draw fewer."""
    say(f"Drawing {total:,d} images with {num_models} models")
    if has_network and total > MANY and jax.default_backend() == "cpu":
        say("A CPU takes long for so many: --n 200 is quicker, and its distances have a larger bias.")


def _check_report(folder: Location) -> None:
    """Raises ValueError if no report can be written there, before hours of drawing."""
    if in_bucket(folder):
        return
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; the report is a folder. Move it away.")
    for place in (folder.parent, folder):
        if place.exists() and not os.access(place, os.W_OK | os.X_OK):
            raise UserError(
                f"the report cannot be written: no permission in {place}. Make it writable, or copy the run."
            )


def _links(workdir: Location) -> dict[str, str]:
    """Returns the galleries and exports below a workdir, {what it is: path from the report}."""
    pages = [path for pattern in ("samples/index.html", "samples/*/index.html") for path in workdir.glob(pattern)]
    cards = [path for pattern in ("*/README.md", "*/*/README.md") for path in workdir.glob(pattern)]
    paths = {f"gallery {path.parent.name}": path for path in sorted(pages)}
    paths |= {f"export {path.parent.name}": path.parent for path in sorted(cards)}
    return {name: f"../{path.relative_to(workdir)}" for name, path in paths.items()}


def _features(options: Options, config) -> str:
    """Returns the features to measure with.

    Raises:
      UserError: FD (shapes) is to measure models that do not draw the embedded world, or CLIPScore has no set of
        pictures.
    """
    features = options.features
    if features in ("", SHAPES):
        is_shapes = config.data.kind == SHAPES_WORLD or draws_shapes_world(open_base(config))
        if features and not is_shapes:
            raise UserError(
                f"FD (shapes) is a distance of the embedded world's pictures, and {config.base} does not draw that "
                "world: its tokenizer is another. Give Inception's weights as --features inception:PATH or CLIP's as "
                "clip:PATH, or compare pairs of pictures with --features none."
            )
        features = SHAPES if is_shapes else NONE
    if features == NONE and options.clip_folder:
        raise UserError("CLIPScore is measured on the pictures of --features: give inception:PATH or clip:PATH, too.")
    return features


def _compare_pairs(
    models: ComparedModels, sampler: Sampler, perceptual: Weights | None
) -> tuple[dict, dict[str, Pairs]]:
    """Returns the fidelity of pairs of pictures, without a distance between sets, and the pairs to show."""
    fidelity, pairs = defaultdict(dict), {}
    for name in models.names:
        teacher = models.teacher(name)
        own, other = (sampler.pictures(teacher, None, seed) for seed in (TEACHER_SEED, OTHER_SEED))
        pairs[name] = _pair(models, sampler, perceptual, name, own, other, fidelity)
    height, width = pairs[name].student.shape[1:3]
    settings = {"pixels": f"{width} x {height}"}
    results = {"styles": list(models.names), "fidelity": dict(fidelity), "pairs": sampler.num_pairs}
    return results | {"settings": settings}, pairs


def _pair(models, sampler, perceptual, name: str, own: Pictures, other_noise: Pictures, fidelity) -> Pairs:
    """Compares the student's pictures in one style with the teacher's; adds to {measure: {style: value}}."""
    student = sampler.pictures(models.student, name, TEACHER_SEED)
    rounded = sampler.pictures(models.teacher_in_other_dtype(name), None, TEACHER_SEED)
    for measure, value in paired_fidelity(own, student, rounded, other_noise, perceptual).items():
        fidelity[measure][name] = value
    shown = min(NUM_SHOWN, sampler.num_pairs)
    return Pairs(sampler.prompts[:shown], own.images[:shown], student.images[:shown])


def _compare(
    models: ComparedModels, sampler: Sampler, perceptual: Weights | None, merges: Sequence[str]
) -> tuple[dict, dict[str, Pairs]]:
    """Returns the results, without the general settings, and the pairs of pictures to show, by style."""
    network, prompts = sampler.network, sampler.prompts
    summaries, scores, fidelity, pairs = defaultdict(list), defaultdict(list), defaultdict(dict), {}
    kernel = {"student": {}, "floor": {}}
    for name in models.names:
        teacher = models.teacher(name)
        samples = {
            "teacher": sampler.sample(teacher, None, TEACHER_SEED, len(prompts)),
            "teacher_again": sampler.sample(teacher, None, OTHER_SEED, len(prompts)),
            "student": sampler.sample(models.student, name, OTHER_SEED),
        }
        for model, sample in samples.items():
            summaries[model].append(sample.summary)
            scores[model].append(sample.score)
        if network.kernel_name:
            kernel["student"][name] = kernel_distance(samples["teacher"], samples["student"])
            kernel["floor"][name] = kernel_distance(samples["teacher"], samples["teacher_again"])
        own, other_noise = samples["teacher"].first, samples["teacher_again"].first
        pairs[name] = _pair(models, sampler, perceptual, name, own, other_noise, fidelity)
    references = {}
    for model in ("base", *merges):
        sample = sampler.sample(models.base if model == "base" else models.merged(model), None, OTHER_SEED)
        references[model], scores[model] = sample.summary, [sample.score] * len(models.names)
    summaries |= {"base": references.pop("base"), "merged": references}
    names = {"distance_name": network.distance_name, "distance": network.distance}
    results = style_matrix(models.names, **summaries, **names)
    results |= {"fidelity": dict(fidelity), "pairs": sampler.num_pairs}
    height, width = pairs[name].student.shape[1:3]
    results["settings"] = {"pixels": f"{width} x {height}"}
    if network.kernel_name:
        size = min(SUBSET_SIZE, sampler.num_images)
        results["kernel"] = {"distance": network.kernel_name, "subsets": f"{NUM_SUBSETS} of {size}"} | kernel
    if sampler.scorer is not None:
        results["clip_score"] = {"name": sampler.scorer.name} | scores
    return results, pairs


def _conditions(config) -> dict[str, str | int]:
    """Returns the settings of the run and the machine that a reader needs to repeat the numbers."""
    return {
        "noise seeds": f"{TEACHER_SEED} + k (teachers), {OTHER_SEED} + k (all others)",
        "training steps": config.num_steps,
        "images a step": config.batch_size,
        "device": jax.devices()[0].device_kind,
    }


def _interpolation(models: ComparedModels, sampler: Sampler) -> Interpolation | None:
    """Draws one prompt from the first style to the last, mixed before the style MLP (arXiv:2504.12364, 4.5)."""
    if len(models.names) < 2:
        return None
    first, last, prompt = models.names[0], models.names[-1], sampler.prompts[1]
    weights = np.linspace(0.0, 1.0, NUM_MIXES).tolist()
    jobs = [(prompt, {first: 1.0 - weight, last: weight}, TEACHER_SEED + 1) for weight in weights]
    images = concatenate(sampler.draw(models.student, jobs)).images
    return Interpolation(images, weights, first, last, prompt)
