"""Shapes of real models, where kernels are proved, compiled and measured: one row, to be given a batch."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Tokens(NamedTuple):
    """One layer of a model that merges tokens: n of width d, compared by k features; r leave, the first `prefix` never."""

    name: str
    n: int
    k: int
    d: int
    r: int
    prefix: int = 0


VIT = (
    Tokens("ViT-S/16@224", 197, 64, 384, 13, 1),
    Tokens("ViT-S/16@384", 577, 64, 384, 40, 1),
    Tokens("ViT-B/16@224", 197, 64, 768, 13, 1),
    Tokens("ViT-B/16@384", 577, 64, 768, 40, 1),
    Tokens("ViT-L/16@224", 197, 64, 1024, 8, 1),
    Tokens("ViT-L/16@384", 577, 64, 1024, 23, 1),
    Tokens("ViT-H/14@224", 257, 80, 1280, 8, 1),
    Tokens("ViT-H/14@378", 730, 80, 1280, 40, 1),
    Tokens("SigLIP-SO400M@384", 729, 72, 1152, 64),
)
"""Sequences whose rows fit on chip: the whole step is one kernel."""

LONG = (
    Tokens("video 8x196", 1568, 64, 1024, 65),
    Tokens("SD 64x64", 4096, 320, 320, 2048),
    Tokens("SD 128x128", 16384, 320, 320, 8192),
)
"""Sequences whose scores do not."""

BYTES = (
    Tokens("ByT5-small 1024", 1024, 64, 1472, 768),
    Tokens("ByT5-small 4096", 4096, 64, 1472, 3072),
)
"""Bytes: r of n are deleted or pooled, in order."""


def cases(spec: Tokens, batch: int, dtype: Any) -> dict[str, tuple[list[Any], dict[str, Any]]]:
    """Of each operation that such a layer needs the arguments as shapes, None where left out, and the keywords."""
    n, k, d, m = spec.n, spec.k, spec.d, spec.n - spec.r
    array = lambda *shape, dtype=dtype: jax.ShapeDtypeStruct((batch, *shape), dtype)
    ids, one = array(n, dtype=jnp.int32), array(n, dtype=jnp.float32)
    found = {
        "merge": ([ids, array(n, d), one], {"m": m, "mean": True}),
        "unmerge": ([ids, array(m, d), array(m, dtype=jnp.float32), one], {}),
    }
    if spec in BYTES:
        return {"pack": ([array(n, dtype=bool), array(n, d)], {"capacity": m}), **found}
    sides = [array(n - n // 2, k), array(n // 2, k)]
    found |= {
        "match": (sides, {}),
        "energy": ([array(n, k), array(n, k)], {"margin": 0.5, "kernel": "shifted", "alpha": 1.0}),
        "nearest_k": ([array(n, k), array(n, k)], {"count": 5}),
        "nearest_ahead": ([array(n, k), array(n, k), ids, ids, None], {}),
        "peaks": ([array(n, d), None, None], {"count": 5}),
    }
    if spec in VIT:
        protected = tuple(i < spec.prefix for i in range(n))
        packed = array(-(-n // 8) * 8, 3, d // k, k)
        offset = jax.ShapeDtypeStruct((1, 3, d // k, k), jnp.float32)
        found["attend"] = ([packed, None, None, one, offset], {"scale": k**-0.5, "length": n, "mean_keys": True})
        found["attend_vjp"] = ([packed, None, None, one, offset, array(n, d // k, k)], {"scale": k**-0.5, "length": n})
        found["step"] = ([array(n, k), array(n, d), one, None], {"r": spec.r, "protected": protected})
    return found
