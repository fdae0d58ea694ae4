"""A router: a small classifier that says, from what the shared model makes of an input, how much each task's own part counts.

router = fit_router(init_router(key, width, tasks), states, task of each, optimizer=optax.adamw(5e-4), key=key)
served = add(base, twin_serve(shared, own, jax.nn.softmax(route(router, state))))
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from jaxmerge.params.spectral._spectral import matmul


class Router(NamedTuple):
    """A perceptron with batch normalisation before each hidden layer's leaky rectifier.

    Attributes:
      kernels, biases: of each layer, (in, out) and (out,).
      scales, shifts: of each hidden layer's normalisation.
      means, variances: of what each normalises, averaged over training; no gradient descends them.
    """

    kernels: tuple[Float[Array, "_ _"], ...]
    biases: tuple[Float[Array, "_"], ...]
    scales: tuple[Float[Array, "_"], ...]
    shifts: tuple[Float[Array, "_"], ...]
    means: tuple[Float[Array, "_"], ...]
    variances: tuple[Float[Array, "_"], ...]


def init_router(key: Array, features: int, tasks: int, hidden: Sequence[int] | None = None) -> Router:
    """A router before training: kernels and biases uniform within one over the root of their inputs.

    Args:
      key: a random key.
      features: the width of what it reads: of a hidden state of the shared model.
      tasks: how many it chooses among.
      hidden: widths of its hidden layers; None is two of twice the features. () is a linear classifier.

    Example:
      >>> import jax, jaxmerge as jm
      >>> [k.shape for k in jm.params.init_router(jax.random.key(0), 4, 3).kernels]
      [(4, 8), (8, 8), (8, 3)]

    Source: Twin-Merging (arXiv:2406.15479), the official router; PyTorch's initialisation.
    """
    inner = (2 * features, 2 * features) if hidden is None else tuple(hidden)
    widths = (features, *inner, tasks)
    kernels, biases = [], []
    for k, n, m in zip(jax.random.split(key, len(inner) + 1), widths[:-1], widths[1:], strict=True):
        for_kernel, for_bias = jax.random.split(k)
        kernels.append(jax.random.uniform(for_kernel, (n, m), jnp.float32, -(n**-0.5), n**-0.5))
        biases.append(jax.random.uniform(for_bias, (m,), jnp.float32, -(n**-0.5), n**-0.5))
    ones, zeros = (tuple(make(m, jnp.float32) for m in inner) for make in (jnp.ones, jnp.zeros))
    return Router(tuple(kernels), tuple(biases), ones, zeros, zeros, ones)


def route(router: Router, features: Float[Array, "*batch d"]) -> Float[Array, "*batch tasks"]:
    """The router's logits; their softmax is what `twin_serve` takes as weights, for one input.

    Args:
      router: see `fit_router`.
      features: what the shared model makes of the inputs, in its last layer: the mean over the positions, or the last one.

    Example:
      >>> import jax, jax.numpy as jnp, jaxmerge as jm
      >>> jm.params.route(jm.params.init_router(jax.random.key(0), 4, 3), jnp.ones((2, 4))).shape
      (2, 3)

    Source: Twin-Merging (arXiv:2406.15479). The official code averages the states of an encoder's positions, and takes those of
    a decoder's last step.
    """
    batch = features.shape[:-1]
    return _forward(router, features.reshape(-1, features.shape[-1]), None, 0.0)[0].reshape(*batch, -1)


def fit_router(
    router: Router,
    features: Float[Array, "n d"],
    labels: Int[Array, "n"],
    *,
    optimizer: Any,
    key: Array,
    epochs: int = 50,
    batch: int = 256,
    dropout: float = 0.5,
    held_out: tuple[Float[Array, "m d"], Int[Array, "m"]] | None = None,
) -> tuple[Router, Float[Array, "epochs"]]:
    """Train a router to tell the tasks apart: cross-entropy, shuffled batches.

    Args:
      router: what to start from, see `init_router`.
      features: what the shared model makes of inputs of all tasks.
      labels: the number of each input's task.
      optimizer: optax-like: `init(params)` and `update(gradients, state, params)` -> (updates, state).
      key: a random key, for the order and for dropout.
      epochs: how often to go over the inputs; those that fill no batch are left out of an epoch.
      batch: how many inputs make a step; all, where there are fewer.
      dropout: the probability to drop a hidden unit.
      held_out: features and labels to choose the epoch by, the one that tells most of them right, of equal ones the first; None
        takes the last epoch.

    Returns:
      The router, and the mean loss of each epoch.

    Raises:
      ValueError: no epochs; as many labels as there are no inputs; a dropout outside [0, 1).

    Example:
      >>> import types, jax, jax.numpy as jnp, jaxmerge as jm
      >>> descent = types.SimpleNamespace(
      ...     init=lambda p: (), update=lambda g, state, p: (jax.tree.map(lambda v: -v, g), state)
      ... )
      >>> features, labels = jnp.array([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]]), jnp.array([0, 0, 1, 1])
      >>> router = jm.params.init_router(jax.random.key(0), 2, 2, hidden=())
      >>> router, losses = jm.params.fit_router(router, features, labels, optimizer=descent, key=jax.random.key(1))
      >>> jm.params.route(router, features).argmax(axis=1).tolist()
      [0, 0, 1, 1]

    Source: Twin-Merging (arXiv:2406.15479), the official code: AdamW at 5e-4, batches of 1024 or 256, the best of 50 epochs.
    """
    n = features.shape[0]
    if labels.shape != (n,) or epochs < 1 or not 0 <= dropout < 1:
        raise ValueError(
            f"fit_router: pass a label for each of the {n} inputs, one epoch or more, and a dropout in [0, 1); got labels of "
            f"shape {labels.shape}, epochs={epochs}, dropout={dropout}."
        )
    size = min(batch, n)
    steps = n // size

    def loss(weights, statistics, x, y, key):
        logits, statistics = _forward(Router(*weights, *statistics), x, key, dropout)
        rows = jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], axis=1)
        return -jnp.mean(rows), statistics

    def step(carry, task):
        weights, statistics, state = carry
        index, key = task
        inputs = (jnp.take(features, index, axis=0), jnp.take(labels, index))
        (value, statistics), gradient = jax.value_and_grad(loss, has_aux=True)(weights, statistics, *inputs, key)
        updates, state = optimizer.update(gradient, state, weights)
        return (jax.tree.map(jnp.add, weights, updates), statistics, state), value

    def epoch(carry, key):
        trained, best, score = carry
        order, drop = jax.random.split(key)
        index = jax.random.permutation(order, n)[: steps * size].reshape(steps, size)
        trained, values = jax.lax.scan(step, trained, (index, jax.random.split(drop, steps)))
        found = Router(*trained[0], *trained[1])
        if held_out is None:
            return (trained, found, score), jnp.mean(values)
        right = jnp.mean(jnp.argmax(route(found, held_out[0]), axis=1) == held_out[1])
        best = jax.tree.map(lambda new, old: jnp.where(right > score, new, old), found, best)
        return (trained, best, jnp.maximum(score, right)), jnp.mean(values)

    @jax.jit
    def train(router, key):
        weights, statistics = tuple(router[:4]), tuple(router[4:])
        start = ((weights, statistics, optimizer.init(weights)), router, jnp.float32(-1))
        (_, best, _), losses = jax.lax.scan(epoch, start, jax.random.split(key, epochs))
        return best, losses

    return train(router, key)


def _forward(router: Router, x: Float[Array, "n d"], key: Array | None, dropout: float) -> tuple[Array, tuple]:
    """Logits, and the running statistics; a key means training: the batch's own statistics, and dropout."""
    x, means, variances = x.astype(jnp.float32), [], []
    for i in range(len(router.scales)):
        x = matmul(x, router.kernels[i]) + router.biases[i][None]
        mean, variance = router.means[i], router.variances[i]
        if key is not None:
            n, mean, variance = x.shape[0], jnp.mean(x, axis=0), jnp.var(x, axis=0)
            means.append(0.9 * router.means[i] + 0.1 * mean)
            variances.append(0.9 * router.variances[i] + 0.1 * variance * (n / max(n - 1, 1)))
        x = (x - mean[None]) * jax.lax.rsqrt(variance + 1e-5)[None] * router.scales[i][None] + router.shifts[i][None]
        x = jax.nn.leaky_relu(x, 0.01)
        if key is not None:
            kept = jax.random.bernoulli(jax.random.fold_in(key, i), 1 - dropout, x.shape)
            x = jnp.where(kept, x / (1 - dropout), 0)
    return matmul(x, router.kernels[-1]) + router.biases[-1][None], (tuple(means), tuple(variances))
