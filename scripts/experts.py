"""One base, a head for each task, and eight experts fine-tuned from the base: what there is to merge.

The protocol of the merging literature (Task Arithmetic, arXiv:2212.04089; TIES, arXiv:2306.01708): a head is fitted on the
base's features and frozen; fine-tuning changes the encoder alone; the encoders are merged, and each task reads the merged one
through its own head. A language model has one head for all, which is merged with the rest.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array

import jaxmerge as jm
from scripts.tasks import Split, Task

Params = dict[Any, Any]
Head = dict[str, Any]
ABSENT = -1e9
"""The logit of a class that a task does not have: heads are padded to one width."""


@dataclasses.dataclass(frozen=True)
class Network:
    """A model as a function of its parameters. A head is the part of them that stands under "head"; {} where it is shared.

    Attributes:
      make: builds the module, called with inputs alone.
      width: of the features that a head reads.
      classes: of the widest head.
    """

    make: Callable[[nnx.Rngs], Any]
    width: int
    classes: int

    def init(self, seed: int) -> Params:
        """Fresh parameters as nested dicts."""
        return jax.jit(lambda: nnx.to_pure_dict(nnx.state(self.make(nnx.Rngs(seed)), nnx.Param)))()

    def model(self, params: Params) -> Any:
        """A module that holds these parameters; cheap enough to call inside jit."""
        graph, state = nnx.split(nnx.eval_shape(lambda: self.make(nnx.Rngs(0))))
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(graph, state)

    def logits(self, params: Params, head: Head, x: Array) -> Array:
        return self.model({**params, **head})(x)

    def features(self, params: Params, x: Array) -> Array:
        """What a head reads: the logits of a head that does nothing."""
        return self.logits(params, {"head": {"kernel": jnp.eye(self.width), "bias": jnp.zeros(self.width)}}, x)


def without_head(params: Params) -> tuple[Params, Head]:
    """The encoder, and the head."""
    return {k: v for k, v in params.items() if k != "head"}, {"head": params["head"]}


def stacked(trees: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


# --- training --------------------------------------------------------------------------------------------------------


def cross_entropy(logits: Array, labels: Array) -> Array:
    """The mean over what is scored."""
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0))
    return jnp.sum(nats * (labels >= 0)) / jnp.maximum(jnp.sum(labels >= 0), 1)


class Trainer:
    """AdamW with a cosine, on several tasks at once or on one, in chunks of steps that share a program."""

    def __init__(self, network: Network, *, batch: int, seed: int, chunk: int = 25):
        self.network, self.batch, self.chunk = network, batch, chunk
        self.rng = np.random.default_rng((seed, 5))
        self.tx = optax.chain(
            optax.clip_by_global_norm(1.0), optax.scale_by_adam(b2=0.98), optax.add_decayed_weights(0.01), optax.scale(-1.0)
        )
        self.run = jax.jit(self._run, donate_argnums=(0, 1))

    def __call__(
        self,
        params: Params,
        heads: Sequence[Head],
        splits: Sequence[Split],
        *,
        steps: int,
        rate: float,
        tick: Callable[[], Any],
    ) -> Params:
        """Fine-tune on all of `splits` together; `tick` is called after every chunk."""
        x, y = (jnp.stack([jnp.asarray(a) for a in parts]) for parts in zip(*splits, strict=True))
        head = stacked(heads)
        params, state = jax.tree.map(jnp.array, params), self.tx.init(params)
        schedule = optax.warmup_cosine_decay_schedule(0.0, rate, max(steps // 20, 1), steps + 1)
        rates = jnp.asarray(schedule(jnp.arange(steps) + 1))
        each = max(self.batch // len(splits), 1)
        for first in range(0, steps, self.chunk):
            some = rates[first : first + self.chunk]
            at = self.rng.integers(0, x.shape[1], (len(some), len(splits), each))
            params, state, loss = self.run(params, state, head, (x, y), (some, at))
            if not np.isfinite(loss):
                raise FloatingPointError(
                    f"training: the loss is {loss} after {first + len(some)} steps; lower the rate {rate}."
                )
            tick()
        return params

    def _run(self, params, state, head, data, schedule):
        def loss(params, x, y):
            logits = jax.vmap(self.network.logits, (None, 0, 0))(params, head, x)
            return cross_entropy(logits, y)

        def step(carry, now):
            params, state = carry
            rate, at = now
            x, y = (jax.vmap(lambda a, i: a[i])(part, at) for part in data)
            value, gradient = jax.value_and_grad(loss)(params, x, y)
            updates, state = self.tx.update(gradient, state, params)
            return (jax.tree.map(lambda p, u: p + rate * u, params, updates), state), value

        (params, state), losses = jax.lax.scan(step, (params, state), schedule)
        return params, state, losses[-1]


def probe(network: Network, params: Params, task: Task, count: int = 2000) -> Head:
    """The task's head: a linear discriminant of the features of a fixed encoder."""
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    some = Split(task.train.x[:count], task.train.y[:count])
    features = np.asarray(jax.jit(network.features)(params, some.x))
    found = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=0.01).fit(features, some.y)
    kernel, bias = found.coef_.T, found.intercept_
    if kernel.shape[1] == 1:  # two classes: one logit against 0
        kernel, bias = np.concatenate([0 * kernel, kernel], axis=1), np.array([0.0, bias[0]])
    full, all_bias = np.zeros((network.width, network.classes)), np.full(network.classes, ABSENT)
    full[:, found.classes_], all_bias[found.classes_] = kernel, bias
    return {"head": {"kernel": jnp.asarray(full, jnp.float32), "bias": jnp.asarray(all_bias, jnp.float32)}}


# --- what merges may look at -----------------------------------------------------------------------------------------


class Scorer:
    """The share of right answers and the nats of a model on every task: one program, whatever the model."""

    def __init__(self, network: Network, heads: Sequence[Head], splits: Sequence[Split]):
        self.heads, self.splits = heads, [(jnp.asarray(s.x), jnp.asarray(s.y)) for s in splits]
        self.counts = [int((s.y >= 0).sum()) for s in splits]

        @jax.jit
        def score(params, head, x, y):
            logits = network.logits(params, head, x)
            return jnp.sum((logits.argmax(-1) == y) & (y >= 0)) / jnp.sum(y >= 0), cross_entropy(logits, y)

        self.one = score

    def __call__(self, params: Params | Sequence[Params], tasks: Sequence[int] | None = None) -> np.ndarray:
        """(tasks, 2): accuracy and nats; of one model, or of one for each of the tasks."""
        tasks = range(len(self.splits)) if tasks is None else tasks
        each = params if isinstance(params, list) else [params] * len(tasks)
        return np.array([self.one(p, self.heads[k], *self.splits[k]) for k, p in zip(tasks, each, strict=True)], float)


def grams(network: Network, params: Params, head: Head, x: np.ndarray) -> dict[str, Array]:
    """The Gram matrices of the inputs of all linear layers, by the names of their kernels: RegMean's statistics."""

    @jax.jit
    def run(params, head, x):
        model, seen = network.model({**params, **head}), {}

        def watch(name):
            def product(x, kernel, *args, **kwargs):
                seen[name] = jm.params.gram(x)
                return jax.lax.dot_general(x, kernel, *args, **kwargs)

            return product

        for path, module in nnx.iter_modules(model):
            if isinstance(module, nnx.Linear):
                module.dot_general = watch("/".join(map(str, (*path, "kernel"))))
        model(x)
        return {name: g for name, g in seen.items() if not (head and name.startswith("head/"))}

    return run(params, head, x)


def information(network: Network, params: Params, head: Head, x: np.ndarray, *, seed: int) -> dict[str, Array]:
    """The diagonal Fisher information by leaf name, at a label drawn from the model for each example."""
    logits = lambda params, one: network.logits(params, head, one[None])[0]

    @jax.jit
    def run(params, x, key):
        return jm.params.fisher_information(logits, params, x, "sampled", key=key, at_once=math.gcd(len(x), 16)).mean()

    return run(params, x, jax.random.key(seed))


def named(tree: Any) -> dict[str, Array]:
    """Leaves by name, as jaxmerge names them."""
    name = functools.partial(jax.tree_util.keystr, simple=True, separator="/")
    return {name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}
