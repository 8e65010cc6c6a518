"""Blocks by name in a folder that several engines share: whole or not there, bounded by bytes, the least recently read thrown out first.

A block is written under another name and then renamed, so no reader ever sees a part of it. Writers know of each other by the folder
alone: each of them looks at all files once it has written 1/32 of the limit, and throws out files, oldest read first, while they
hold more than 7/8 of it, down to 3/4. So four writers never exceed the limit, and each further one by 1/32 at most.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from ..errors import TqaiError

STALE = 3600.0  # seconds after which a file that was never renamed is a dead writer's
LOOK, FULL, KEEP = 32, 7 / 8, 3 / 4  # of the limit
PART = ".part"


class BlockStore:
    """Blocks of one format in ``folder/format name``. ``limit_bytes`` bounds the whole folder, other formats included; 0: no bound."""

    def __init__(self, folder: str | Path, name: str, limit_bytes: int = 0) -> None:
        if limit_bytes < 0:
            raise TqaiError(f"limit_bytes={limit_bytes} of a block store: give the most bytes that it may hold, 0 for no limit")
        self.folder, self.root, self.limit = Path(folder).expanduser(), Path(folder).expanduser() / name, limit_bytes
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TqaiError(f"block store {str(folder)!r} cannot be written ({error.strerror}): give a folder of your own") from None
        self.evicted = 0  # blocks that this writer threw out
        self._lock = threading.Lock()
        self._written = 0  # bytes since the files were last looked at
        if limit_bytes:
            self._bound()

    def path(self, name: str) -> Path:
        """Where a block is; names are hexadecimal and do not leave the folder."""
        if not name or not set(name) <= set("0123456789abcdef_-"):
            raise TqaiError(f"{name!r} is no name of a block")
        return self.root / name[:2] / name

    def has(self, name: str) -> bool:
        return os.path.exists(self.path(name))

    def get(self, name: str) -> bytearray | None:
        """The bytes, and the block is the one read last now; None where it is not there."""
        path = self.path(name)
        try:
            with open(path, "rb", buffering=0) as file:
                data = bytearray(os.fstat(file.fileno()).st_size)
                read = file.readinto(data)
            os.utime(path)
        except OSError:
            return None
        return data[:read] if read != len(data) else data

    def put(self, name: str, data: bytes | bytearray) -> None:
        """Write a block, in place of one of this name. OSError where the disk does not take it."""
        path = self.path(name)
        part = path.with_name(f"{uuid.uuid4().hex}{PART}")
        try:
            try:
                part.write_bytes(data)
            except FileNotFoundError:
                path.parent.mkdir(parents=True, exist_ok=True)
                part.write_bytes(data)
            os.replace(part, path)
        except OSError:
            with contextlib.suppress(OSError):
                part.unlink()
            raise
        if not self.limit:
            return
        with self._lock:
            self._written += len(data)
            if self._written * LOOK >= self.limit:
                self._bound()

    def drop(self, name: str) -> None:
        """Remove a block, if it is there."""
        with contextlib.suppress(OSError):
            self.path(name).unlink()

    @property
    def nbytes(self) -> int:
        """Bytes of all files in the folder, whoever wrote them."""
        return sum(size for _, size, _ in self._files())

    def _files(self) -> Iterator[tuple[float, int, str]]:
        """Time of the last reading, bytes and path of every file; what other writers remove meanwhile is left out."""
        folders = [str(self.folder)]
        while folders:
            with contextlib.suppress(OSError), os.scandir(folders.pop()) as found:
                for entry in found:
                    with contextlib.suppress(OSError):
                        if entry.is_dir(follow_symlinks=False):
                            folders.append(entry.path)
                        elif entry.is_file(follow_symlinks=False):
                            info = entry.stat()
                            yield info.st_mtime, info.st_size, entry.path

    def _bound(self) -> None:
        files, now = [], time.time()
        for read, size, path in self._files():
            if path.endswith(PART) and now - read > STALE:
                with contextlib.suppress(OSError):
                    os.unlink(path)
            else:
                files.append((read, size, path))
        self._written, held = 0, sum(size for _, size, _ in files)
        if held <= self.limit * FULL:
            return
        for _, size, path in sorted(files):
            if held <= self.limit * KEEP:
                break
            if not path.endswith(PART):
                with contextlib.suppress(OSError):
                    os.unlink(path)
                    self.evicted += 1
                held -= size
