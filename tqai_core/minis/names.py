"""What the minis are called, and where their weights are."""

from pathlib import Path

from ..errors import TqaiError

KINDS = ("flux", "sd3", "wan")  # of the families that are tuned
UNTUNED = ("z_image",)  # of a class without a tolerance of its own, to see what the default is worth
PHOTO = "photo"  # photographs in place of digits; of the Flux class
SIZES = "wan_sizes"  # the WAN mini, trained on with clips of half the height and width
STUDENTS = {"photo_8": PHOTO, "photo_4": PHOTO, "wan_4": "wan"}  # of a few steps, and their teacher: weights are a difference
LM_VARIANTS = ("plain", "outlier", "bias")


def family(name: str) -> str:
    """The family whose presets suit a mini."""
    name = STUDENTS.get(name, name)
    return {PHOTO: "flux", SIZES: "wan"}.get(name, name)


def folder(name: str) -> Path:
    """Where the weights of a mini are: beside this file, or, of those that only benches run, in the laboratory."""
    here = Path(__file__).parent
    return here.parents[1] / "benchmarks" / "minis" if name in (PHOTO, SIZES, *STUDENTS) else here


def weights(name: str) -> Path:
    """The weights of a mini. An installed package has those of the demo alone."""
    path = folder(name) / f"{name}.safetensors"
    if not path.exists():
        raise TqaiError(f"the {name} mini is no part of an installed package: clone the repository and run it there, or take another mini")
    return path


def present() -> tuple[str, ...]:
    """The diffusion minis whose weights are here."""
    return tuple(kind for kind in KINDS if (folder(kind) / f"{kind}.safetensors").exists())
