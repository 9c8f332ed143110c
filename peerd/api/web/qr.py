"""Makes QR codes, of which users need one to pass a link to a phone or another machine."""

from __future__ import annotations

from functools import lru_cache

# A daemon has few models, and its addresses change seldom.
_KEPT_CODES = 16


@lru_cache(_KEPT_CODES)
def qr_rows(text: str) -> tuple[str, ...] | None:
    """The QR code of a text, a row of 0 and 1 (dark) for each line, without a border. None if there is no library for
    it, or the text is too long.
    """
    try:
        import segno
    except ImportError:
        return None
    try:
        code = segno.make(text, micro=False, error="l", boost_error=False)
    except segno.DataOverflowError:
        return None
    return tuple("".join("1" if dark else "0" for dark in row) for row in code.matrix)
