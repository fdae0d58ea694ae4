"""A merge written as YAML: mergekit's language, whole, with every mistake found before a tensor is read.

read(text)        the documents of a recipe, checked as far as its words go
"""

from jaxmerge.recipe._read import read as read
from jaxmerge.recipe._schema import Recipe as Recipe
from jaxmerge.recipe._yaml import RecipeError as RecipeError
