"""``make fuzz``: files of every kind that tqai reads, changed at random, through their readers. Seeded.

Each must be refused by a ``TqaiError`` or give finite numbers, in bounded memory and time. ``python tests/fuzz.py [COUNT [SEED]]``
prints a table and exits with 1 where one was not.
"""

from __future__ import annotations

import json
import math
import random
import resource
import sqlite3
import struct
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

OLD = Path(__file__).parent / "old"
MOST_SECONDS, MOST_MIB = 3.0, 600
STRANGE = (
    None, True, -1, 0, 1, 7, 2**31, 2**63, 10**30, 1e308, -1e308, 1e-320, math.nan, math.inf, -math.inf, "", "x", "\0", "\ud800", "../x",
    "<script>alert(1)</script>", [], {}, [[]], [0] * 50, {"name": "x"}, "9" * 500, "fisher:file=/etc/passwd", "turbo:bits=99", "0-99999999",
)  # fmt: skip


def reader_table(folder: Path) -> dict[str, tuple[Path, Callable[[Path], Any]]]:
    """Name -> a good file and what reads such files, to the numbers that come out."""
    import tqai_core as tqai
    from tqai_core.calibrate import run
    from tqai_core.calibrate.file import Calibration
    from tqai_core.calibrate.page import page
    from tqai_core.calibrate.sampler import CalibratedSampler
    from tqai_core.codecs.bases import BasesFile
    from tqai_core.families import entry
    from tqai_core.scorers import fisher

    def config(path: Path) -> Any:
        made = tqai.Config.from_json(path.read_text(errors="surrogateescape"))
        made.build()
        return [len(made.to_json())]

    def family(path: Path) -> Any:
        return [tqai.preset(name, path).build()[2].tau for name in entry.read(path).tolerances]

    def packed(path: Path) -> Any:
        read = tqai.Packed.read(path)
        tqai.Packed.from_bytes(path.read_bytes())
        return tqai.codec(read.codec).decode(read, torch.float32)

    def sampler(path: Path) -> Any:
        made = CalibratedSampler.load(path)
        solver, x = made.solver(), torch.ones(1, 4)
        for i in range(made.steps):
            x = solver.step(i, x * 0.1, x)
        return [x, *made.nodes, *(w for row in made.theta for w in row)]

    def table(path: Path) -> Any:
        scorer = fisher.Fisher(str(path))
        return [
            scorer.score(None, tqai.types.Step(0, 0.5), None),
            torch.tensor(scorer.finer(0, len(fisher.load(str(path))[0]), 0.5)).float(),
            scorer.heads(0, 0.5),
        ]  # type: ignore[arg-type]

    def bases(path: Path) -> Any:
        read, x = BasesFile.load(path), torch.randn(2, 40, 128, generator=torch.Generator().manual_seed(0))
        out: list[Any] = [[basis.matrix, basis.scale] for heads in read.streams.values() for basis in heads if basis is not None]
        codec = tqai.codec({"name": "turbo", "bits": read.bits, "basis": str(path)})
        for name, heads in list(read.streams.items())[:1]:
            if len(heads) in (1, 2) and all(b is None or len(b.matrix) == 128 for b in heads):
                out.append(codec.decode(codec.encode(x[: len(heads)], stream=name)))
        return out

    def calibration(path: Path) -> Any:
        return [*Calibration.load(path).tensors.values(), clean(page(path))]

    def clean(html: str) -> int:
        assert "<script" not in html
        return len(html.encode())

    steps, unfinished = folder / "step.safetensors", folder / "unfinished.safetensors"
    coder, x = tqai.StreamCoder("choice", bits=(4, 3)), torch.randn(2, 40, 16, generator=torch.Generator().manual_seed(2))
    first = coder.encode(x, 1.0)
    coder.encode(x * 0.9, 0.9).write(steps)
    settings = partial_calibration(unfinished)

    def stream(path: Path) -> Any:
        return coder.decode([first, tqai.Packed.read(path)])

    def resume(path: Path) -> Any:
        moments, sums, done = run._resume(path, settings, SimpleNamespace())  # type: ignore[arg-type]
        return [*moments.sums.values(), *vars(sums).values(), done]

    calibrated = OLD / "calibration.safetensors"
    pairs = [
        ("config", "config.json", config), ("config of a cache", "config_kv.json", config), ("packed", "packed.safetensors", packed),
        ("packed, trellis", "packed_trellis.safetensors", packed), ("packed, exact", "packed_exact.safetensors", packed),
        ("step of a stream", steps, stream), ("sampler", "sampler.json", sampler), ("fisher table", calibrated, table),
        ("family entry", "family.json", family), ("bases", calibrated, bases), ("calibration", calibrated, calibration),
        ("unfinished", unfinished, resume), ("study, JSON", "study.json", lambda path: clean(page(path))),
        ("study, SQLite", "study.db", lambda path: clean(page(path))),
        *((f"cache{kind}", f"cache{kind}.safetensors", cache) for kind in ("", "_palm", "_window", "_tiered")),
    ]  # fmt: skip
    return {name: (OLD / path, read) for name, path, read in pairs}


def partial_calibration(path: Path) -> dict[str, Any]:
    """Writes what a calibration that was stopped leaves behind, and gives the settings that it was begun with."""
    from tqai_core.calibrate import basis, fisher, run

    moments, g = basis.Moments(), torch.Generator().manual_seed(3)
    moments.see(0, *(torch.randn(1, 2, 20, 16, generator=g) for _ in "qkv"))
    settings = {
        "model": "0" * 16, "class": "X", "kind": "diffusion", "family": "flux", "seeds": [100, 101], "probes": 1, "codec": "turbo",
        "basis_bits": 4, "average": 3, "steps": 4,
    }  # fmt: skip
    run._keep(path, settings, moments, fisher.Sums(1, 2, 2), 1, (0.9, 0.4))
    return settings


def lm_config() -> Any:
    """Of the model that the caches in ``old`` belong to."""
    from transformers import Qwen2Config

    return Qwen2Config(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=32
    )


def cache(path: Path) -> Any:
    """Reads a cache, its dense values and an attention to it, and goes on with it."""
    import tqai_core as tqai
    from tqai_core.attention.packed import attend

    made, g = tqai.KVCache.load(path, lm_config()), torch.Generator().manual_seed(0)
    out: list[Any] = []
    for layer in made.packed_layers:
        if layer.kv.length and layer.kv.exact[0].shape[:2] == (1, 2):
            out += [layer.kv.dense("k"), layer.kv.dense("v")]
            query = torch.randn(1, 4, 1, 32, generator=g).to(layer.kv.exact[0].dtype)
            out.append(attend(query, layer.kv, scaling=0.2))
    made.crop(-1) if made.get_seq_length() else None
    made.report()
    return out


# -- changes


def change(blob: bytes, r: random.Random) -> bytes:
    """``blob`` with one fault, sometimes two."""
    for _ in range(1 if r.random() < 0.8 else 2):
        blob = _once(blob, r)
    return blob


def _once(blob: bytes, r: random.Random) -> bytes:
    kind = r.random()
    if kind < 0.12:
        at = r.randrange(len(blob) + 1)
        return blob[:at]
    if kind < 0.35:
        out = bytearray(blob)
        for _ in range(r.choice((1, 1, 1, 4, 32))):
            if out:
                out[r.randrange(len(out))] ^= 1 << r.randrange(8)
        return bytes(out)
    if kind < 0.4:
        at = r.randrange(len(blob) + 1)
        return blob[:at] + bytes(r.randrange(256) for _ in range(r.randrange(1, 40))) + blob[at:]
    if blob[:6] == b"SQLite":
        return _sqlite(blob, r)
    return _json(blob, r) if blob[:1] == b"{" else _tensors(blob, r)


def _json(blob: bytes, r: random.Random) -> bytes:
    try:
        return json.dumps(_field(json.loads(blob), r)).replace('"@deep@"', _deep(r)).encode()
    except (ValueError, RecursionError, UnicodeError):
        return blob


def _deep(r: random.Random) -> str:
    depth = r.choice((5, 40, 1000, 20_000))
    return "[" * depth + "]" * depth if r.random() < 0.5 else '{"a":' * depth + "1" + "}" * depth


def _field(data: Any, r: random.Random) -> Any:
    """One value somewhere in ``data`` replaced, removed, added, or swapped with another."""
    places: list[tuple[Any, Any]] = []

    def walk(x: Any) -> None:
        for key in list(x) if isinstance(x, dict) else range(len(x)) if isinstance(x, list) else ():
            places.append((x, key))
            walk(x[key])

    walk(data)
    if not places:
        return r.choice(STRANGE)
    (inside, key), how = r.choice(places), r.random()
    if how < 0.5:
        inside[key] = r.choice(STRANGE)
    elif how < 0.6:
        inside[key] = "@deep@"
    elif how < 0.7:
        del inside[key]
    elif how < 0.8 and isinstance(inside, dict):
        inside[r.choice(("x", "name", "bits", "file", key + "_"))] = r.choice(STRANGE)
    elif how < 0.9:
        (other, its), mine = r.choice(places), inside[key]
        if json.dumps(mine).count("[") + json.dumps(other[its]).count("[") < 40:  # no list may come to lie in itself
            inside[key], other[its] = json.loads(json.dumps(other[its])), json.loads(json.dumps(mine))
    elif isinstance(inside[key], (int, float)):
        inside[key] = inside[key] * r.choice((-1, 2, 1e-9, 1e9)) + r.choice((0, 1, -1))
    elif isinstance(inside[key], list):
        inside[key] = inside[key] * r.choice((0, 2, 300))
    return data


def _tensors(blob: bytes, r: random.Random) -> bytes:
    """A field of the header, of the JSON in its metadata, or a number of a tensor."""
    try:
        size = int.from_bytes(blob[:8], "little")
        header, data = json.loads(blob[8 : 8 + size]), bytearray(blob[8 + size :])
        names = [name for name in header if name != "__metadata__"]
        how = r.random()
        if how < 0.4:
            field = r.choice(list(header["__metadata__"]))
            header["__metadata__"][field] = _json(header["__metadata__"][field].encode(), r).decode()
        elif how < 0.55:
            return _resized(json.dumps(_field(header, r)).replace('"@deep@"', _deep(r)).encode(), data)
        elif how < 0.65:  # another shape of as many numbers, or another dtype of as many bytes
            x = header[r.choice(names)]
            if r.random() < 0.5:
                r.shuffle(x["shape"])
            else:
                x["shape"] = r.choice(([math.prod(x["shape"])], [1, *x["shape"]], [*x["shape"], 1], [0, 2**40, *x["shape"]]))
        elif how < 0.7:
            x = header[r.choice(names)]
            same = [d for d in (("BF16", "F16", "I16", "U16"), ("F32", "I32"), ("U8", "I8", "BOOL"), ("F64", "I64")) if x["dtype"] in d]
            x["dtype"] = r.choice(same[0])
        elif how < 0.8 and len(names) > 1:
            a, b = r.sample(names, 2)
            header[a], header[b] = header[b], header[a]
        elif how < 0.85:
            header[r.choice(("x", "layers.0.segments.1.codes_k", "layers.9.keys"))] = header.pop(r.choice(names))
        else:
            x = header[r.choice(names)]
            begin, end = x["data_offsets"]
            pattern = {"F32": struct.pack("<f", r.choice((math.nan, math.inf, -math.inf, 3e38, -1.0, 0.0, 1e-40)))}.get(
                x["dtype"], r.choice((b"\xc0\x7f", b"\x80\x7f", b"\x80\xff", b"\x7f\x7f", b"\x00\x00", b"\xff\xff"))
            )
            whole = r.random() < 0.2
            at = begin if whole else begin + r.randrange(max((end - begin) // len(pattern), 1)) * len(pattern)
            count = (end - begin) // len(pattern) if whole else 1
            data[at : at + count * len(pattern)] = pattern * count
        return _resized(json.dumps(header).encode(), data)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError, UnicodeError):
        return blob[: len(blob) // 2]


def _resized(header: bytes, data: bytes | bytearray) -> bytes:
    return len(header).to_bytes(8, "little") + header + bytes(data)


def _sqlite(blob: bytes, r: random.Random) -> bytes:
    """A value of a row, or the schema."""
    try:
        with closing(sqlite3.connect(":memory:")) as database:
            database.deserialize(blob)
            _alter(database, r)
            database.commit()
            return database.serialize()
    except (sqlite3.Error, IndexError, OverflowError, UnicodeError):
        return blob


def _alter(database: sqlite3.Connection, r: random.Random) -> None:
    tables = [name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name")]
    table = r.choice([name for name in tables if "attributes" in name] if r.random() < 0.5 else tables)
    how = r.random()
    if how < 0.1:
        database.execute(r.choice((f"DROP TABLE {table}", f"ALTER TABLE {table} RENAME TO x", f"DELETE FROM {table}")))
    elif how < 0.15:
        database.execute(f"CREATE VIEW x AS SELECT * FROM {table}")
    elif how < 0.2:
        database.execute(f"CREATE TRIGGER x AFTER INSERT ON {table} BEGIN DELETE FROM {table}; END")
    else:
        column = r.choice([row[1] for row in database.execute(f"PRAGMA table_info({table})")])
        row, value = r.choice(database.execute(f"SELECT rowid, {column} FROM {table} ORDER BY rowid").fetchall())
        new = _json(value.encode(), r).decode() if isinstance(value, str) and value[:1] in "[{" else r.choice(STRANGE[:20])
        database.execute(f"UPDATE {table} SET {column} = ? WHERE rowid = ?", (new, row))


# -- the run


def all_finite(x: Any) -> bool:
    if isinstance(x, torch.Tensor):
        return bool(x.double().isfinite().all())
    if isinstance(x, (list, tuple)):
        return all(map(all_finite, x))
    return not isinstance(x, float) or math.isfinite(x)


def run(count: int, seed: int, folder: Path, tell: Callable[[str], None] = print) -> dict[str, Any]:
    """Counts by reader, and what went wrong: exceptions that are no TqaiError, values that are not finite, the slowest, the peak."""
    from tqai_core.errors import TqaiError

    readers = reader_table(folder)
    weight = {"config": 8, "config of a cache": 4, "packed": 6, "packed, trellis": 3, "packed, exact": 2, "sampler": 4, "study, JSON": 4}
    names = [name for name in readers for _ in range(weight.get(name, 2))]
    blobs = {name: path.read_bytes() for name, (path, _) in readers.items()}
    for name, (path, read) in readers.items():
        assert all_finite(read(path)), name
    r, faults, counts = random.Random(seed), [], {name: Counter() for name in readers}
    slowest, began = (0.0, ""), time.process_time()
    for n in range(count):
        name = r.choice(names)
        path = folder / f"{n % 8}{readers[name][0].suffix}"
        path.unlink(missing_ok=True)
        path.write_bytes(change(blobs[name], r))
        start = time.process_time()
        try:
            finite = all_finite(readers[name][1](path))
            counts[name]["taken"] += 1
            if not finite:
                faults.append(f"{name} {n}: a value that is not finite was taken")
        except TqaiError:
            counts[name]["refused"] += 1
        except Exception as error:
            faults.append(f"{name} {n}: {type(error).__name__}: {str(error)[:160]}")
        slowest = max(slowest, (time.process_time() - start, f"{name} {n}"))
    peak = _peak()
    for name, found in counts.items():
        tell(f"{name:20} {sum(found.values()):6} files, {found['refused']:6} refused, {found['taken']:6} taken")
    tell(f"{count} files, seed {seed}: {len(faults)} faults, slowest {slowest[0]:.2f} s ({slowest[1]}), peak {peak:.0f} MiB, "
         f"{time.process_time() - began:.0f} CPU s")  # fmt: skip
    return {"faults": faults, "seconds": slowest[0], "mib": peak}


def _peak() -> float:
    """MiB of this program at most. On Linux ru_maxrss has what the process that started it held, too."""
    from tqai_core.peak import status

    try:
        return status("VmHWM:") / 2**20
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def main() -> int:
    import tempfile

    count, seed = (int(text) for text in (sys.argv[1:] + ["50000", "0"][len(sys.argv) - 1 :])[:2])
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = run(count, seed, Path(folder))
    for fault, times in Counter(found["faults"]).most_common(40):
        print(f"  {times} x {fault}")
    return int(bool(found["faults"]) or found["seconds"] > MOST_SECONDS or found["mib"] > MOST_MIB)


if __name__ == "__main__":
    sys.exit(main())
