"""The ComfyUI nodes: the only importer of ``comfy*``. None is finished yet; see CHANGELOG."""

# a plain literal, since the Manager reads it without running it
NODE_CLASS_MAPPINGS = {}
NODE_DISPLAY_NAME_MAPPINGS = {}
