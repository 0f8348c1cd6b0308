"""Pieces of the page that every section is made of."""

from __future__ import annotations

from html import escape


def esc(value: object) -> str:
    """Text that cannot become markup."""
    return escape(str(value))


def section(title: str, note: str, body: str) -> str:
    """A titled part of the page; `body` is markup."""
    return (
        f'<section class="wrap"><header><h2>{esc(title)}</h2><p>{esc(note)}</p></header>'
        f'<div class="body">{body}</div></section>\n'
    )
