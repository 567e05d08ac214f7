"""PyTorch's side of `dmm-jax bench --against torch`: stock diffusers modules in the strongest form that users run.

    python -m dmm_jax.bench.peer train|sample SIZE BATCH_SIZE NUM_STEPS [NUM_TEACHERS]

Training: float32 master weights, bfloat16 autocast, score and feature loss, fused AdamW, clipping; latents and text
cached, compiled and channels-last, with one teacher, and with several that take a part of the batch each; and the
original recipe's step: one teacher, eager, with the VAE and both text encoders in it. Sampling: compiled, 25 steps of
DPM-Solver++ 2M with guidance, decoded. One JSON object a line.
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
    """Returns the seconds of a call among several of which only the last is waited for."""
    _wait()
    started = time.perf_counter()
    for _ in range(repeats):
        call()
    _wait()
    return (time.perf_counter() - started) / repeats


def _wait():
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def report(job: str, batch_size: int, seconds: float, **more) -> None:
    """Prints one line."""
    peak = torch.cuda.max_memory_allocated() / 2**30 if DEVICE.type == "cuda" else 0.0
    line = {"job": job, "images_per_s": batch_size / seconds, "step_s": seconds, "batch": batch_size} | more
    print(json.dumps(line | {"peak_memory_gb": peak, "torch": torch.__version__}), flush=True)


def train(size: str, batch_size: int, num_steps: int, *, num_teachers: int = 1, cached: bool) -> None:
    """Times one kind of training step; several teachers are asked one after the other, and share the batch."""
    layout = {"memory_format": torch.channels_last} if cached else {}
    student = build(size, "unet", num_class_embeds=8).to(DEVICE, **layout).train()
    teachers = [
        build(size, "unet").to(DEVICE, HALF, **layout).eval().requires_grad_(False) for _ in range(num_teachers)
    ]
    seen = {id(model): [] for model in (student, *teachers)}
    for model in (student, *teachers):
        for block in [*model.down_blocks, model.mid_block, *model.up_blocks]:
            block.register_forward_hook(_keep(seen[id(model)]))
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
    asked, follow = [compiled(teacher) for teacher in teachers], compiled(student)
    if not cached:
        vae, encoders = frozen(build(size, "vae")), [frozen(build(size, "text_encoder")) for _ in range(2)]

    def conditioning():
        if cached:
            return latents, text, text
        parts = [vae.encode(pixels[k : k + 32]).latent_dist.sample() for k in range(0, batch_size, 32)]
        return torch.cat(parts) * 0.18215, encoders[0](input_ids)[0], encoders[1](input_ids)[0]

    def step():
        for kept in seen.values():
            kept.clear()
        with torch.no_grad(), torch.autocast(DEVICE.type, HALF):
            clean, ours, theirs = conditioning()
            noise, timesteps = torch.randn_like(clean), torch.randint(0, 1000, (batch_size,), device=DEVICE)
            noisy = scheduler.add_noise(clean, noise, timesteps)
            parts = zip(asked, *(leaf.chunk(num_teachers) for leaf in (noisy, timesteps, theirs)), strict=True)
            target = _joined([ask(*part).sample for ask, *part in parts])
            targets = [_joined(maps) for maps in zip(*(seen[id(teacher)] for teacher in teachers), strict=True)]
        with torch.autocast(DEVICE.type, HALF):
            output = follow(noisy, timesteps, ours, class_labels=labels).sample
        loss = torch.nn.functional.mse_loss(output.float(), target.float())
        pairs = list(zip(seen[id(student)], targets, strict=True))
        features = sum(torch.nn.functional.mse_loss(a.float(), b.float()) for a, b in pairs) / len(pairs)
        (loss + FEATURE_LOSS_WEIGHT * features).backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    name = "torch.compile, cached latents and text" if cached else "torch eager, the original recipe from images"
    name += f", {num_teachers} teachers" if num_teachers > 1 else ""
    report(name, batch_size, median_s(step, num_steps), queued_step_s=queued_s(step, num_steps))


def _joined(parts):
    return torch.cat(parts) if len(parts) > 1 else parts[0]  # One is not copied.


def _keep(kept):
    return lambda module, args, output: kept.append(output[0] if isinstance(output, tuple) else output)


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
            without, given = both.chunk(2)
            latents = scheduler.step(without + 7.0 * (given - without), timestep, latents).prev_sample
        return decode(latents.to(HALF) / 0.18215).sample.float().cpu()

    report("torch.compile", batch_size, median_s(draw, max(num_steps // 2, 1)))


def main() -> None:
    """Runs what the command line asks for."""
    (job, size), (batch_size, num_steps, *more) = sys.argv[1:3], map(int, sys.argv[3:])
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    if job == "sample":
        return sample(size, batch_size, num_steps)
    num_teachers = more[0] if more else 1
    torch._dynamo.config.cache_size_limit = num_teachers + 8  # A compiled program each.
    kinds = [{"cached": True}, {"cached": True, "num_teachers": num_teachers}, {"cached": False}]
    for kind in kinds if num_teachers > 1 else kinds[::2]:
        train(size, batch_size, num_steps, **kind)
        torch.compiler.reset()
        if DEVICE.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


if __name__ == "__main__":
    main()
