"""Real text that is on every machine: the sources and documentation of Python's own standard library, as bytes."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

# `pydoc_data` holds the language reference; docstrings are the library's.
SUFFIXES = {".py", ".txt"}
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
# One file of so many is for validation.
VALIDATION = 20
# Between files; no text holds it.
END = b"\0"


@dataclass(frozen=True, eq=False)
class Text:
    """Bytes [N] (uint8) to train on and to validate with, of whole files each."""

    train: torch.Tensor
    validation: torch.Tensor


def stdlib_text() -> Text:
    """Every source and text file of the running Python, in the order of their paths. Raises OSError where none is."""
    root = Path(sysconfig.get_path("stdlib"))
    files = [path.read_bytes() for path in _texts(root)]
    if len(files) < VALIDATION:
        raise OSError(f"expected the sources of Python's standard library in {root}, found {len(files)} files")
    kept_back = files[VALIDATION - 1 :: VALIDATION]
    return Text(_joined([f for at, f in enumerate(files, 1) if at % VALIDATION]), _joined(kept_back))


def batch(text: torch.Tensor, rows: int, length: int, generator: torch.Generator) -> torch.Tensor:
    """Tokens [rows, length] (int64): pieces of `text` that start at random places."""
    starts = torch.randint(len(text) - length + 1, (rows, 1), generator=generator)
    return text[starts + torch.arange(length)].long()


def _texts(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.is_dir() and path.name not in LEFT_OUT:
            yield from _texts(path)
        if path.suffix in SUFFIXES and path.is_file():
            yield path


def _joined(files: list[bytes]) -> torch.Tensor:
    return torch.frombuffer(bytearray(END.join(files)), dtype=torch.uint8)
