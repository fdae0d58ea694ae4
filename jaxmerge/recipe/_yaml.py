"""YAML that knows where it stands: every value and key with its line and column, and all that is wrong in one message."""

import difflib
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple


class Mark(NamedTuple):
    """A place in a recipe, counted from 1."""

    line: int
    column: int


class Mistake(NamedTuple):
    """Something that the user must change: where, what is wrong, what was expected or how to mend it."""

    mark: Mark | None
    text: str


class Wrong(ValueError):
    """One mistake that leaves nothing to look for others in.

    Attributes:
      mark: where it stands.
    """

    def __init__(self, mark: Mark | None, text: str):
        super().__init__(text)
        self.mark = mark


class RecipeError(ValueError):
    """A recipe that cannot be carried out; the message lists every reason.

    Attributes:
      mistakes: them one by one.
    """

    def __init__(self, mistakes: Iterable[Mistake], name: str = "recipe"):
        self.mistakes = tuple(dict.fromkeys(mistakes))
        where = lambda mark: f":{mark.line}:{mark.column}" if mark else ""
        lines = [f"  {name}{where(m.mark)}: {m.text}" for m in self.mistakes]
        count = "1 mistake" if len(lines) == 1 else f"{len(lines)} mistakes"
        super().__init__(f"the recipe has {count}:\n" + "\n".join(lines))


class Node(NamedTuple):
    """A value of a recipe.

    Attributes:
      value: a scalar, a list of nodes, or {key: node}.
      mark: where it begins.
      keys: where each key of a mapping stands.
    """

    value: Any
    mark: Mark
    keys: dict[str, Mark]

    @property
    def plain(self) -> Any:
        """The value without places."""
        if isinstance(self.value, dict):
            return {k: v.plain for k, v in self.value.items()}
        return [v.plain for v in self.value] if isinstance(self.value, list) else self.value


def documents(text: str, name: str) -> Iterator[Node]:
    """Each document of a YAML text that is not empty.

    Raises:
      RecipeError: it is not YAML, a key occurs twice, or a key is not a string.
    """
    import yaml

    loader = yaml.SafeLoader(text)
    try:
        while loader.check_node():
            node = _node(loader, loader.get_node())
            if node.value is not None:
                yield node
    except yaml.MarkedYAMLError as e:
        mark = e.problem_mark or e.context_mark
        place = None if mark is None else Mark(mark.line + 1, mark.column + 1)
        why = " ".join(str(part) for part in (e.context, e.problem) if part)
        check = "indent with spaces, not with tabs" if "'\\t'" in why else "check indentation, colons and quotes"
        check = "take the lines ``` around it away" if "'`'" in why else check
        raise RecipeError([Mistake(place, f"not YAML: {why}; {check}.")], name) from None
    except RecursionError:
        raise RecipeError([Mistake(None, "an anchor contains itself; write the values out.")], name) from None
    finally:
        loader.dispose()


def _node(loader: Any, node: Any) -> Node:
    import yaml

    mark = Mark(node.start_mark.line + 1, node.start_mark.column + 1)
    if isinstance(node, yaml.SequenceNode):
        return Node([_node(loader, child) for child in node.value], mark, {})
    if not isinstance(node, yaml.MappingNode):
        return Node(loader.construct_object(node), mark, {})
    written = [key.value for key, _ in node.value]
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise yaml.MarkedYAMLError(problem="a key must be a word", problem_mark=key.start_mark)
        if key.value != "<<" and written.count(key.value) > 1:
            raise yaml.MarkedYAMLError(problem=f"the key {key.value!r} occurs twice", problem_mark=key.start_mark)
    loader.flatten_mapping(node)  # <<: *anchor
    keys = {key.value: Mark(key.start_mark.line + 1, key.start_mark.column + 1) for key, _ in node.value}
    return Node({key.value: _node(loader, value) for key, value in node.value}, mark, keys)


def nearest(word: str, words: Iterable[str]) -> str | None:
    """The word that was meant, if one is near enough."""
    near = difflib.get_close_matches(word.lower().replace("-", "_"), sorted(words), n=1, cutoff=0.6)
    return near[0] if near else None


def suggest(word: str, words: Iterable[str]) -> str:
    """ "; did you mean 'density'?", or what there is to choose from."""
    words = sorted(words)
    near = nearest(word, words)
    return f"; did you mean {near!r}?" if near else f"; there are: {', '.join(words)}."
