"""HTML and SVG as trees, so that whatever a name holds is text and never markup."""

from __future__ import annotations

from xml.etree.ElementTree import Element, tostring

__all__ = ["Child", "element", "html"]

Child = Element | str | None


def element(tag: str, *children: Child, **attributes: str | float | bool | None) -> Element:
    """An element with its children, text among them.

    Args:
        tag: Its name.
        *children: Elements and text in order; ``None`` is left out.
        **attributes: By name, with underscores for hyphens and one more behind names that Python keeps for itself;
            ``None`` and ``False`` are left out, ``True`` has no value.

    Returns:
        The element.

    Example:
        >>> html(element("p", "a < b ", element("b", "c"), class_="note", aria_label='"'))
        '<p class="note" aria-label="&quot;">a &lt; b <b>c</b></p>'
    """
    made = Element(tag)
    for name, value in attributes.items():
        if value is not None and value is not False:
            made.set(name.rstrip("_").replace("_", "-"), "" if value is True else str(value))
    for child in children:
        if isinstance(child, str):
            _append_text(made, child)
        elif child is not None:
            made.append(child)
    return made


def _append_text(parent: Element, text: str) -> None:
    if len(parent):
        parent[-1].tail = (parent[-1].tail or "") + text
    else:
        parent.text = (parent.text or "") + text


def html(root: Element) -> str:
    """The element as HTML."""
    return tostring(root, encoding="unicode", method="html")
