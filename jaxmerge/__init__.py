"""Merge tokens, bytes and models in JAX.

A plan is computed from data by a pure function and is small. It is applied by a pure function that is linear and local.

    Plan, SoftPlan                    where each of n positions goes
    merge, unmerge, compose           the algebra
    identity, from_parents            plans to start from
    tokens, words, params             the planners: which tokens, bytes, weights become one?
    attention, virtual                what a plan means to attention; attention as if nothing had merged
    checkpoint, recipe, testing       merge checkpoints on disk, as YAML says; the laws, as tests

All of it is loaded on first use.
"""

import importlib
import typing

__version__ = "0.1.0"

_ALGEBRA = ("Plan", "SoftPlan", "compose", "from_parents", "identity", "merge", "unmerge")
_ROOMS = ("attention", "checkpoint", "params", "recipe", "testing", "tokens", "virtual", "words")

if typing.TYPE_CHECKING:
    from jaxmerge import (
        attention as attention,
        checkpoint as checkpoint,
        params as params,
        recipe as recipe,
        testing as testing,
        tokens as tokens,
        virtual as virtual,
        words as words,
    )
    from jaxmerge._plan import (
        Plan as Plan,
        SoftPlan as SoftPlan,
        compose as compose,
        from_parents as from_parents,
        identity as identity,
        merge as merge,
        unmerge as unmerge,
    )


def __getattr__(name: str):
    if name in _ALGEBRA:
        return getattr(importlib.import_module("jaxmerge._plan"), name)
    if name in _ROOMS:
        return importlib.import_module(f"jaxmerge.{name}")
    raise AttributeError(f"module 'jaxmerge' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_ALGEBRA, *_ROOMS})
