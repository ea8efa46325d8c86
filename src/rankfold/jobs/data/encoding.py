"""Bytes to text, or a message that says where they stop being text and what to type."""

import encodings.aliases

from rankfold.errors import DataError, UnknownName

__all__ = ["decode"]

_MARKS = {b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16", b"\x28\xb5\x2f\xfd": "", b"\x1f\x8b": "", b"PK\x03\x04": ""}


def decode(data: bytes, source: str, encoding: str | None = None) -> str:
    """The text of `data`: UTF-8 with or without a byte order mark, or the `encoding` that is named.

    Raises DataError with the offset of the first byte that does not fit, and UnknownName for an unknown encoding.

    >>> decode("naïve".encode("iso-8859-1"), "old.csv", encoding="iso-8859-1")
    'naïve'
    >>> decode("naïve".encode("iso-8859-1"), "old.csv")
    Traceback (most recent call last):
    ...
    rankfold.errors.DataError: old.csv: not UTF-8: byte 0xEF at offset 2 (line 1)
      if it is in another encoding, name it: --encoding iso-8859-1
    """
    try:
        return data.decode(encoding or "utf-8-sig")
    except UnicodeDecodeError as cause:
        offset, name = cause.start, (encoding or "UTF-8")
        place = f"byte 0x{data[offset]:02X} at offset {offset:,} (line {data[:offset].count(10) + 1:,})"
        raise DataError(f"{source}: not {name}: {place}\n  {_advice(data, encoding)}") from None
    except UnicodeError as cause:  # codecs without an offset of their own, for instance utf-16 of odd length
        raise DataError(f"{source}: not {encoding}: {cause}\n  {_advice(data, encoding)}") from None
    except (LookupError, ValueError):  # ValueError: a null character in the name
        raise UnknownName.of("encoding", str(encoding), set(encodings.aliases.aliases.values())) from None


def _advice(data: bytes, encoding: str | None) -> str:
    for mark, name in _MARKS.items():
        if data.startswith(mark) and not name:
            return "it looks like a compressed file; unpack it first"
        if data.startswith(mark) and encoding is None:
            return f"its first bytes are those of {name}: --encoding {name}"
    return "if it is in another encoding, name it: --encoding " + ("iso-8859-1" if encoding is None else "NAME")
