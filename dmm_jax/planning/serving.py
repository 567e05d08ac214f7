"""Plans a server before a machine is rented: the memory of a served student on each device, and its images/s.

The programs are those of `serve`, traced on shapes: text encoders, one evaluation of the network, decoder. With libtpu
they are compiled for the requested TPUs, without a TPU. For GPUs, and without libtpu, temporaries are an estimate.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.extend import core
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dmm_jax.checkpoints.abstract import abstract_model
from dmm_jax.checkpoints.checkpoint import Checkpoint
from dmm_jax.config import arguments
from dmm_jax.kernels.attention import choose_implementation
from dmm_jax.models import drawing
from dmm_jax.models.autoencoder_kl import AutoencoderKL
from dmm_jax.models.network import Network, cast_params
from dmm_jax.models.preview import GREY
from dmm_jax.models.text_encoders import TextConditioning, TextEncoders
from dmm_jax.models.unet_2d_condition import UNet2DConditionModel
from dmm_jax.models.unet_config import merged_config, per_axis
from dmm_jax.planning import compiler, devices, flops, lifetimes, memory
from dmm_jax.planning.plan import ESTIMATED_NOTE, LEAST_EFFORT_NOTE, MARGIN
from dmm_jax.planning.requirements import COMPILED, ESTIMATED, GIB
from dmm_jax.runtime.errors import UserError
from dmm_jax.serve import pool, programs, work
from dmm_jax.serve.programs import SLOTS, Variant

DEVICES_PER_HOST = 8
MAX_CHUNKS = 4  # As the engine of `serve`.


class Cost(NamedTuple):
    """What one run of a program costs each device."""

    temporaries: float  # Bytes beyond the parameters and the slots.
    seconds: float  # The roofline's.


@dataclasses.dataclass(frozen=True)
class ServingPlan:
    """What a server requires of each device; bytes by kind."""

    topology: devices.Topology
    sizes: tuple[work.Size, ...]
    num_slots: int  # Per size, on all devices.
    num_steps: int
    memory: dict[str, float]
    images_per_s: dict[str, float]  # With full batches of each size, on all devices.
    method: str
    assumptions: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """Whether a device's memory is enough."""
        return sum(self.memory.values()) <= self.topology.device.memory

    def to_json(self) -> dict:
        """Returns the plan as one JSON object; GB are 2^30 bytes."""
        return {
            "fits": self.fits,
            "topology": self.topology.name,
            "device": self.topology.device.name,
            "num_devices": self.topology.count,
            "sizes": [name_of(size) for size in self.sizes],
            "slots": self.num_slots,
            "steps": self.num_steps,
            "memory_gb": {kind: size / GIB for kind, size in self.memory.items()},
            "memory_total_gb": sum(self.memory.values()) / GIB,
            "memory_available_gb": self.topology.device.memory / GIB,
            "images_per_s": self.images_per_s,
            "method": self.method,
            "assumptions": list(self.assumptions),
        }


@dataclasses.dataclass(frozen=True)
class Server:
    """The networks and slots of a server as shapes, on a mesh whose devices need not exist."""

    checkpoint: Checkpoint
    unet_config: Mapping
    dtype: np.dtype
    mesh: Mesh | AbstractMesh
    attention: str
    num_slots: int

    @functools.cached_property
    def networks(self) -> dict[str, Network]:
        """The structure of each network, and its parameters as `serve` stores them."""
        builders = {
            "unet": lambda rngs: UNet2DConditionModel.from_config(
                self.unet_config, dtype=self.dtype, rngs=rngs, attention_implementation=self.attention
            ),
            "vae": lambda rngs: AutoencoderKL.from_config(self.checkpoint.vae_config, dtype=self.dtype, rngs=rngs),
            "text_encoders": lambda rngs: TextEncoders(self.checkpoint.text_configs, dtype=self.dtype, rngs=rngs),
        }
        networks = {}
        for name, build in builders.items():
            graph, state = nnx.split(abstract_model(build), nnx.Param)
            params = jax.eval_shape(functools.partial(cast_params, dtype=self.dtype), nnx.to_pure_dict(state))
            networks[name] = Network(graph, self._placed(params, P()))
        return networks

    def with_attention(self, attention: str) -> "Server":
        """Returns the same server with another implementation of attention."""
        return dataclasses.replace(self, attention=attention)

    @property
    def per_device(self) -> int:
        """Slots of one size on each device."""
        return self.num_slots // self.mesh.size

    @property
    def num_styles(self) -> int:
        """Rows of the style table; 0 for a stock checkpoint."""
        return self.unet_config.get("num_models") or 0

    def encoder(self) -> tuple[Callable, tuple]:
        """Returns the text encoders' program and its arguments."""
        lengths = [config["max_position_embeddings"] for config in self.checkpoint.text_configs.values()]
        shape = (pool.chunks_encoded(MAX_CHUNKS), 1, sum(lengths))
        rows = P("batch") if shape[0] % self.mesh.size == 0 else P()
        graph, params = self._graph("text_encoders")
        ids, weights = (jax.ShapeDtypeStruct(shape, kind) for kind in (jnp.int32, jnp.float32))
        return functools.partial(drawing.encode, graph), (params, *self._placed((ids, weights), rows))

    @functools.cached_property
    def _text(self) -> TextConditioning:
        function, args = self.encoder()
        return jax.eval_shape(function, *args)

    def slots(self, size: work.Size) -> programs.Slots:
        """Returns the slots of an image size."""
        text = self._text
        factor = 2 ** (len(self.checkpoint.vae_config["block_out_channels"]) - 1)
        shape = (self.num_slots, size[0] // factor, size[1] // factor, self.unet_config.get("in_channels", 4))
        states = (MAX_CHUNKS, *text.encoder_hidden_states.shape[1:])
        pooled = 0 if text.pooled is None else text.pooled.shape[-1]
        empty = functools.partial(programs.empty, self.mesh, shape, states, pooled, self.dtype)
        return self._placed(jax.eval_shape(empty), SLOTS)

    def evaluation(self, size: work.Size, num_chunks: int) -> tuple[Callable, tuple]:
        """Returns the program of one evaluation of all slots with guidance, and its arguments."""
        variant = Variant(self.per_device, True, num_chunks)
        graph, params = self._graph("unet")
        columns = len(work.COLUMNS) + self.num_styles
        rows = self._placed(jax.ShapeDtypeStruct((self.num_slots, columns), jnp.float32), SLOTS)
        function = functools.partial(programs.denoise, graph, self.mesh, variant, size)
        return function, (params, self.slots(size), rows, GREY)

    def decoder(self, size: work.Size) -> tuple[Callable, tuple]:
        """Returns the program that decodes most images at once, and its arguments."""
        graph, params = self._graph("vae")
        count = pool.decode_counts(size, self.per_device)[0] * self.mesh.size
        numbers = self._placed(jax.ShapeDtypeStruct((count,), jnp.int32), SLOTS)
        return functools.partial(programs.decode, graph, self.mesh), (params, self.slots(size).latents, numbers)

    def array_bytes(self, sizes: Sequence[work.Size]) -> dict[str, float]:
        """Returns the bytes on each device of parameters and slots, by kind."""
        names = {"unet": "UNet", "vae": "VAE", "text_encoders": "text encoders"}
        kinds = {name: memory.total(self.networks[network].params) for network, name in names.items()}
        slots = {f"slots {name_of(size)}": memory.total(self.slots(size)) / self.mesh.size for size in sizes}
        return {kind: float(count) for kind, count in (kinds | slots).items()}

    def _graph(self, name: str) -> tuple:
        network = self.networks[name]
        return network.graph, network.params

    def _placed(self, tree, spec):
        """Returns shapes with their places on the mesh, if a compiler knows its devices."""
        if not isinstance(self.mesh, Mesh):
            return tree
        sharding = NamedSharding(self.mesh, spec)
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)


def plan(
    checkpoint: Checkpoint,
    topology: str,
    sizes: Sequence[work.Size] = (),
    num_slots: int = 8,
    *,
    num_styles: int = 0,
    num_steps: int = 25,
    dtype: str = "bfloat16",
    compiled: bool | None = None,
) -> ServingPlan:
    """Returns the plan of a server on one topology.

    Args:
      checkpoint: a merged or stock checkpoint, or published configs; only shapes are read.
      topology: "gpu:1x24GB", "v5e:2x2"; see `planning.devices`.
      sizes: (height, width) in pixels of the images that it draws; empty: the model's.
      num_slots: images of each size that are computed at once, on all devices.
      num_styles: rows of a style table that a stock checkpoint gets; 0: as the checkpoint is.
      num_steps: of an image, for images/s.
      compiled: whether to compile for the TPU; None: if libtpu is installed.

    Raises:
      UserError: the topology is unknown or larger than one host, or the slots do not divide among its devices.
    """
    target, dtype = devices.topology(topology), jnp.dtype(dtype)
    if target.count > DEVICES_PER_HOST:
        raise UserError(f"a server runs on one host; {topology} has {target.count} devices. Plan one host's.")
    arguments.whole_number("slots", num_slots, 1)
    if num_slots % target.count:
        multiple = -(-num_slots // target.count) * target.count
        raise UserError(f"slots must be a multiple of the {target.count} devices; got {num_slots}. Use {multiple}.")
    if compiled is None:
        compiled = target.platform == "tpu" and compiler.is_installed()
    mesh = AbstractMesh((target.count,), ("batch",))
    if compiled:
        mesh = Mesh(compiler.tpu_mesh(topology).devices.flatten(), ("batch",))
    config = checkpoint.unet_config
    config = merged_config(config, num_styles) if num_styles else config
    attention = choose_implementation("auto", dtype, target.platform, num_devices=target.count)
    server = Server(checkpoint, config, dtype, mesh, attention, num_slots)
    sizes = tuple(sizes) or (_own_size(checkpoint),)
    costs = _costs(server, sizes, target)
    temporaries = max(cost.temporaries for cost in costs.values())
    margin = {} if compiled else {"margin": MARGIN[target.platform] * temporaries}
    speeds = {}
    for size in sizes:
        evaluation, decoder = costs["evaluation", size], costs["decoder", size]
        images = pool.decode_counts(size, server.per_device)[0]
        seconds = num_steps * evaluation.seconds + server.per_device / images * decoder.seconds
        speeds[name_of(size)] = num_slots / seconds
    return ServingPlan(
        topology=target,
        sizes=sizes,
        num_slots=num_slots,
        num_steps=num_steps,
        memory=server.array_bytes(sizes) | {"temporaries": temporaries} | margin,
        images_per_s=speeds,
        method=COMPILED if compiled else ESTIMATED,
        assumptions=(
            LEAST_EFFORT_NOTE if compiled else ESTIMATED_NOTE,
            f"{dtype.name}, prompts of up to {MAX_CHUNKS} chunks; every image has guidance and {num_steps} steps of a "
            "solver with one evaluation per step, and all slots are busy",
            f"products at {devices.COMPUTE_SHARE:.0%} of the bf16 peak, memory at {devices.BANDWIDTH_SHARE:.0%} of its "
            "bandwidth; the text encoders take no time",
        ),
    )


def name_of(size: work.Size) -> str:
    """Returns a size as the command line takes it, width first."""
    return f"{size[1]}x{size[0]}"


def _own_size(checkpoint: Checkpoint) -> work.Size:
    factor = 2 ** (len(checkpoint.vae_config["block_out_channels"]) - 1)
    height, width = per_axis(checkpoint.unet_config["sample_size"])
    return height * factor, width * factor


def _costs(server: Server, sizes: Sequence[work.Size], target: devices.Topology) -> dict[tuple, Cost]:
    """Returns the costs of the text encoders, and of the evaluation and the decoder of every size.

    Neither cuDNN's kernel nor the TPU's writes its scores to memory, so cuDNN's is traced as "flash". That one does not
    take prompts of several lengths, so it is traced with prompts of one chunk. Products are counted in plain attention.
    """
    plain, num_chunks = server.with_attention("xla"), MAX_CHUNKS
    if server.attention == "cudnn":
        server, num_chunks = server.with_attention("flash"), 1
    costs = {("text encoders", None): _cost(server.encoder(), plain.encoder(), target)}
    for size in sizes:
        counted = plain.evaluation(size, 1), plain.decoder(size)
        costs["evaluation", size] = _cost(server.evaluation(size, num_chunks), counted[0], target)
        costs["decoder", size] = _cost(server.decoder(size), counted[1], target)
    return costs


def _cost(program: tuple, counted: tuple, target: devices.Topology) -> Cost:
    """Returns the cost of a program: a function and its shapes; `counted` is the same with products alone."""
    body, device = per_device(*program), target.device
    shardings = [leaf.sharding for leaf in jax.tree.leaves(program[1]) if isinstance(leaf, jax.ShapeDtypeStruct)]
    temporaries = _compiled_temporaries(*program) if any(shardings) else lifetimes.temporaries(body)
    seconds = max(
        flops.of_jaxpr(per_device(*counted)) / (devices.COMPUTE_SHARE * device.bf16_flops),
        lifetimes.traffic(body) / (devices.BANDWIDTH_SHARE * device.memory_bandwidth),
    )
    return Cost(float(temporaries), seconds)


def _compiled_temporaries(function: Callable, args: tuple) -> float:
    """Returns the bytes that a TPU's program takes beyond its arguments; all it needs, if it does not fit."""
    compiled_function = jax.jit(function).lower(*args)
    try:
        analysis = compiled_function.compile(compiler_options=compiler.LEAST_EFFORT).memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        return compiler.out_of_memory(error)[0]
    code = analysis.generated_code_size_in_bytes
    return analysis.peak_memory_in_bytes - analysis.argument_size_in_bytes + code


def per_device(function: Callable, args: tuple) -> core.Jaxpr:
    """Returns the traced program of one device: the body of its `shard_map`, or else all of it."""
    jaxpr = jax.make_jaxpr(function)(*args).jaxpr
    return next(_bodies(jaxpr), jaxpr)


def _bodies(jaxpr: core.Jaxpr):
    for equation in jaxpr.eqns:
        if equation.primitive.name == "shard_map":
            yield equation.params["jaxpr"]
        else:
            for inner in flops.inner_jaxprs(equation):
                yield from _bodies(inner)
