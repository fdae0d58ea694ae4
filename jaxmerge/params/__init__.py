"""Pillar 3: which weights become one? Merges of whole models as chains of atoms, in optax's grammar.

MergeTransform(match, merge)                     chain, per_leaf
task_vectors, add, merge                         models in, a model out; nonfinite reports NaN and inf
trim, random_mask, rescale, weigh, scale         atoms that keep all K models
elect_sign                                       zeroes the models that disagree
sum_experts, mean_agreeing, max_agreeing         K models to one
interpolate, spherical                           two models to one
linear, task_arithmetic, ties, dare_linear, dare_ties, slerp     the field's methods, one chain each
"""

from jaxmerge.params._aliases import (
    dare_linear as dare_linear,
    dare_ties as dare_ties,
    linear as linear,
    slerp as slerp,
    task_arithmetic as task_arithmetic,
    ties as ties,
)
from jaxmerge.params._consensus import (
    elect_sign as elect_sign,
    max_agreeing as max_agreeing,
    mean_agreeing as mean_agreeing,
    sum_experts as sum_experts,
)
from jaxmerge.params._geometry import interpolate as interpolate, spherical as spherical
from jaxmerge.params._random import random_mask as random_mask
from jaxmerge.params._scale import rescale as rescale, scale as scale, weigh as weigh
from jaxmerge.params._stack import (
    add as add,
    merge as merge,
    nonfinite as nonfinite,
    task_vectors as task_vectors,
)
from jaxmerge.params._transform import MergeTransform as MergeTransform, chain as chain, per_leaf as per_leaf
from jaxmerge.params._trim import trim as trim
