"""Texts of others (names, ids, errors) inside Markdown: they show as they are, and mean nothing."""

from __future__ import annotations

import re


_SPECIAL = re.compile(r"([\\`*_\[\]<>#!|~&$@/]|(?<=www)\.)", re.IGNORECASE)
_NO_LETTERS = re.compile(r"[\s\x00-\x1f\x7f-\x9f]+")


def code_span(text):
    """A text in the type of code, on one line.

    It is put between more backticks than it has in a row, which is CommonMark's rule; a backslash wouldn't do.

    Example:
        >>> code_span("a/b.png"), code_span("a`b"), code_span("`")
        ('`a/b.png`', '``a`b``', '`` ` ``')
    """
    text = _on_one_line(text) or " "
    ticks = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    room = " " if text.strip() and (text[0] in "` " or text[-1] in "` ") else ""
    return f"{ticks}{room}{text}{room}{ticks}"


def plain_text(text):
    r"""A text inside a sentence, on one line: no emphasis, links, pictures, HTML or formulas come of it.

    Example:
        >>> plain_text("![x](http://a.b) <i>")
        '\\!\\[x\\](http:\\/\\/a.b) \\<i\\>'
    """
    return _SPECIAL.sub(r"\\\1", _on_one_line(text))


def _on_one_line(text):
    return _NO_LETTERS.sub(" ", str(text))


__all__ = ["code_span", "plain_text"]
