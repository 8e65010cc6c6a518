"""What the nodes use of ``comfy_api.latest``: ``io`` and ``ui``, with the keyword arguments of ComfyUI 0.15.1 and no others."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from types import ModuleType, SimpleNamespace
from typing import Any


class Input:
    type = "*"

    def __init__(
        self, id: str, display_name: Any = None, optional: bool = False, tooltip: Any = None, lazy: Any = None, extra_dict: Any = None,
        raw_link: Any = None, advanced: Any = None,
    ) -> None:  # fmt: skip
        self.id, self.optional, self.tooltip, self.advanced = id, optional, tooltip, advanced

    def as_dict(self) -> dict[str, Any]:
        return {"tooltip": self.tooltip, "advanced": self.advanced}

    def v1(self) -> tuple[str, dict[str, Any]]:
        return self.type, {k: v for k, v in self.as_dict().items() if v is not None}


class Output:
    type = "*"

    def __init__(self, id: Any = None, display_name: Any = None, tooltip: Any = None, is_output_list: bool = False) -> None:
        self.id, self.display_name, self.tooltip = id, display_name, tooltip


class Widget(Input):
    def __init__(self, id: str, *, default: Any = None, **kw: Any) -> None:
        super().__init__(id, **kw)
        self.default = default

    def as_dict(self) -> dict[str, Any]:
        return {"default": self.default, **super().as_dict()}


class Number(Widget):
    def __init__(self, id: str, *, min: Any = None, max: Any = None, step: Any = None, display_mode: Any = None, **kw: Any) -> None:
        super().__init__(id, **kw)
        self.min, self.max, self.step = min, max, step
        assert not (min is not None and self.default is not None and self.default < min)
        assert not (max is not None and self.default is not None and self.default > max)

    def as_dict(self) -> dict[str, Any]:
        return {"min": self.min, "max": self.max, "step": self.step, **super().as_dict()}


class FloatInput(Number):
    def __init__(self, id: str, *, round: Any = None, **kw: Any) -> None:
        super().__init__(id, **kw)


class StringInput(Widget):
    def __init__(self, id: str, *, multiline: bool = False, placeholder: Any = None, **kw: Any) -> None:
        super().__init__(id, **kw)


class ComboInput(Widget):
    def __init__(self, id: str, *, options: Any = None, **kw: Any) -> None:
        super().__init__(id, **kw)
        self.options = list(options)
        assert self.default is None or self.default in self.options

    def as_dict(self) -> dict[str, Any]:
        return {"options": self.options, **super().as_dict()}


class Option:
    def __init__(self, key: str, inputs: list[Input]) -> None:
        self.key, self.inputs = key, inputs


class DynamicComboInput(Input):
    def __init__(self, id: str, options: list[Option], display_name: Any = None, optional: bool = False, tooltip: Any = None) -> None:
        super().__init__(id, display_name, optional, tooltip)
        self.options = options

    def as_dict(self) -> dict[str, Any]:
        split = lambda o: (
            {"required": {i.id: i.v1() for i in o.inputs if not i.optional}}
            | ({"optional": optional} if (optional := {i.id: i.v1() for i in o.inputs if i.optional}) else {})
        )
        options = [{"key": o.key, "inputs": split(o)} for o in self.options]
        return {"options": options, **super().as_dict()}


def kind(name: str, base: type[Input]) -> SimpleNamespace:
    return SimpleNamespace(Input=type(f"{name}Input", (base,), {"type": name}), Output=type(f"{name}Output", (Output,), {"type": name}))


class Hidden(str, Enum):  # noqa: UP042 - as ComfyUI has it
    unique_id = "UNIQUE_ID"
    prompt = "PROMPT"


@dataclass
class Schema:
    node_id: str
    display_name: Any = None
    category: str = "sd"
    inputs: list[Input] = field(default_factory=list)
    outputs: list[Output] = field(default_factory=list)
    hidden: list[Hidden] = field(default_factory=list)
    description: str = ""
    search_aliases: list[str] = field(default_factory=list)
    is_output_node: bool = False

    def __post_init__(self) -> None:
        ids = [i.id for i in self.inputs]
        assert len(set(ids)) == len(ids), f"{self.node_id}: input ids must be unique"


class NodeOutput:
    def __init__(self, *args: Any, ui: Any = None, expand: Any = None, block_execution: Any = None) -> None:
        self.args, self.ui = args, ui

    @property
    def result(self) -> tuple[Any, ...] | None:
        return self.args or None


class ComfyNode:
    hidden: Any = None

    @classmethod
    def GET_SCHEMA(cls) -> Schema:
        return cls.define_schema()

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = {"required": {}}
        for i in cls.define_schema().inputs:
            found.setdefault("optional" if i.optional else "required", {})[i.id] = i.v1()
        if hidden := cls.define_schema().hidden:
            found["hidden"] = {h.name: (h.value,) for h in hidden}
        return found

    @classmethod
    def PREPARE_CLASS_CLONE(cls, data: dict[str, Any]) -> type[ComfyNode]:
        """Hidden inputs go to a copy of the class, one a call."""
        hidden = data.get("hidden_inputs", {})
        held = SimpleNamespace(unique_id=hidden.get(Hidden.unique_id), prompt=hidden.get(Hidden.prompt))
        return type(cls.__name__, (cls,), {"hidden": held})


class PreviewText:
    def __init__(self, value: str, **kw: Any) -> None:
        self.value = value

    def as_dict(self) -> dict[str, Any]:
        return {"text": (self.value,)}


class PreviewImage:
    def __init__(self, image: Any, animated: bool = False, cls: Any = None, **kw: Any) -> None:
        assert image.ndim == 4
        assert image.shape[-1] == 3
        self.animated = animated

    def as_dict(self) -> dict[str, Any]:
        return {"images": [{"filename": "fake.png", "subfolder": "", "type": "temp"}], "animated": (self.animated,)}


def module() -> ModuleType:
    latest = ModuleType("comfy_api.latest")
    dynamic = SimpleNamespace(Input=type("DynamicCombo", (DynamicComboInput,), {"type": "COMFY_DYNAMICCOMBO_V3"}), Option=Option)
    latest.io = SimpleNamespace(
        ComfyNode=ComfyNode, Schema=Schema, NodeOutput=NodeOutput, Hidden=Hidden, DynamicCombo=dynamic,
        Int=kind("INT", Number), Float=kind("FLOAT", FloatInput), Boolean=kind("BOOLEAN", Widget), String=kind("STRING", StringInput),
        Combo=kind("COMBO", ComboInput), Model=kind("MODEL", Input), Latent=kind("LATENT", Input), Image=kind("IMAGE", Input),
        Sigmas=kind("SIGMAS", Input), Sampler=kind("SAMPLER", Input),
        Custom=lambda name: kind(name, Input),
    )  # fmt: skip
    latest.ui = SimpleNamespace(PreviewText=PreviewText, PreviewImage=PreviewImage)
    return latest
