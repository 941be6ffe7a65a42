"""Markdown in which names that users gave are shown and do nothing."""

from __future__ import annotations

import re
from collections.abc import Sequence

from prune_dn.base.console import plain


def in_markdown(text: object) -> str:
    """Text as it is, in one line: no markup, no HTML, no further cell of a table.

    >>> in_markdown("a|b `c` <d>")
    'a\\\\|b \\\\`c\\\\` \\\\<d\\\\>'
    """
    return re.sub(r"([\\`|<>*\[\]])", r"\\\1", plain(text))


def code(text: object) -> str:
    """Text as a code span, whatever backticks are in it.

    >>> code("a `b`")
    '`` a `b` ``'
    """
    shown = plain(text)
    fence = "`" * (1 + max(map(len, re.findall("`+", shown)), default=0))
    return f"{fence}{shown}{fence}" if len(fence) == 1 else f"{fence} {shown} {fence}"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table: the first column to the left, the rest to the right."""
    lines = ["| " + " | ".join(header) + " |", "|---" + "|---:" * (len(header) - 1) + "|"]
    lines += ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return "\n".join(lines)
