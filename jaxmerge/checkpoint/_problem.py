"""Reasons to refuse a merge, each with the argument that it is about."""


class Problem(str):
    """A reason to refuse, in words.

    Attributes:
      about: the argument of `plan` that the user would change; None where it is a checkpoint, or the whole of them.
    """

    about: str | None

    def __new__(cls, text: str, about: str | None = None) -> "Problem":
        found = super().__new__(cls, text)
        found.about = about
        return found


def about(problem: str) -> str | None:
    """The argument that a reason is about, where it says one."""
    return getattr(problem, "about", None)
