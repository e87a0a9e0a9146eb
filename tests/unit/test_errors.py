"""The errors: the tree in the docstring is the classes, and a status tells a client which one it was."""

import importlib
import pkgutil
import re

import nr_serve
from nr_serve import errors
from nr_serve.errors import BY_STATUS, NrError

LINE = re.compile(r"^    ([│ ├└─]*)(\w+) +(\d{3})", re.M)


def drawn() -> dict[str, tuple[str | None, int]]:
    """Each class of the docstring's tree, with the class it stands under and its status."""
    tree, above = {}, {}
    for indent, name, status in LINE.findall(errors.__doc__):
        depth = len(indent) // 4
        above[depth] = name
        tree[name] = (above.get(depth - 1), int(status))
    return tree


def written(kind: type[NrError], parent: str | None = None) -> dict[str, tuple[str | None, int]]:
    """The same of the classes of the whole project."""
    tree = {kind.__name__: (parent, kind.status)}
    for each in kind.__subclasses__():
        if each.__module__.startswith("nr_serve."):
            tree |= written(each, kind.__name__)
    return tree


def test_the_tree_in_the_docstring_is_the_classes():
    for module in pkgutil.walk_packages(nr_serve.__path__, "nr_serve."):
        importlib.import_module(module.name)
    assert drawn() == written(NrError)


def test_every_status_stands_for_the_class_at_the_top_that_has_it():
    for kind in (NrError, *NrError.__subclasses__()):
        if kind.status != 500:
            assert BY_STATUS[kind.status] is kind
    assert BY_STATUS[500] is NrError
    assert set(BY_STATUS) == {status for _, status in written(NrError).values()}
