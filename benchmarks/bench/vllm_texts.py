"""Texts of the vLLM bench: documentation in packages that .venv-vllm pins. No setting was chosen on them."""

from __future__ import annotations

import ast
import hashlib
from dataclasses import dataclass
from importlib.metadata import distribution, version
from pathlib import Path
from typing import Any

CHARACTERS = 60_000


@dataclass(frozen=True)
class Source:
    """``path`` in a package: of a ``.py`` its documentation strings, read from the source, else the file."""

    package: str
    path: str

    def read(self) -> str:
        path = Path(str(distribution(self.package).locate_file(self.path.format(version=version(self.package)))))
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".py":
            nodes = (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef))
            text = "\n\n".join(doc for node in nodes if (doc := ast.get_docstring(node)))
        return text[:CHARACTERS]

    def ids(self, tokenizer: Any) -> list[int]:
        return list(tokenizer(self.read()).input_ids)

    def described(self) -> str:
        return f"{self.package} {version(self.package)}, {self.path}, sha256 {hashlib.sha256(self.read().encode()).hexdigest()[:16]}"


TEXTS = {
    "cryptography": Source("sympy", "sympy/crypto/crypto.py"),
    "logits": Source("transformers", "transformers/generation/logits_process.py"),
    "linear algebra": Source("numpy", "numpy/linalg/_linalg.py"),
    "progress bars": Source("tqdm", "tqdm-{version}.dist-info/METADATA"),
}
