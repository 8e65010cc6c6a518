"""A name for a model's weights that two engines agree on, and that another fine-tuning does not have."""

from __future__ import annotations

import hashlib
from pathlib import Path

SAMPLES, SAMPLE = 16, 4096  # places in each file of weights, and bytes read there


def model_name(name: str, revision: str | None = None) -> str:
    """Of a folder: its name, and a hash of its configuration and of samples of its weights. Of a model on a hub: what is in the local
    cache of it, else its name and revision."""
    folder = Path(name)
    if not folder.is_dir():
        from huggingface_hub import try_to_load_from_cache

        try:
            found = try_to_load_from_cache(name, "config.json", revision=revision)
        except ValueError:  # no name of a hub: an address of another kind
            found = None
        if not isinstance(found, str):
            return f"{name}@{revision or 'main'}"
        folder = Path(found).parent
    total = hashlib.sha256()
    files = [folder / "config.json", *sorted(path for kind in ("*.safetensors", "*.bin", "*.gguf") for path in folder.glob(kind))]
    for path in files:
        if not path.is_file():
            continue
        size = path.stat().st_size
        total.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for i in range(SAMPLES):
                file.seek(max(size - SAMPLE, 0) * i // (SAMPLES - 1))
                total.update(file.read(SAMPLE))
    return f"{Path(name).name}:{total.hexdigest()[:16]}"
