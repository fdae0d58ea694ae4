"""A merge written as YAML: mergekit's language, whole, with every mistake found before a tensor is read.

plan(recipe)          every mistake in one message; bytes, memory, the value of every parameter at every tensor
merge(recipe, out)    refuses what plan refuses
verify(out)           is it what its receipt says?
read(text)            the documents of a recipe, checked as far as their words go
extract(model, base)  their difference as an adapter, and what it loses
differences(a, b)     how far apart two checkpoints are, layer by layer
stacks(names)         how many layers they have

A recipe of mergekit 0.1.5 gives the tensors that mergekit gives (tests/golden/recipe holds its outputs), but for this:

* Arithmetic is float32 whatever `dtype` says, and inputs are cast once, at the end; mergekit casts them before it merges.
* Masks of dare and della follow from `seed` (0), the tensor's name and the model, not from the order of execution.
* Equal magnitudes at a threshold: the first is kept. arcee_fusion's quartiles are those of the tensor, not of a sample.
* New tokens of a union are numbered in the order of the models and their rows; mergekit's order is that of a hash table.
* What comes after the layers of slices is merged from all sources of the last slice, not from as many as the first one has.
* Tensors that a model lacks are a mistake, but for tied heads and constants; mergekit merges those that are there.
* Keys that nobody knows are mistakes; parameters that have no effect are said so.

Ours beside mergekit's: `regex` and `part` (embeddings, head, layers, rest) in conditions; `scope` of ties and breadcrumbs,
`rescale: inv_p` of dare and della; `seed`, `format`, `layout`, `memory`, `sharding`, `integers`, `nonfinite`, `state`,
`dequantize` at the top (of training states the parameters alone are merged, unless state says keep; quantised models are passed
through as they are, or read as the numbers they stand for); twelve more methods, of which fisher and
regmean look at `statistics: path` under the parameters of each model, named and turned as that model (where it is turned into
another layout, or its vocabulary is aligned, they follow; of an array of all layers a Gram matrix for each, (layers, n, n),
which only `layout: hf` takes; of tokens that a model lacks it has no information); `model: run/{1000..2000}`, or
{1000..2000..500}, for all checkpoints of a run; documents with names in any order; adapters alone.
"""

from jaxmerge.recipe._compare import Difference as Difference, differences as differences
from jaxmerge.recipe._document import RecipePlan as RecipePlan
from jaxmerge.recipe._extract import Extraction as Extraction, extract as extract
from jaxmerge.recipe._names import stacks as stacks
from jaxmerge.recipe._read import read as read
from jaxmerge.recipe._run import merge as merge, plan as plan, verify as verify
from jaxmerge.recipe._schema import Recipe as Recipe
from jaxmerge.recipe._yaml import Mistake as Mistake, RecipeError as RecipeError
