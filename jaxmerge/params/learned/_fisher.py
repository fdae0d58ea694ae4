"""Diagonal Fisher information: how sure a model is of each of its weights, added up over batches.

    F = E over x, E over y, of (d log p(y | x) / d w)^2

over labels y that the model itself expects (the true Fisher information), or those that are given (the empirical one). Squares
are taken example by example: the square of a batch's gradient is something else.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int, PyTree

from jaxmerge.params._stack import is_float
from jaxmerge.params._transform import named_leaves


class Information(NamedTuple):
    """A running sum; add two with `jax.tree.map(jnp.add, a, b)`, save it as any pytree.

    Attributes:
      total: {leaf name: array of the leaf's shape}, float32, summed over the examples.
      count: how many examples.
    """

    total: dict[str, Array]
    count: Float[Array, ""]

    def mean(self) -> dict[str, Array]:
        """The information per example, as `fisher` takes it.

        Example:
          >>> import jax.numpy as jnp, jaxmerge as jm
          >>> jm.params.Information({"w": jnp.array([2.0, 4.0])}, jnp.array(2.0)).mean()["w"].tolist()
          [1.0, 2.0]
        """
        return {name: x / self.count for name, x in self.total.items()}


def fisher_information(
    logits: Callable[[PyTree, Any], Float[Array, "*positions classes"]],
    model: PyTree,
    inputs: PyTree,
    labels: Literal["expected", "sampled", "mixed"] | Int[Array, "batch *positions"] = "expected",
    *,
    key: Array | None = None,
    samples: int = 1,
    at_once: int | None = None,
) -> Information:
    """The diagonal Fisher information of one batch.

    Args:
      logits: (model, one example) -> logits; of one label, or of one at each position (a language model's, each given what
        comes before). A position that does not count has constant logits: `jnp.where(mask[:, None], logits, 0)`.
      model: a pytree; its floating point leaves are weights.
      inputs: a pytree with a leading axis of examples.
      labels: "expected" weighs every label by its probability, exactly (classes times positions backward passes); "sampled"
        draws them from the model; an array gives them, which makes the information empirical. "mixed" is what peers compute.
      key: a random key, for "sampled".
      samples: how many draws per example.
      at_once: how many examples are differentiated at once, which takes as many copies of the model; must divide the batch.
        None is all.

    Law:
      Information adds up over batches. The mean of "sampled" over many draws is "expected".

    Raises:
      ValueError: an unknown kind of labels; "sampled" without a key; `at_once` that does not divide the batch.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> logits = lambda model, x: jnp.stack([x @ model["w"], 0.0])  # logistic regression
      >>> x = jnp.array([[1.0, 0.0], [2.0, 0.0]])
      >>> found = jm.params.fisher_information(logits, {"w": jnp.zeros(2)}, x)
      >>> found.mean()["w"].tolist()  # the mean of p (1 - p) x^2
      [0.625, 0.0]

    Source: Merging models with Fisher-weighted averaging (arXiv:2111.09832) and its official code: "expected", and "sampled"
    where there are many labels. fusion_bench and MergeLM square the gradient of the sum of sqrt(p) log p over labels and the
    whole batch, which has cross terms: "mixed"; it depends on how the examples are batched.
    """
    given = not isinstance(labels, str)
    if not given and labels not in ("expected", "sampled", "mixed"):
        raise ValueError(f'fisher_information: labels must be "expected", "sampled", "mixed" or an array; got {labels!r}.')
    n = jax.tree.leaves(inputs)[0].shape[0]
    if at_once is not None and (at_once < 1 or n % at_once):
        raise ValueError(f"fisher_information: at_once must divide the batch of {n} examples; got {at_once}.")
    leaves, treedef = named_leaves(model)
    weights = {name: x for name, x in leaves.items() if is_float(x)}
    run = lambda w, x: logits(jax.tree.unflatten(treedef, list((leaves | w).values())), x).astype(jnp.float32)
    square = lambda g: jax.tree.map(lambda v: v.astype(jnp.float32) ** 2, g)
    nothing = {name: jnp.zeros_like(x, jnp.float32) for name, x in weights.items()}

    def of_labels(x, y):
        rows = lambda w: jnp.take_along_axis(jax.nn.log_softmax(run(w, x)), y[..., None], axis=-1)
        return square(jax.grad(lambda w: jnp.sum(rows(w)))(weights))

    def expected(x):
        log_p, pull = jax.vjp(lambda w: jax.nn.log_softmax(run(w, x)).reshape(-1), weights)

        def step(total, i):
            (g,) = pull(jnp.zeros_like(log_p).at[i].set(1))
            return jax.tree.map(lambda a, v: a + jnp.exp(log_p[i]) * v, total, square(g)), None

        return jax.lax.scan(step, nothing, jnp.arange(log_p.size))[0]

    def sampled(x, key):
        drawn = lambda k: of_labels(x, jax.random.categorical(k, run(weights, x)))
        return jax.tree.map(lambda v: jnp.mean(v, axis=0), jax.vmap(drawn)(jax.random.split(key, samples)))

    def mixed(w):
        log_p = jax.nn.log_softmax(jax.vmap(run, (None, 0))(w, inputs))
        return jnp.sum(jnp.sqrt(jax.lax.stop_gradient(jnp.exp(log_p))) * log_p)

    count = jnp.float32(n)
    if given:
        return Information(_summed(of_labels, nothing, (inputs, labels), at_once), count)
    if labels == "mixed":
        return Information(square(jax.grad(mixed)(weights)), count)
    if labels == "sampled":
        if key is None:
            raise ValueError('fisher_information: labels="sampled" draws them; pass key=jax.random.key(...).')
        return Information(_summed(sampled, nothing, (inputs, jax.random.split(key, n)), at_once), count)
    return Information(_summed(expected, nothing, (inputs,), at_once), count)


def _summed(f: Callable, nothing: PyTree, examples: tuple, at_once: int | None) -> PyTree:
    """The sum of f over the examples, some at once."""
    some = lambda xs: jax.tree.map(lambda v: jnp.sum(v, axis=0), jax.vmap(f)(*xs))
    if at_once is None:
        return some(examples)
    pieces = jax.tree.map(lambda v: v.reshape(-1, at_once, *v.shape[1:]), examples)
    add = lambda total, xs: (jax.tree.map(jnp.add, total, some(xs)), None)
    return jax.lax.scan(add, nothing, pieces)[0]
