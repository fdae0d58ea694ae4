"""Quantised parents as the numbers that they stand for, as their configuration says."""

from typing import Any

import jax.numpy as jnp

from jaxmerge import checkpoint
from jaxmerge.checkpoint import Source
from jaxmerge.recipe._tokenizer import side_json


def dequantized(source: Source) -> Source:
    """A source, dequantised to the dtype of its configuration (bfloat16 where it has none); as it is where it is not quantised.

    Raises:
      ValueError: see `checkpoint.dequantized`.
    """
    config = side_json(source, "config.json")
    how = config.get("quantization_config") or {}
    rows, columns = how.get("weight_block_size") or (128, 128)
    wanted = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16").removeprefix("torch.")
    dtype = jnp.dtype(wanted) if wanted in ("bfloat16", "float16", "float32") else jnp.dtype(jnp.bfloat16)
    return checkpoint.dequantized(source, block=(int(rows), int(columns)), dtype=dtype)


def as_numbers(path: Any) -> Source:
    """A checkpoint, dequantised as its configuration says.

    Raises:
      ValueError: see `checkpoint.dequantized`.
    """
    return dequantized(checkpoint.open(path))
