"""Real text without a download: the Python sources on this machine, as bytes, packed into long rows.

A row of `seq_len` bytes holds several documents one after the other, and ``cu_seqlens`` says where each of them begins::

    tokens      i m p o r t | d e f | c l a s s      three documents, the last one cut to fill the row
    positions   0 1 2 3 4 5 | 0 1 2 | 0 1 2 3 4      begin again in each document
    targets     m p o r t - | e f - | l a s s -      the next byte; the last of a document has none
    cu_seqlens  0             6       9         14
"""

from __future__ import annotations

import random
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

IGNORED = -100
"""The target of a byte that has no next byte in its document; `torch.nn.functional.cross_entropy` skips it by default."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One packed row of `S` bytes.

    Attributes:
        tokens: int64 ``[1, S]``, the bytes.
        targets: int64 ``[1, S]``, the byte to predict at each place, or `IGNORED`.
        positions: int64 ``[1, S]``, the place of each byte in its document.
        cu_seqlens: int32 ``[documents + 1]``, the start of each document and the end of the row; planning reads
            it on the host, so it stays on the CPU.
        num_targets: number of targets that are not `IGNORED`.
    """

    tokens: Tensor
    targets: Tensor
    positions: Tensor
    cu_seqlens: Tensor
    num_targets: int


def packed_rows(seq_len: int) -> Iterator[Batch]:
    """Rows of `seq_len` bytes without end: the same on every rank, and from one run to the next on one machine.

    A document is the beginning of one source file, of a random length up to half a row: the boundaries of documents and of
    shards do not coincide, as they would not in real data. What does not fit into a row is dropped.

    Raises:
        FileNotFoundError: this Python came without the sources of its standard library.
    """
    documents = _documents(_source_files(), seq_len)
    while True:
        lengths, room = [], seq_len
        row = np.empty(seq_len, dtype=np.int64)
        while room:
            document = next(documents)[:room]
            row[seq_len - room : seq_len - room + len(document)] = document
            lengths.append(len(document))
            room -= len(document)
        yield _batch(row, lengths)


def _source_files() -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    installed = {"site-packages", "dist-packages"}  # may lie inside, and are not the standard library
    files = sorted(path for path in root.rglob("*.py") if installed.isdisjoint(path.relative_to(root).parts))
    files = [path for path in files if path.stat().st_size > 1]
    if not files:
        raise FileNotFoundError(f"no Python source files under {root}: install the standard library's sources to train on them")
    return files


def _documents(files: list[Path], seq_len: int) -> Iterator[np.ndarray]:
    generator = random.Random(0)
    while True:
        generator.shuffle(files)  # neighbours by name are alike, and the loss would follow them up and down
        for path in files:
            with path.open("rb") as file:
                yield np.frombuffer(file.read(generator.randint(2, seq_len // 2)), dtype=np.uint8)


def _batch(row: np.ndarray, lengths: list[int]) -> Batch:
    cu_seqlens = np.cumsum([0, *lengths])
    targets = np.roll(row, -1)
    targets[cu_seqlens[1:] - 1] = IGNORED
    positions = np.concatenate([np.arange(length) for length in lengths])
    return Batch(
        tokens=torch.from_numpy(row)[None],
        targets=torch.from_numpy(targets)[None],
        positions=torch.from_numpy(positions)[None],
        cu_seqlens=torch.from_numpy(cu_seqlens.astype(np.int32)),
        num_targets=len(row) - len(lengths),
    )
