"""What ComfyUI does with a prompt in API format: check it, run it, tell the page. No cache: every node runs every time."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import comfy_fake
from core_nodes import CORE, Core

Send = Callable[[str, dict[str, Any]], None]


def info(ours: dict[str, Any]) -> dict[str, Any]:
    """/object_info of the core nodes and of ours."""
    found = {}
    for name, core in CORE.items():
        found[name] = _entry(name, name, {"required": core.inputs, "optional": core.optional}, core.outputs, core.output_node)
    for name, cls in ours.items():
        s = cls.GET_SCHEMA()
        found[name] = {
            **_entry(name, s.display_name, cls.INPUT_TYPES(), [o.type for o in s.outputs], s.is_output_node),
            "output_name": [o.display_name for o in s.outputs],
            "output_tooltips": [o.tooltip for o in s.outputs],
            "description": s.description,
            "category": s.category,
            "search_aliases": s.search_aliases,
            "python_module": "custom_nodes.tqai",
        }
    return found


def _entry(name: str, shown: str, inputs: dict[str, Any], outputs: Any, output_node: bool) -> dict[str, Any]:
    return {
        "name": name, "display_name": shown, "input": inputs, "input_order": {k: list(v) for k, v in inputs.items()},
        "output": list(outputs), "output_name": list(outputs), "output_is_list": [False] * len(outputs), "output_node": output_node,
        "category": "core", "description": "", "python_module": "nodes", "is_input_list": False,
    }  # fmt: skip


def linked(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and isinstance(value[1], int)


def errors(prompt: dict[str, Any], known: dict[str, Any], ours: dict[str, Any]) -> dict[str, list[str]]:
    """Complaints by node id, as the server sends with status 400."""
    found: dict[str, list[str]] = {}
    for key, node in prompt.items():
        kind, given = node["class_type"], node["inputs"]
        if kind not in known:
            found[key] = [f"unknown node {kind}"]
            continue
        told = list(_complaints(known[kind]["input"], given, prompt, known, _checked(ours.get(kind)), ""))
        checks = getattr(ours.get(kind), "validate_inputs", None)
        if checks is not None:
            wanted = {n: given.get(n) for n in inspect.signature(checks).parameters}
            verdict = checks(**{n: None if linked(v) else v for n, v in wanted.items()})
            told += [] if verdict is True else [verdict]
        if told:
            found[key] = told
    return found


def _checked(cls: Any) -> set[str]:
    """Inputs that a node checks itself: the built-in check leaves those alone."""
    return set(inspect.signature(cls.validate_inputs).parameters) if hasattr(cls, "validate_inputs") else set()


def _complaints(inputs: dict[str, Any], given: dict[str, Any], prompt: dict[str, Any], known: dict[str, Any], own: set[str], prefix: str):  # type: ignore[no-untyped-def]
    for group in ("required", "optional"):
        for name, (kind, more) in inputs.get(group, {}).items():
            full = prefix + name
            if full not in given:
                if group == "required":
                    yield f"required input is missing: {full}"
                continue
            value = given[full]
            if linked(value):
                source = known[prompt[value[0]]["class_type"]]["output"][value[1]]
                if "*" not in (kind, source) and source != kind:
                    yield f"{full} is linked to {source}, it takes {kind}"
            elif kind == "COMFY_DYNAMICCOMBO_V3":
                chosen = next((o for o in more["options"] if o["key"] == value), None)
                if chosen is None:
                    yield f"{full}: {value!r} is not in the list"
                else:
                    yield from _complaints(chosen["inputs"], given, prompt, known, own, f"{full}.")
            elif full not in own and (isinstance(kind, list) or kind == "COMBO"):
                if value not in (kind if isinstance(kind, list) else more["options"]):
                    yield f"{full}: {value!r} is not in the list"
            elif kind in ("INT", "FLOAT") and not (
                value >= (more.get("min") if more.get("min") is not None else value)
                and value <= (more.get("max") if more.get("max") is not None else value)
            ):
                yield f"{full}: {value} is out of bounds"


def execute(prompt: dict[str, Any], ours: dict[str, Any], send: Send = lambda event, data: None, prompt_id: str = "1") -> dict[str, Any]:
    """Run every output node and what it needs. Returns the nodes' ui outputs, and under None all results by id."""
    results: dict[str, tuple[Any, ...]] = {}
    shown: dict[str, Any] = {}

    def value(v: Any) -> Any:
        return run(v[0])[v[1]] if linked(v) else v

    def run(key: str) -> tuple[Any, ...]:
        if key in results:
            return results[key]
        node = prompt[key]
        inputs = nested({name: value(v) for name, v in node["inputs"].items()})
        send("executing", {"node": key, "display_node": key, "prompt_id": prompt_id})
        comfy_fake.EXECUTING.append(SimpleNamespace(node_id=key, prompt_id=prompt_id))
        try:
            results[key], ui = call(node["class_type"], key, inputs)
        finally:
            comfy_fake.EXECUTING.pop()
        if ui:
            shown[key] = ui
            send("executed", {"node": key, "display_node": key, "output": ui, "prompt_id": prompt_id})
        return results[key]

    def call(kind: str, key: str, inputs: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
        core: Core | None = CORE.get(kind)
        if core is not None:
            out = core.run(**inputs)
            return ((), out) if isinstance(out, dict) else (out, None)
        cls = ours[kind]
        hidden = {h: {"UNIQUE_ID": key, "PROMPT": prompt}[h.value] for h in cls.GET_SCHEMA().hidden}
        out = cls.PREPARE_CLASS_CLONE({"hidden_inputs": hidden}).execute(**inputs)
        return out.result or (), out.ui.as_dict() if hasattr(out.ui, "as_dict") else out.ui

    send("execution_start", {"prompt_id": prompt_id})
    send("execution_cached", {"nodes": [], "prompt_id": prompt_id})
    for key, node in prompt.items():
        kind = node["class_type"]
        if CORE[kind].output_node if kind in CORE else ours[kind].GET_SCHEMA().is_output_node:
            run(key)
    return {**shown, "results": results}


def nested(inputs: dict[str, Any]) -> dict[str, Any]:
    """``codec="turbo", codec.bits=6`` -> ``codec={"codec": "turbo", "bits": 6}``; a dynamic combo is always a dict."""
    found = {name: value for name, value in inputs.items() if "." not in name}
    for name in [n for n in ("scorer", "strategy", "monitor", "codec") if isinstance(found.get(n), str)]:
        found[name] = {name: found[name]}
    for name, value in inputs.items():
        head, dot, tail = name.partition(".")
        if dot:
            found[head][tail] = value
    return found
