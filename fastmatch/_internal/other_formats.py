"""Files that are called like weights and hold something else, told by how they begin."""

from __future__ import annotations

import zipfile
from pathlib import Path

__all__ = ["other_format"]

FORMATS = {
    b"version https://git-lfs": "a pointer of Git LFS; `git lfs pull` fetches the file",
    b"<!doctype": "a web page; download the file itself",
    b"<html": "a web page; download the file itself",
    b"gguf": "a GGUF file, which is not read here; give the weights that it was made from",
    b"\x89hdf": "an HDF5 file; load it where it was made, and save its tensors as .safetensors",
    b"\x93numpy": "a NumPy file; save its arrays as tensors in a .safetensors file",
    b"\x1f\x8b": "compressed by gzip; unpack it",
}
"""How files begin, in lower case, and what they are."""

TORCH, SAFETENSORS, UNKNOWN = "a torch file", "a safetensors file", "of no format that is known here"

LONGEST = 100_000_000
"""Bytes of a header that the safetensors library takes."""

CUT = "it begins like one and has no end: it was cut off, or is still being written"


def other_format(path: Path, expected: str) -> str:
    """Return what a file is that does not begin like one of the format it is called after; empty for one that does.

    Args:
        path: the file.
        expected: the format: :data:`TORCH` or :data:`SAFETENSORS`.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(256)
    found, header = _format_of(head), 8 + int.from_bytes(head[:8], "little")
    is_cut = header > size if expected == SAFETENSORS else head.startswith(b"PK") and not _has_end(path)
    if found == expected:
        return CUT if is_cut else ""
    if expected == SAFETENSORS and found == UNKNOWN and header <= size:
        return ""  # of the header the library says what is wrong
    renamed = {
        TORCH: "; give it a name that ends in .pt",
        SAFETENSORS: "; give it a name that ends in .safetensors",
    }
    return f"it is {found}{renamed.get(found, '')}"


def _format_of(head: bytes) -> str:
    if head.startswith((b"PK", b"\x80")):  # a zip archive or a pickle
        return TORCH
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= LONGEST:
        return SAFETENSORS
    if not head:
        return "empty; download or write it again"
    begin = head.lstrip().lower()
    known = next((what for start, what in FORMATS.items() if begin.startswith(start)), None)
    if known is None and head.isascii() and "".join(head.decode().split()).isprintable():
        line = head.decode().strip().partition("\n")[0]
        known = f"text that begins with {line[:40]!r}; give the file of weights itself"
    return known or UNKNOWN


def _has_end(path: Path) -> bool:
    """Return whether a zip archive has an end, be it a damaged one."""
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:
        return True
