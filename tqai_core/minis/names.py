"""What the minis are called, and where their weights are."""

from pathlib import Path

from ..errors import TqaiError

KINDS = ("flux", "sd3", "wan")  # of the families that are tuned
UNTUNED = ("z_image",)  # of a class without a tolerance of its own, to see what the default is worth
LM_VARIANTS = ("plain", "outlier", "bias")


def weights(name: str) -> Path:
    """The weights of a mini. An installed package has those of the demo alone."""
    path = Path(__file__).with_name(f"{name}.safetensors")
    if not path.exists():
        raise TqaiError(f"the {name} mini is no part of an installed package: clone the repository and run it there, or take another mini")
    return path


def present() -> tuple[str, ...]:
    """The diffusion minis whose weights are here."""
    return tuple(kind for kind in KINDS if Path(__file__).with_name(f"{kind}.safetensors").exists())
