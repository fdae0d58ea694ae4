"""A merge written as YAML: mergekit's language, whole, with every mistake found before a tensor is read.

plan(recipe)          every mistake in one message; bytes, memory, the value of every parameter at every tensor
merge(recipe, out)    refuses what plan refuses
verify(out)           is it what its receipt says?
read(text)            the documents of a recipe, checked as far as their words go
extract(model, base)  their difference as an adapter, and what it loses
differences(a, b)     how far apart two checkpoints are, layer by layer
stacks(names)         how many layers they have
"""

from jaxmerge.recipe._compare import Difference as Difference, differences as differences
from jaxmerge.recipe._document import RecipePlan as RecipePlan
from jaxmerge.recipe._extract import Extraction as Extraction, extract as extract
from jaxmerge.recipe._names import stacks as stacks
from jaxmerge.recipe._read import read as read
from jaxmerge.recipe._run import merge as merge, plan as plan, verify as verify
from jaxmerge.recipe._schema import Recipe as Recipe
from jaxmerge.recipe._yaml import Mistake as Mistake, RecipeError as RecipeError
