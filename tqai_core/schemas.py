"""What the JSON of every file that tqai reads may hold: fields, types, ranges, counts. :func:`tqai_core.files.checked` applies them.

Pydantic 2 in strict mode: no text becomes a number, no unknown field passes, every number is finite. A field is a type, or a pair
of a type and the default of one that may be missing.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, create_model

STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
Count = Annotated[int, Field(ge=0, le=2**31 - 1)]
Positive = Annotated[int, Field(ge=1, le=2**31 - 1)]
Size = Annotated[int, Field(ge=0, le=2**40)]
Bits = Annotated[int, Field(ge=0, le=8)]
Width = Annotated[int, Field(ge=1, le=8)]
Number = Annotated[float, Field(ge=-1e15, le=1e15, allow_inf_nan=False)]
Amount = Annotated[float, Field(ge=0, le=1e15, allow_inf_nan=False)]
Name = Annotated[str, Field(max_length=200)]
Text = Annotated[str, Field(max_length=4096)]
Scalar = bool | int | Number | Text | None


def some(kind: Any, most: int, least: int = 0) -> Any:
    """A list of ``least`` to ``most`` of a kind."""
    return Annotated[list[kind], Field(min_length=least, max_length=most)]


def named(kind: Any, most: int) -> Any:
    """At most so many of a kind by their names."""
    return Annotated[dict[Name, kind], Field(max_length=most)]


def record(rules: ConfigDict = STRICT, /, **fields: Any) -> Any:
    """An object with these fields."""
    given: dict[str, Any] = {name: kind if isinstance(kind, tuple) else (kind, ...) for name, kind in fields.items()}
    return create_model("record", __config__=rules, **given)


Pairs = named(Scalar | some(Scalar, 1000), 100)
ModelConfig = TypeAdapter(Pairs, config=ConfigDict(strict=True, allow_inf_nan=False))
Layers, Seeds, Sizes, Steps = some(int | Name, 10_000), some(int, 10_000), some(Size, 16), some(Number, 1000, 1)
Versions = named(Name | int, 100)

# Config JSON, and the dict that people write by hand; ranges are Config's own
ROLES = ("scorer", "strategy", "monitor", "codec")
Pipeline = record(
    **dict.fromkeys(ROLES, (Text | Pairs | None, None)), **{f"{role}_kwargs": (Pairs | None, None) for role in ROLES},
    level=(Name, "model"), skip_layers=(Layers | int | Text, ""), version=(int, 1),
    **dict.fromkeys(("sink", "recent", "protect", "calibrate"), (int, 0)), offload=(bool, False), half_size=(float, 0.0),
)  # fmt: skip

# packed tensors; meta of a packed step of a stream, beside what its codec writes
Packed = record(format=Positive, codec=Text, shape=Sizes, meta=named(Scalar, 16))
StepMeta = record(
    ConfigDict(strict=True, extra="allow", allow_inf_nan=False),
    at=Number, bits=Bits, key=bool, dtype=Literal["float32", "float16", "bfloat16", "float64"],
)  # fmt: skip

# calibrated samplers
Proof = record(at=Number, error=Amount, stock=Amount)
Stock = record(name=Name, shift=Amount, error=Amount, before_last=Amount)
Sampler = record(
    format=Literal["tqai-sampler"], version=Positive, models=named(Name, 16), model_class=Name, entry=Name | None, grid=Name, nodes=Steps,
    theta=some(some(Number, 16), 1000, 1), form=Literal["all", "last"], calls=Amount, teacher=named(Number, 16), seeds=named(Seeds, 16),
    guidance=record(name=Name, made=Number, low=Number, high=Number, proved=some(Proof, 1000)), shape=Sizes, versions=Versions,
    held_out=record(error=Amount, before_last=Amount, stock=Stock, grids=(named(Amount, 100), {})), difference=(Text | None, None),
)  # fmt: skip

# bases: first coordinate, last + 1 and bits of each run of each head of each stream
Runs = some(some(Count, 3, 3), 1024, 1)
Bases = record(format=Positive, bits=Width, model=Name, streams=named(some(Runs | None, 4096, 1), 10_000))

# calibrations: how they were made, and the verdicts
MEASURED = {
    "format": Positive, "model": Name, "class": Name, "kind": Name, "family": Name, "seeds": Seeds, "probes": Positive, "codec": Name,
    "basis_bits": Width, "average": Bits, "steps": Count | None,
}  # fmt: skip
Loss = record(loss=Amount, bytes=Size)
BitsVerdict = record(
    average=Amount, how=Name, tried=named(Amount, 16), seeds=Seeds, fisher=Loss, uniform=Loss, kept=Literal["fisher", "uniform"],
    key_bits=Amount, value_bits=Amount,
)  # fmt: skip
CacheTrial = record(average=Amount, shared=Amount, uniform=Amount, kept=Literal["shared", "uniform"])
CacheVerdict = record(
    seeds=Seeds, bits=some(CacheTrial, 16), plain=Amount, shaped_k=Amount, shaped_v=(Amount, 0.0), kept=some(Literal["k", "v"], 2),
    share=(Amount, 1.0),
)  # fmt: skip
BasisVerdict = record(klt=Amount, hadamard=Amount, kept=Literal["klt", "hadamard"])
Unfinished = record(**MEASURED, complete=Literal[False], done=Count, sigmas=Steps)
Calibration = record(
    **MEASURED, complete=Literal[True], held_out=int, samples=some(Count, 1000), seconds_cpu=Amount, versions=Versions,
    verdicts=record(bases=named(some(BasisVerdict, 4096), 10_000), bits=BitsVerdict, cache=(CacheVerdict | None, None)),
)  # fmt: skip
# what the scorer ``fisher`` reads of that header; it does not look at the rest
TableHeader = record(ConfigDict(strict=True, extra="ignore"), complete=(bool, False), model=(Name | None, None), family=(Name | None, None))

# studies; Config.from_dict checks the configs in them, as in caches
ConfigDictionary = dict[Name, Any]
ROW = dict.fromkeys(("error", "calls", "bytes", "time"), Amount)
Row = record(**ROW)
Study = record(
    what=Literal["study"], settings=Pairs, trials=some(record(**ROW, trial=Count, config=ConfigDictionary), 100_000),
    budget=record(what=Literal["calls", "bytes", "time"], limit=Annotated[float, Field(gt=0, le=1e15)]), front=some(Count, 100_000),
    layers=some(some(Amount, 2, 2), 10_000), skip_layers=Layers, proof_seeds=(Seeds, []), proof=(record(default=Row, tuned=Row), None),
    kept=(Literal["tuned", "default"], "default"), tuned=(ConfigDictionary, {}), config=(ConfigDictionary, {}), default_fits=(bool, False),
)  # fmt: skip

# families of users
Tolerance = Annotated[float, Field(gt=0, le=10, allow_inf_nan=False)]
FamilyEntry = record(
    format=Literal["tqai-family"], version=Literal[1], name=Name, title=Name, classes=some(Name, 16, 1),
    levels=some(Literal["model"], 1, 1), tolerances=record(quality=Tolerance, balanced=Tolerance, fast=Tolerance), measured=(Text, ""),
    proof=(named(record(tau=Tolerance, default=Row, found=Row), 3), {}),
)  # fmt: skip

# caches
Decision = record(
    step=Count, sigma=None, action=Literal["raise", "pack"], error_estimate=Amount | None, error=Amount | None, why=Name, model=Name
)
Policy = record(
    states=record(scorer=Pairs, monitor=Pairs), gate=bool | None, residual=Amount | None, decisions=some(Decision, 1_000_000), lead=Count,
    read=some(Size, 2, 2),
)  # fmt: skip
PackedLayer = record(
    kind=Literal["PackedLayer"], length=Count, segments=Count, fine=Count, exact_why=Text | None, bits_v=some(Bits, 2, 1),
    plan=record(bits_k=Bits, bits_v=Bits, sink=Count, recent=Count, calibrate=Count, seed=Count), policy=(Policy | None, None),
    moved=(bool, False), shapes=(some(Name, 2, 2), ["", ""]),
)  # fmt: skip
ExactLayer = record(kind=Literal["DynamicLayer", "DynamicSlidingWindowLayer"], length=Count)
Cache = record(
    format=Positive, model=named(Scalar, 100), weights=Name, config=ConfigDictionary,
    layers=some(Annotated[PackedLayer | ExactLayer, Field(discriminator="kind")], 10_000, 1),
)  # fmt: skip

# the header of a block in a store of prefixes
Widths = some(Annotated[int, Field(ge=2, le=16)], 100_000)
Block = record(
    kind=Literal["rows", "raw"], version=Positive, keyed=bool, model=Text, dtype=Name, shape=Sizes, bits_k=(Widths, []),
    bits_v=(Widths, []), sinks=(Count, 0), centre=(bool, False), seed=(int, 0), calibration=(Name, ""),
)  # fmt: skip
