"""A graph with the trained Flux mini for a ComfyUI folder: no download, seconds on a CPU.

    python tests/comfyui/mini.py COMFYUI_FOLDER

Writes the mini's weights into models/diffusion_models, its prompts into input, the nodes that stand for a text encoder and a
decoder into custom_nodes, and the graph, which is dropped on the page, beside them.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
GRAPH, NODES, PROMPTS = "tqai_mini.json", "tqai_mini_nodes.py", "tqai_mini_digits.safetensors"


def graph(digits: str = "3 1 4 1 5", seed: int = 0) -> dict[str, Any]:
    """The Flux workflow for the API, with the mini in place of a model, a text encoder and a decoder."""
    made = json.loads((ROOT / "workflows/api/flux_txt2img.json").read_text())
    made["1"]["inputs"]["unet_name"] = "mini_flux.safetensors"
    made["3"] = {"class_type": "TestDigits", "inputs": {"prompt": digits, "file": PROMPTS}}
    made["4"] = {"class_type": "TestDigits", "inputs": {"prompt": "", "file": PROMPTS}}
    made["6"]["inputs"].update(width=128, height=128, batch_size=len(digits.split()))
    made["20"]["inputs"].update(cfg=2.0, seed=seed)
    made["31"] = {"class_type": "TestPixels", "inputs": {"samples": ["30", 0]}}
    made["32"] = {"class_type": "PreviewImage", "inputs": {"images": ["31", 0]}}
    del made["2"], made["5"]
    return made


def prompts(folder: Path) -> None:
    """What the digits are as conditioning."""
    import convert
    import torch
    from safetensors.torch import save_file

    text, pooled = convert.conditioning("flux", list(range(11)))
    save_file({"text": text.contiguous(), "pooled": torch.as_tensor(pooled).contiguous()}, str(folder / PROMPTS))


def put(comfyui: Path) -> list[Path]:
    """The files written, which make a ComfyUI folder ready."""
    import convert
    from safetensors.torch import save_file

    places = [comfyui / "models/diffusion_models/mini_flux.safetensors", comfyui / "input" / PROMPTS, comfyui / "custom_nodes" / NODES]
    for place in places:
        place.parent.mkdir(parents=True, exist_ok=True)
    save_file(convert.convert("flux"), str(places[0]))
    prompts(places[1].parent)
    shutil.copyfile(HERE / "support_nodes.py", places[2])
    (comfyui / GRAPH).write_text(json.dumps(graph(), indent=1))
    return [*places, comfyui / GRAPH]


if __name__ == "__main__":
    sys.path += [str(HERE), str(ROOT)]
    if len(sys.argv) != 2 or not (Path(sys.argv[1]) / "main.py").is_file():
        sys.exit("give the folder of ComfyUI, the one with main.py: python tests/comfyui/mini.py COMFYUI_FOLDER")
    print(*put(Path(sys.argv[1])), sep="\n")
