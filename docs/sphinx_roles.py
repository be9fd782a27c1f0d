"""Docstrings for MkDocs: Sphinx roles, in which the source writes its cross references, and ``#:`` comments."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import griffe

# :class:`tp_cosep.CoSePPruner`, :meth:`fit`
_ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):`([\w.]+)`")


class SphinxRoles(griffe.Extension):
    """Rewrites roles as links before docstrings are parsed; names without an entry of their own remain plain code."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of a module, class, function or attribute; of a constant the comment above it."""
        if obj.docstring is None and obj.is_attribute and (text := _comment_above(obj)):
            obj.docstring = griffe.Docstring(text, parent=obj)
        if obj.docstring is None:
            return

        def link(match: re.Match[str]) -> str:
            name = match[1]
            try:
                path = obj.resolve(name)
            except griffe.NameResolutionError:  # a full path, or a name of another package
                path = name
            return f'<autoref identifier="{path}" optional><code>{name.removeprefix("tp_cosep.")}</code></autoref>'

        text = _ROLE.sub(link, obj.docstring.value)
        text = re.sub(r"::$", ":", text, flags=re.MULTILINE)  # what follows is indented, and so is code
        obj.docstring.value = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)  # griffe knows the plural


def _comment_above(obj: griffe.Object) -> str:
    """The lines ``#: …`` directly above a definition, as a docstring."""
    if obj.lineno is None or not isinstance(obj.filepath, Path):
        return ""
    found: list[str] = []
    for line in reversed(obj.lines_collection[obj.filepath][: obj.lineno - 1]):
        if not line.startswith("#:"):
            break
        found.insert(0, line.removeprefix("#:").strip())
    return "\n".join(found)
