"""dmm_jax: many Stable Diffusion checkpoints distilled into one UNet with selectable, mixable styles, in JAX.

The map, from the command line down; imports point downwards only:

    cli, verbs                  the verbs: demo inspect prepare train export average fit-style sample evaluate
    demo/                       the embedded world: renderer, tiny checkpoints, their recipe, the whole road
    train                       run(): mesh, data, networks, state, restore, loop
    definitions                 what a config describes: its networks, its objective, the jitted step
    export, sample, average     a trained student as files, and as pictures; weight averages of checkpoints
    fit_style                   a new style vector from a handful of images
    prepare, prepare_samples    the latent cache, from images or from what the teachers draw
    evaluation/                 features, Frechet distance, fidelity, style matrix, report
    distill/                    losses, teachers, student, the one compiled step
    styles                      names, mixes and schedules over timesteps as rows of weights
    pipeline, images, metrics   prompts + styles -> images; PNGs that carry their parameters; metrics.jsonl
    checkpoints/                the naming rule, safetensors, single files, folders, exports, Orbax states
    data/                       caption sources, prompts, the latent cache, batches
    tokenizer, sharding         token ids; the mesh and which array lives where
    processes                   several processes as one run: joining, ending, SIGTERM
    models/                     NNX ports of UNet, VAE, CLIP, Inception, LPIPS; attributes are diffusers' keys
    diffusion/                  schedules, predictions, guidance, solvers: mathematics on arrays
    compilation                 the folder of compiled programs
    config, config_checks       every option of a run; what they must be
"""

__version__ = "0.1.0"


def __getattr__(name: str):
    """Imports `Pipeline` when it is first used, so that `import dmm_jax` stays light."""
    if name == "Pipeline":
        from dmm_jax.pipeline import Pipeline

        return Pipeline
    raise AttributeError(f"module 'dmm_jax' has no attribute {name!r}")
