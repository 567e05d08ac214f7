"""PyTorch's side of `dmm-jax bench --against torch`: stock diffusers modules in the fastest form that users run.

    python -m dmm_jax.bench.peer train|sample SIZE BATCH_SIZE NUM_STEPS [NUM_TEACHERS ...]

Training has float32 master weights, bfloat16 autocast, score and feature loss, fused AdamW and clipping. Latents and
text are cached and the layout is channels-last. Compiled steps are timed with one teacher, and with several teachers
that each take a part of the batch. For Stable Diffusion XL the same steps are timed eager as well; for the other sizes
the original recipe's: one teacher, eager, with the VAE and both text encoders in the step. Sampling is compiled, and
for Stable Diffusion XL also eager: 25 steps of DPM-Solver++ 2M with guidance, then the decoder. Prints one JSON object
per line.
"""

import json
import statistics
import sys
import time
from functools import partial

import diffusers
import torch
import transformers

from dmm_jax.models.text_encoders import CLASSES, NUM_TIME_IDS
from dmm_jax.world.random_checkpoints import SIZES

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HALF = torch.bfloat16
WARMUP = 4
FEATURE_LOSS_WEIGHT = 0.002


def build(size: str, component: str, **extra):
    """Builds a stock module with random weights on the device, where drawing them takes the least time."""
    config = {name: value for name, value in SIZES[size][component].items() if not name.startswith("_")}
    with DEVICE:
        if component in CLASSES:
            is_first = component == "text_encoder"
            kind = transformers.CLIPTextModel if is_first else transformers.CLIPTextModelWithProjection
            return kind(transformers.CLIPTextConfig(**config))
        kind = {"unet": diffusers.UNet2DConditionModel, "vae": diffusers.AutoencoderKL}[component]
        return kind(**config, **extra)


def frozen(module):
    """Returns a module for inference: on the device, bfloat16, channels last where it has convolutions."""
    return module.to(DEVICE, HALF, memory_format=torch.channels_last).eval().requires_grad_(False)


def median_s(call, repeats: int) -> float:
    """Returns the median seconds of a call, after warm-up."""
    times = []
    for number in range(WARMUP + repeats):
        _wait()
        started = time.perf_counter()
        call()
        _wait()
        if number >= WARMUP:
            times.append(time.perf_counter() - started)
    return statistics.median(times)


def queued_s(call, repeats: int) -> float:
    """Returns the mean seconds of calls without waiting between them."""
    _wait()
    started = time.perf_counter()
    for _ in range(repeats):
        call()
    _wait()
    return (time.perf_counter() - started) / repeats


def _wait():
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def report(job: str, batch_size: int, seconds: float, **columns) -> None:
    """Prints one row as a JSON object."""
    peak = torch.cuda.max_memory_allocated() / 2**30 if DEVICE.type == "cuda" else 0.0
    row = {"job": job, "images_per_s": batch_size / seconds, "step_s": seconds, "batch": batch_size} | columns
    print(json.dumps(row | {"peak_memory_gb": peak, "torch": torch.__version__}), flush=True)


def added_conditions(size: str, text_embeds, batch_size: int) -> dict[str, torch.Tensor]:
    """Returns Stable Diffusion XL's pooled text and sizes by name; {} for the other sizes."""
    if not SIZES[size]["unet"].get("addition_time_embed_dim"):
        return {}
    return {"text_embeds": text_embeds, "time_ids": torch.full((batch_size, NUM_TIME_IDS), 1024.0, device=DEVICE)}


def pooled_width(size: str) -> int:
    """Returns the width of the pooled text that a UNet reads; 0 if it reads none."""
    config = SIZES[size]["unet"]
    widths = NUM_TIME_IDS * (config.get("addition_time_embed_dim") or 0)
    return (config.get("projection_class_embeddings_input_dim") or 0) - widths


def train(
    size: str, batch_size: int, num_steps: int, *, num_teachers: int = 1, cached: bool, compiled: bool = True
) -> None:
    """Times one kind of training step; several teachers share the batch and run one after the other."""
    layout = {"memory_format": torch.channels_last} if cached else {}
    student = build(size, "unet", num_class_embeds=8).to(DEVICE, **layout).train()
    teachers = [
        build(size, "unet").to(DEVICE, HALF, **layout).eval().requires_grad_(False) for _ in range(num_teachers)
    ]
    student_features, teacher_features = record_features(student), [record_features(teacher) for teacher in teachers]
    configs = SIZES[size]
    side, width = configs["unet"]["sample_size"], configs["unet"]["cross_attention_dim"]
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5, fused=DEVICE.type == "cuda")
    scheduler = diffusers.DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    pixels = torch.randn(batch_size, 3, 8 * side, 8 * side, device=DEVICE, dtype=HALF)
    input_ids = torch.randint(0, 1000, (batch_size, 77), device=DEVICE)
    labels = torch.zeros(batch_size, dtype=torch.long, device=DEVICE)
    latents = torch.randn(batch_size, 4, side, side, device=DEVICE, dtype=HALF)
    text = torch.randn(batch_size, 77, width, device=DEVICE, dtype=HALF)
    pooled = torch.randn(batch_size, pooled_width(size), device=DEVICE, dtype=HALF)
    prepare = torch.compile if compiled else lambda model: model
    run_teachers, run_student = [prepare(teacher) for teacher in teachers], prepare(student)
    if not cached:
        vae, encoders = frozen(build(size, "vae")), [frozen(build(size, "text_encoder")) for _ in range(2)]

    def conditioning():
        if cached:
            return latents, text, text
        parts = [vae.encode(pixels[k : k + 32]).latent_dist.sample() for k in range(0, batch_size, 32)]
        return torch.cat(parts) * 0.18215, encoders[0](input_ids)[0], encoders[1](input_ids)[0]

    def step():
        for features in (student_features, *teacher_features):
            features.clear()
        with torch.no_grad(), torch.autocast(DEVICE.type, HALF):
            clean, student_text, teacher_text = conditioning()
            noise, timesteps = torch.randn_like(clean), torch.randint(0, 1000, (batch_size,), device=DEVICE)
            noisy = scheduler.add_noise(clean, noise, timesteps)
            inputs = (leaf.chunk(num_teachers) for leaf in (noisy, timesteps, teacher_text, pooled))
            parts = [
                run(*part, added_cond_kwargs=added_conditions(size, text_embeds, len(text_embeds))).sample
                for run, *part, text_embeds in zip(run_teachers, *inputs, strict=True)
            ]
            target = _joined(parts)
            target_features = [_joined(maps) for maps in zip(*teacher_features, strict=True)]
        with torch.autocast(DEVICE.type, HALF):
            added = added_conditions(size, pooled, batch_size)
            output = run_student(noisy, timesteps, student_text, class_labels=labels, added_cond_kwargs=added).sample
        losses = [_squared_error(*pair) for pair in zip(student_features, target_features, strict=True)]
        (_squared_error(output, target) + FEATURE_LOSS_WEIGHT * sum(losses) / len(losses)).backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    name = "torch.compile" if compiled else "torch eager"
    name += ", cached latents and text" if cached else ", the original recipe from images"
    name += f", {num_teachers} teachers" if num_teachers > 1 else ""
    report(name, batch_size, median_s(step, num_steps), queued_step_s=queued_s(step, num_steps))


def _joined(parts):
    return torch.cat(parts) if len(parts) > 1 else parts[0]  # A single part is not copied.


def _squared_error(a, b):
    return torch.nn.functional.mse_loss(a.float(), b.float())


def record_features(unet) -> list[torch.Tensor]:
    """Returns a list to which every later forward pass appends the outputs of the UNet's blocks."""
    features: list[torch.Tensor] = []

    def append(module, args, output):
        features.append(output[0] if isinstance(output, tuple) else output)

    for block in [*unet.down_blocks, unet.mid_block, *unet.up_blocks]:
        block.register_forward_hook(append)
    return features


@torch.no_grad()
def sample(size: str, batch_size: int, num_steps: int, *, compiled: bool = True) -> None:
    """Times whole samples, prompt to pixels."""
    unet, vae = frozen(build(size, "unet", num_class_embeds=8)), frozen(build(size, "vae"))
    encoders = [build(size, name).to(DEVICE, HALF).eval() for name in SIZES[size] if name in CLASSES]
    input_ids = torch.randint(0, 1000, (2 * batch_size, 77), device=DEVICE)
    labels = torch.zeros(2 * batch_size, dtype=torch.long, device=DEVICE)
    side = SIZES[size]["unet"]["sample_size"]
    scheduler = diffusers.DPMSolverMultistepScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", use_karras_sigmas=True
    )
    prepare = torch.compile if compiled else lambda call: call
    denoise, decode = prepare(unet), prepare(vae.decode)
    scale = SIZES[size]["vae"]["scaling_factor"]

    def draw():
        outputs = [encoder(input_ids, output_hidden_states=len(encoders) > 1) for encoder in encoders]
        # Stable Diffusion XL reads the last hidden layer but one of both encoders, and the second one's projection.
        text = torch.cat([output.hidden_states[-2] for output in outputs], -1) if encoders[1:] else outputs[0][0]
        added = added_conditions(size, outputs[-1][0], 2 * batch_size)
        scheduler.set_timesteps(25, device=DEVICE)
        latents = torch.randn(batch_size, 4, side, side, device=DEVICE, dtype=HALF)
        for timestep in scheduler.timesteps:
            pair = torch.cat([latents, latents])
            both = denoise(pair, timestep, text, class_labels=labels, added_cond_kwargs=added).sample
            unconditional, conditional = both.chunk(2)
            latents = scheduler.step(unconditional + 7.0 * (conditional - unconditional), timestep, latents).prev_sample
        return decode(latents.to(HALF) / scale).sample.float().cpu()

    report("torch.compile" if compiled else "torch eager", batch_size, median_s(draw, max(num_steps // 2, 1)))


def main() -> None:
    """Runs the job of the command line."""
    (job, size), (batch_size, num_steps, *counts) = sys.argv[1:3], map(int, sys.argv[3:])
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    counts = sorted({1, *counts})
    torch._dynamo.config.cache_size_limit = counts[-1] + 8  # Each module has a compiled program.
    is_xl = bool(pooled_width(size))
    if job == "sample":
        runs = [partial(sample, compiled=compiled) for compiled in ((True, False) if is_xl else (True,))]
    else:
        kinds = [{"cached": True, "num_teachers": number} for number in counts]
        if is_xl:
            kinds += [kind | {"compiled": False} for kind in kinds]
        else:
            kinds.append({"cached": False, "compiled": False})
        runs = [partial(train, **kind) for kind in kinds]
    for run in runs:
        run(size, batch_size, num_steps)
        torch.compiler.reset()
        if DEVICE.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


if __name__ == "__main__":
    main()
