"""The training state: what a step updates, and what a checkpoint of a run holds."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dmm_jax.distill.layout import state_specs
from dmm_jax.runtime import sharding


class Trained(NamedTuple):
    """One trained network: its parameters and its optimiser's state."""

    params: Any
    opt_state: Any


class TrainState(NamedTuple):
    """The student with its moments, counters, and the moving average and discriminator if a run has them."""

    step: jax.Array  # int32 (); counts skipped steps too
    skipped_steps: jax.Array  # int32 (), steps without a finite gradient
    skipped_in_a_row: jax.Array  # int32 ()
    student: Trained
    ema: Any = None  # The moving average of the student's parameters.
    discriminator: Trained | None = None

    @property
    def trained(self) -> dict[str, Any]:
        """The parameters that the step trains, by network."""
        networks = {"student": self.student, "discriminator": self.discriminator}
        return {name: network.params for name, network in networks.items() if network}

    def as_dict(self) -> dict[str, Any]:
        """Returns the state as a checkpoint holds it; `from_dict` reads it back."""
        counters = {name: getattr(self, name) for name in ("step", "skipped_steps", "skipped_in_a_row")}
        parts = self.student._asdict() | counters
        parts |= {} if self.ema is None else {"ema": self.ema}
        return parts | ({} if self.discriminator is None else {"discriminator": self.discriminator._asdict()})

    @classmethod
    def from_dict(cls, parts: Mapping[str, Any]) -> "TrainState":
        """Returns the state that `as_dict` wrote."""
        parts = dict(parts)
        student = Trained(parts.pop("params"), parts.pop("opt_state"))
        discriminator = parts.pop("discriminator", None)
        return cls(student=student, discriminator=discriminator and Trained(**discriminator), **parts)


def init_state(trained: Mapping, optimizers: Mapping, mesh: Mesh, keeps_average: bool) -> TrainState:
    """Returns the state at step 0, placed on the mesh.

    Args:
      trained: parameters on the mesh, by network: "student", and "discriminator" if there is one.
      optimizers: optax's, by network.
    """
    specs = state_specs(abstract_state(trained, optimizers, keeps_average), mesh)
    init = jax.jit(
        lambda trained: _init(trained, optimizers, keeps_average), out_shardings=sharding.shardings(mesh, specs)
    )
    return init(trained)


def abstract_state(trained: Mapping, optimizers: Mapping, keeps_average: bool) -> TrainState:
    """Returns the shapes of the state around arrays or shapes of the trained parameters."""
    return jax.eval_shape(lambda trained: _init(trained, optimizers, keeps_average), trained)


def _init(trained, optimizers, keeps_average):
    networks = {name: Trained(params, optimizers[name].init(params)) for name, params in trained.items()}
    average = jax.tree.map(jnp.copy, trained["student"]) if keeps_average else None
    zero = jnp.int32(0)
    return TrainState(zero, zero, zero, networks["student"], average, networks.get("discriminator"))


@jax.jit
def all_finite(params) -> jax.Array:
    """Tells whether all trained parameters are finite: a run asks before it saves them.

    The step lets no gradient through that is not finite, and AdamW makes finite parameters of a finite one, except for
    learning rates near the largest float32. Asking at every step would read the whole state once more. It is one
    program: several with collectives at the same time may wait for one another for ever in CPU processes.
    """
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(params)]).all()
