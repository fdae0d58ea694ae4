"""The controller that steers deletion to its target by moving the regulariser's weight."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float


class ControllerState(NamedTuple):
    """What the controller remembers. A pytree of scalars: save it with the optimiser's state."""

    p: Float[Array, ""] | Any
    i: Float[Array, ""] | Any
    alpha: Float[Array, ""] | Any
    """The weight of the regulariser in the next step's loss."""


class Controller(NamedTuple):
    """A pair of pure functions, as optax has them."""

    init: Callable[..., ControllerState]
    update: Callable[..., ControllerState]


def pi_controller(*, target: float, k_p: float = 0.5, k_i: float = 1e-5, decay: float = 0.9, lowest: float = 0.0) -> Controller:
    """A proportional-integral controller: alpha grows while fewer bytes are deleted than the target asks.

        e = target - rate;  p <- decay · p + (1 - decay) · k_p · e;  i <- i + k_i · e;  alpha = max(lowest, p + i)

    Call `update(state, rate)` once per optimiser step, with the deletion rate of the whole batch (averaged over
    micro-batches and over the data axis); not in evaluation; and save the state. Neither holds in the official code, which
    updates per micro-batch and rank, moves alpha while it evaluates and restarts it at 0 on resuming.

    Args:
      target: the fraction of bytes to delete.
      k_p, k_i: gains.
      decay: smoothing of the proportional term.
      lowest: the floor of alpha, 0 in the paper. Below 0 the controller can also hold deletion back, where the loss by itself
        would delete more than the target.

    Raises:
      ValueError: target or decay outside [0, 1], lowest above 0.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> controller = jm.words.pi_controller(target=0.5)
      >>> state = controller.update(controller.init(), jnp.array(0.1))
      >>> round(state.alpha.item(), 6)
      0.020004

    Source: MrT5 (arXiv:2410.20771), section 3.3.
    """
    for name, value in dict(target=target, decay=decay).items():
        if not 0 <= value <= 1:
            raise ValueError(f"pi_controller: {name} must lie between 0 and 1, got {value}.")

    if lowest > 0:
        raise ValueError(f"pi_controller: lowest must be 0 or less, got {lowest}.")

    def init(alpha: float = 0.0) -> ControllerState:
        return ControllerState(p=jnp.zeros(()), i=jnp.asarray(alpha, jnp.float32), alpha=jnp.asarray(alpha, jnp.float32))

    def update(state: ControllerState, rate: Float[Array, ""]) -> ControllerState:
        error = target - jax.lax.stop_gradient(rate)
        p = decay * state.p + (1 - decay) * k_p * error
        i = state.i + k_i * error
        return ControllerState(p=p, i=i, alpha=jnp.maximum(p + i, lowest))

    return Controller(init, update)
