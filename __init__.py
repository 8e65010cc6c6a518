"""The ComfyUI door. ComfyUI loads this file by path; scripts and the command import ``tqai_core`` instead."""

import importlib.util
import sys
from pathlib import Path


def _bind_core() -> None:
    """Load the core beside this file under its one name, without touching ``sys.path``.

    A relative import would give it a second name next to an installed copy: two registries and no isinstance between
    them. An installed copy that is already loaded wins, and this says so.
    """
    home = Path(__file__).with_name("tqai_core")
    loaded = sys.modules.get("tqai_core")
    if loaded is not None:
        if Path(str(loaded.__file__)).parent.resolve() != home.resolve():
            print(f"[tqai] using tqai_core {loaded.__version__}, already imported from elsewhere", file=sys.stderr)
        return
    spec = importlib.util.spec_from_file_location("tqai_core", home / "__init__.py", submodule_search_locations=[str(home)])
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["tqai_core"] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules["tqai_core"]
        raise


# pytest imports this file too, since the checkout's root is a package: without ComfyUI there is nothing to do. Inside
# ComfyUI an import error must reach its log, hence no try/except.
if __package__ and importlib.util.find_spec("comfy_api") is not None:
    _bind_core()

    from .nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

    WEB_DIRECTORY = "./web"  # help pages

    __all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "WEB_DIRECTORY"]
