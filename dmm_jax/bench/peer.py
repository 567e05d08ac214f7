"""PyTorch's side of `dmm-jax bench --against torch`: stock diffusers modules in the fastest form that users run.

    python -m dmm_jax.bench.peer train|sample SIZE BATCH_SIZE NUM_STEPS [NUM_TEACHERS]

Training has float32 master weights, bfloat16 autocast, score and feature loss, fused AdamW and clipping. Cached latents
and text, compiled and channels-last, are timed with one teacher, and with several teachers that each take a part of the
batch. The original recipe's step is timed too: one teacher, eager, with the VAE and both text encoders in the step.
Sampling is compiled: 25 steps of DPM-Solver++ 2M with guidance, then the decoder. Prints one JSON object per line.
"""

import json
import statistics
import sys
import time

import diffusers
import torch
import transformers

from dmm_jax.world.random_checkpoints import SIZES

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HALF = torch.bfloat16
WARMUP = 4
FEATURE_LOSS_WEIGHT = 0.002


def build(size: str, component: str, **extra):
    """Builds a stock module with random weights."""
    config = {name: value for name, value in SIZES[size][component].items() if not name.startswith("_")}
    if component == "text_encoder":
        return transformers.CLIPTextModel(transformers.CLIPTextConfig(**config))
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


def train(size: str, batch_size: int, num_steps: int, *, num_teachers: int = 1, cached: bool) -> None:
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
    compiled = torch.compile if cached else lambda model: model
    run_teachers, run_student = [compiled(teacher) for teacher in teachers], compiled(student)
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
            inputs = (leaf.chunk(num_teachers) for leaf in (noisy, timesteps, teacher_text))
            target = _joined([run(*part).sample for run, *part in zip(run_teachers, *inputs, strict=True)])
            target_features = [_joined(maps) for maps in zip(*teacher_features, strict=True)]
        with torch.autocast(DEVICE.type, HALF):
            output = run_student(noisy, timesteps, student_text, class_labels=labels).sample
        losses = [_squared_error(*pair) for pair in zip(student_features, target_features, strict=True)]
        (_squared_error(output, target) + FEATURE_LOSS_WEIGHT * sum(losses) / len(losses)).backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    name = "torch.compile, cached latents and text" if cached else "torch eager, the original recipe from images"
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
def sample(size: str, batch_size: int, num_steps: int) -> None:
    """Times whole samples, prompt to pixels."""
    unet, vae = frozen(build(size, "unet", num_class_embeds=8)), frozen(build(size, "vae"))
    encoder = build(size, "text_encoder").to(DEVICE, HALF).eval()
    input_ids = torch.randint(0, 1000, (2 * batch_size, 77), device=DEVICE)
    labels = torch.zeros(2 * batch_size, dtype=torch.long, device=DEVICE)
    side = SIZES[size]["unet"]["sample_size"]
    scheduler = diffusers.DPMSolverMultistepScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", use_karras_sigmas=True
    )
    denoise, decode = torch.compile(unet), torch.compile(vae.decode)

    def draw():
        text = encoder(input_ids)[0]
        scheduler.set_timesteps(25, device=DEVICE)
        latents = torch.randn(batch_size, 4, side, side, device=DEVICE, dtype=HALF)
        for timestep in scheduler.timesteps:
            both = denoise(torch.cat([latents, latents]), timestep, text, class_labels=labels).sample
            unconditional, conditional = both.chunk(2)
            latents = scheduler.step(unconditional + 7.0 * (conditional - unconditional), timestep, latents).prev_sample
        return decode(latents.to(HALF) / 0.18215).sample.float().cpu()

    report("torch.compile", batch_size, median_s(draw, max(num_steps // 2, 1)))


def main() -> None:
    """Runs the job of the command line."""
    (job, size), (batch_size, num_steps, *optional) = sys.argv[1:3], map(int, sys.argv[3:])
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    if job == "sample":
        return sample(size, batch_size, num_steps)
    num_teachers = optional[0] if optional else 1
    torch._dynamo.config.cache_size_limit = num_teachers + 8  # Each module has a compiled program.
    kinds = [{"cached": True}, {"cached": True, "num_teachers": num_teachers}, {"cached": False}]
    for kind in kinds if num_teachers > 1 else kinds[::2]:
        train(size, batch_size, num_steps, **kind)
        torch.compiler.reset()
        if DEVICE.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


if __name__ == "__main__":
    main()
