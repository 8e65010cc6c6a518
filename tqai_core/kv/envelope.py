"""A block of a cache as bytes that stand for themselves: what they are, how long, of whom, and a checksum.

::

  magic 4s | version u16 | flags u16 | header u32 | payload u64 | crc32 u32 | keyed hash 16s     little-endian, 40 bytes
  header: JSON, padded with spaces, so that the payload begins at a multiple of 64 bytes
  payload

The checksum covers all of it and the name under which the block is stored, so that a block under another's name is a miss too. CRC-32
finds accidents. Where others can write to a store, a secret makes a keyed hash (BLAKE2b) of the same bytes, which finds forgery.
The header has every number that changes the meaning of the payload; a hash of it names the folder. Two headers are compared as bytes:
nothing is parsed, but to say what differs.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..errors import TqaiError
from ..files import checked, parse_json

MAGIC, VERSION = b"TQKV", 1
FIRST, KEYED = 1, 2  # flags: block 0 of a sequence; the keyed hash is there
FIXED = struct.Struct("<4sHHIQ")  # what stands before the checksums
SUMS = struct.Struct("<I16s")
PREFIX, ALIGN = FIXED.size + SUMS.size, 64
MOST_HEADER = 1 << 20


class Miss(TqaiError):
    """These bytes are not the block that was asked for. The text says why; the block is computed again."""


@dataclass(frozen=True)
class Envelope:
    """Seals and opens the blocks of one header. ``secret``: key of the hash, 1 to 64 bytes; empty for none."""

    fields: Mapping[str, Any]
    secret: bytes = b""

    @cached_property
    def header(self) -> bytes:
        text = json.dumps({**self.fields, "version": VERSION, "keyed": bool(self.secret)}, sort_keys=True, separators=(",", ":")).encode()
        return text + b" " * (-(PREFIX + len(text)) % ALIGN)

    @cached_property
    def name(self) -> str:
        """Of the folder: other settings never meet."""
        return hashlib.sha256(self.header).hexdigest()[:20]

    @property
    def overhead(self) -> int:
        """Bytes beside the payload."""
        return PREFIX + len(self.header)

    def seal(self, payload: bytearray, key: bytes, first: bool) -> None:
        """Fill in the head of ``payload``, whose first ``overhead`` bytes are free."""
        head = FIXED.pack(MAGIC, VERSION, FIRST * first | KEYED * bool(self.secret), len(self.header), len(payload) - self.overhead)
        payload[: FIXED.size] = head
        payload[PREFIX : self.overhead] = self.header
        payload[FIXED.size : PREFIX] = SUMS.pack(*self._sums(payload, key))

    def open(self, data: bytes | bytearray, key: bytes) -> tuple[memoryview, bool]:
        """The payload, and whether the block is the first of a sequence. Raises :class:`Miss`."""
        if len(data) < PREFIX:
            raise Miss(f"cut short: {len(data)} bytes")
        magic, version, flags, header, payload = FIXED.unpack_from(data)
        if magic != MAGIC:
            raise Miss("not a block of tqai")
        if version != VERSION:
            raise Miss(f"version {version} of the format, this tqai reads {VERSION}")
        if header > MOST_HEADER or len(data) != PREFIX + header + payload:
            raise Miss(f"cut short or too long: {len(data):,} bytes, {PREFIX + header + payload:,} were written")
        if data[PREFIX : PREFIX + header] != self.header:
            raise Miss(self._difference(bytes(data[PREFIX : PREFIX + header])))
        crc, keyed = self._sums(data, key)
        found = SUMS.unpack_from(data, FIXED.size)
        if found[0] != crc:
            raise Miss("damaged, or stored under another block's name: its checksum is not that of its bytes")
        if not hmac.compare_digest(found[1], keyed):
            raise Miss("not written by a holder of the store's secret" if self.secret else "damaged: it has a keyed hash")
        return memoryview(data)[self.overhead :], bool(flags & FIRST)

    @staticmethod
    def length(data: bytes | bytearray | memoryview) -> int:
        """Bytes of the block that ``data`` begins with, by what it says of itself; 0 where it says nothing. For buffers that are longer."""
        if len(data) < PREFIX:
            return 0
        _, _, _, header, payload = FIXED.unpack_from(data)
        return min(PREFIX + header + payload, len(data))

    def _sums(self, data: bytes | bytearray, key: bytes) -> tuple[int, bytes]:
        view = memoryview(data)
        parts = (key, view[: FIXED.size], view[PREFIX:])
        crc = 0
        for part in parts:
            crc = zlib.crc32(part, crc)
        if not self.secret:
            return crc, bytes(16)
        keyed = hashlib.blake2b(len(key).to_bytes(8, "little"), key=self.secret, digest_size=16)
        for part in parts:
            keyed.update(part)
        return crc, keyed.digest()

    def _difference(self, other: bytes) -> str:
        """Which field of another header is not ours."""
        told = {"what": "header of a block", "again": "it is computed again"}
        try:
            theirs = checked("Block", parse_json(other, **told, most=MOST_HEADER), **told)
        except TqaiError as error:
            return f"damaged: {error}"
        ours = json.loads(self.header)
        names = sorted(name for name in {*ours, *theirs} if ours.get(name) != theirs.get(name))
        told_of = "; ".join(f"{name} is {str(theirs.get(name))[:60]}, here {str(ours.get(name))[:60]}" for name in names)
        return f"made by another model or with other settings: {told_of or 'its header is written otherwise'}"
