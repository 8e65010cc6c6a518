"""Long English texts for real language models that a development environment carries: documentation in packages that constraints.txt pins.

Nothing is imported: documentation strings are read from the source by ``ast``. Each text has a hash, so that two machines know whether
they measured on the same one.
"""

from __future__ import annotations

import ast
import hashlib
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from typing import Any

from torch import Tensor

CHARACTERS = 60_000  # of a text, more than 8,192 tokens of any of them


def documentation(package: str, path: str) -> str:
    """``path`` within a package: of a ``.py`` its documentation strings in their order, else the file as it is. OSError or
    PackageNotFoundError where the package has no such file or is not here."""
    found = Path(str(distribution(package).locate_file(path.format(version=version(package)))))
    text = found.read_text(encoding="utf-8")
    if found.suffix == ".py":
        kinds = ast.Module | ast.ClassDef | ast.FunctionDef
        text = "\n\n".join(doc for node in ast.walk(ast.parse(text)) if isinstance(node, kinds) and (doc := ast.get_docstring(node)))
    return text[:CHARACTERS]


def hash_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Text:
    """The :func:`documentation` of a package, and the hash of the one that the published figures are of."""

    name: str
    package: str
    path: str
    sha256: str

    def read(self) -> str:
        return documentation(self.package, self.path)

    def tokens(self, tokenizer: Any, count: int) -> Tensor:
        """The first ``count`` tokens ``int64 [count]``. ValueError where there are fewer."""
        found: Tensor = tokenizer(self.read(), return_tensors="pt")["input_ids"][0]
        if len(found) < count:
            raise ValueError(f"{self.name} has {len(found)} tokens, {count} asked")
        return found[:count]

    @property
    def same(self) -> bool:
        """Whether the text here is the one whose hash is known."""
        return hash_of(self.read()) == self.sha256


# what settings were chosen on, and what calibration may see
CHOICE = (
    Text("statistics", "scipy", "scipy/stats/_stats_py.py", "bd363506aeafbd39"),
    Text("masked arrays", "numpy", "numpy/ma/core.py", "065682681890d5e5"),
    Text("beams", "sympy", "sympy/physics/continuum_mechanics/beam.py", "81a5dcccd3d19e1d"),
    Text("loss functions", "torch", "torch/nn/modules/loss.py", "aeba6d5b6deb2932"),
)
# what verdicts are on: no setting and no calibration ever saw them
VERDICT = (
    Text("forests", "scikit-learn", "sklearn/ensemble/_forest.py", "69c179dc001bf2fe"),
    Text("signals", "scipy", "scipy/signal/_signaltools.py", "9f803dca23f4be39"),
    Text("cryptography", "sympy", "sympy/crypto/crypto.py", "30a180342c43b957"),
    Text("logits", "transformers", "transformers/generation/logits_process.py", "44f46003c503aed6"),
)


def missing(texts: tuple[Text, ...]) -> dict[str, str]:
    """Texts that are not here, or are others than those of the published figures, and why."""
    found = {}
    for text in texts:
        try:
            if not text.same:
                found[text.name] = f"{text.package} {version(text.package)} has another text than the one of the published figures"
        except (OSError, PackageNotFoundError) as error:
            found[text.name] = f"{type(error).__name__}: {error}"
    return found
