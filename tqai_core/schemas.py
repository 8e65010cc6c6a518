"""What the JSON of every file that tqai reads may hold: fields, types, ranges, counts. :func:`tqai_core.files.checked` applies them.

Pydantic 2 in strict mode: no text becomes a number, no unknown field passes, every number is finite.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
Count = Annotated[int, Field(ge=0, le=2**31 - 1)]
Positive = Annotated[int, Field(ge=1, le=2**31 - 1)]
Size = Annotated[int, Field(ge=0, le=2**40)]
Bits = Annotated[int, Field(ge=0, le=8)]
Number = Annotated[float, Field(ge=-1e15, le=1e15, allow_inf_nan=False)]
Amount = Annotated[float, Field(ge=0, le=1e15, allow_inf_nan=False)]
Name = Annotated[str, Field(max_length=200)]
Text = Annotated[str, Field(max_length=4096)]
Scalar = bool | int | Number | Text | None
Few = Annotated[list[Scalar], Field(max_length=1000)]
Pairs = Annotated[dict[Name, Scalar | Few], Field(max_length=100)]
Layers = Annotated[list[int | Name], Field(max_length=10_000)]
Stage = Text | Pairs | None


class Strict(BaseModel):
    model_config = STRICT


class Pipeline(Strict):
    """Config JSON, and the dict that people write by hand."""

    scorer: Stage = None
    strategy: Stage = None
    monitor: Stage = None
    codec: Stage = None
    scorer_kwargs: Pairs | None = None
    strategy_kwargs: Pairs | None = None
    monitor_kwargs: Pairs | None = None
    codec_kwargs: Pairs | None = None
    level: Name = "model"
    skip_layers: Layers | int | Text = ""
    sink: int = 0  # ranges are Config's own
    recent: int = 0
    protect: int = 0
    calibrate: int = 0
    version: int = 1


class Packed(Strict):
    format: Positive
    codec: Text
    shape: Annotated[list[Size], Field(max_length=16)]
    meta: Annotated[dict[Name, Scalar], Field(max_length=16)]


class StepMeta(BaseModel):
    """``meta`` of a packed step of a stream, beside what its codec writes."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)
    at: Number
    bits: Bits
    key: bool
    dtype: Literal["float32", "float16", "bfloat16", "float64"]


class Guidance(Strict):
    class Proof(Strict):
        at: Number
        error: Amount
        stock: Amount

    name: Name
    made: Number
    low: Number
    high: Number
    proved: Annotated[list[Proof], Field(max_length=1000)]


class HeldOut(Strict):
    class Stock(Strict):
        name: Name
        shift: Amount
        error: Amount
        before_last: Amount

    error: Amount
    before_last: Amount
    stock: Stock
    grids: Annotated[dict[Name, Amount], Field(max_length=100)] = {}


Seeds = Annotated[list[int], Field(max_length=10_000)]
Versions = Annotated[dict[Name, Name | int], Field(max_length=100)]
Steps = Annotated[list[Number], Field(min_length=1, max_length=1000)]


class Sampler(Strict):
    format: Literal["tqai-sampler"]
    version: Positive
    models: Annotated[dict[Name, Name], Field(max_length=16)]
    model_class: Name
    entry: Name | None
    grid: Name
    nodes: Steps
    theta: Annotated[list[Annotated[list[Number], Field(max_length=16)]], Field(min_length=1, max_length=1000)]
    form: Literal["all", "last"]
    guidance: Guidance
    calls: Amount
    teacher: Annotated[dict[Name, Number], Field(max_length=16)]
    seeds: Annotated[dict[Name, Seeds], Field(max_length=16)]
    held_out: HeldOut
    shape: Annotated[list[Size], Field(max_length=16)]
    versions: Versions
    difference: Text | None = None


Runs = Annotated[list[Annotated[list[Count], Field(min_length=3, max_length=3)]], Field(min_length=1, max_length=1024)]


class Bases(Strict):
    format: Positive
    bits: Annotated[int, Field(ge=1, le=8)]
    model: Name
    streams: Annotated[dict[Name, Annotated[list[Runs | None], Field(min_length=1, max_length=4096)]], Field(max_length=10_000)]


class _Measured(Strict):
    """What every calibration says of how it was made."""

    format: Positive
    model: Name
    class_: Name = Field(alias="class")
    kind: Name
    family: Name
    seeds: Seeds
    probes: Positive
    codec: Name
    basis_bits: Annotated[int, Field(ge=1, le=8)]
    average: Bits
    steps: Count | None


class Unfinished(_Measured):
    complete: Literal[False]
    done: Count
    sigmas: Steps


class Calibration(_Measured):
    class Verdicts(Strict):
        class Basis(Strict):
            klt: Amount
            hadamard: Amount
            kept: Literal["klt", "hadamard"]

        class Bits(Strict):
            class Loss(Strict):
                loss: Amount
                bytes: Size

            average: Amount
            how: Name
            tried: Annotated[dict[Name, Amount], Field(max_length=16)]
            seeds: Seeds
            fisher: Loss
            uniform: Loss
            kept: Literal["fisher", "uniform"]
            key_bits: Amount
            value_bits: Amount

        bases: Annotated[dict[Name, Annotated[list[Basis], Field(max_length=4096)]], Field(max_length=10_000)]
        bits: Bits

    complete: Literal[True]
    held_out: int
    samples: Annotated[list[Count], Field(max_length=1000)]
    seconds_cpu: Amount
    verdicts: Verdicts
    versions: Versions


class TableHeader(BaseModel):
    """What the scorer ``fisher`` reads of a calibration's header; the rest is not looked at."""

    model_config = ConfigDict(strict=True, extra="ignore")
    complete: bool = False
    model: Name | None = None
    family: Name | None = None


class Row(Strict):
    error: Amount
    calls: Amount
    bytes: Amount
    time: Amount


class Trial(Row):
    trial: Count
    config: dict[Name, Any]  # Config.from_dict checks it


class Study(Strict):
    class Budget(Strict):
        what: Literal["calls", "bytes", "time"]
        limit: Annotated[float, Field(gt=0, le=1e15)]

    class Proof(Strict):
        default: Row
        tuned: Row

    what: Literal["study"]
    settings: Pairs
    budget: Budget
    trials: Annotated[list[Trial], Field(max_length=100_000)]
    front: Annotated[list[Count], Field(max_length=100_000)]
    layers: Annotated[list[Annotated[list[Amount], Field(min_length=2, max_length=2)]], Field(max_length=10_000)]
    skip_layers: Layers
    proof_seeds: Seeds = []
    proof: Proof | None = None
    kept: Literal["tuned", "default"] = "default"
    tuned: dict[Name, Any] = {}
    config: dict[Name, Any] | None = None
    default_fits: bool = False


class CachePlan(Strict):
    bits_k: Bits
    bits_v: Bits
    sink: Count
    recent: Count
    calibrate: Count
    seed: Count


class CachePolicy(Strict):
    class States(Strict):
        scorer: Pairs
        monitor: Pairs

    class Decision(Strict):
        step: Count
        sigma: None
        action: Literal["raise", "pack"]
        error_estimate: Amount | None
        error: Amount | None
        why: Name
        model: Name

    states: States
    gate: bool | None
    residual: Amount | None
    decisions: Annotated[list[Decision], Field(max_length=1_000_000)]
    lead: Count
    read: Annotated[list[Size], Field(min_length=2, max_length=2)]


class PackedLayer(Strict):
    kind: Literal["PackedLayer"]
    length: Count
    segments: Count
    fine: Count
    exact_why: Text | None
    plan: CachePlan
    bits_v: Annotated[list[Bits], Field(min_length=1, max_length=2)]
    policy: CachePolicy | None = None


class ExactLayer(Strict):
    kind: Literal["DynamicLayer", "DynamicSlidingWindowLayer"]
    length: Count


class Cache(Strict):
    format: Positive
    model: Annotated[dict[Name, Scalar], Field(max_length=100)]
    weights: Name
    config: dict[Name, Any]  # Config.from_dict checks it
    layers: Annotated[list[Annotated[PackedLayer | ExactLayer, Field(discriminator="kind")]], Field(min_length=1, max_length=10_000)]


ModelConfig = TypeAdapter(Pairs, config=ConfigDict(strict=True, allow_inf_nan=False))
