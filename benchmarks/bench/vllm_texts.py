"""Texts of the vLLM bench: documentation in packages that .venv-vllm pins. No setting was chosen on them."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from .real_texts import documentation, hash_of


@dataclass(frozen=True)
class Source:
    """The documentation of a package."""

    package: str
    path: str

    def read(self) -> str:
        return documentation(self.package, self.path)

    def ids(self, tokenizer: Any) -> list[int]:
        return list(tokenizer(self.read()).input_ids)

    def described(self) -> str:
        return f"{self.package} {version(self.package)}, {self.path}, sha256 {hash_of(self.read())}"


TEXTS = {
    "cryptography": Source("sympy", "sympy/crypto/crypto.py"),
    "logits": Source("transformers", "transformers/generation/logits_process.py"),
    "linear algebra": Source("numpy", "numpy/linalg/_linalg.py"),
    "progress bars": Source("tqdm", "tqdm-{version}.dist-info/METADATA"),
}
