"""How the reader of docstrings for the API pages gets to know the ones here."""

from __future__ import annotations

import re
from typing import Any

import griffe

_ARGS = re.compile(r"^Args:\n((?: {4}.*\n?|\n)*)", re.MULTILINE)
_ITEM = re.compile(r"^ {4}(?=\S)", re.MULTILINE)


class Docstrings(griffe.Extension):
    """A section `Example:` is one of examples; the names of a line of arguments may wrap, and are of arguments that there are.

    A function made from another, with some arguments fixed, has that one's docstring.
    """

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is None:
            return
        if isinstance(obj, griffe.Module):
            obj.docstring = None  # a page introduces its functions itself
            return
        text = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
        if isinstance(obj, griffe.Function):
            known = {parameter.name.lstrip("*") for parameter in obj.parameters}
            text = _ARGS.sub(lambda found: "Args:\n" + _items(found[1], known), text)
        obj.docstring.value = text


def _items(section: str, known: set[str]) -> str:
    """The items ``names: what they are`` of a section, without the names that are not known."""
    kept = []
    for item in _ITEM.split(section.rstrip())[1:]:
        names, colon, told = item.partition(":")
        of = [name for name in re.split(r",\s*", names) if name in known]
        if of:
            kept.append(f"    {', '.join(of)}{colon}{told.rstrip()}\n")
    return "".join(kept) + "\n"
