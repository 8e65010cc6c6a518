"""The ComfyUI nodes: the only importer of ``comfy*``. One node a file."""

from .cache import TQAICache
from .compress import TQAICompress
from .load_pipeline import TQAILoadPipeline
from .monitor import TQAIMonitor
from .report import TQAIReport
from .sampler import TQAISampler
from .save_pipeline import TQAISavePipeline
from .scorer import TQAIScorer
from .skip_layers import TQAISkipLayers
from .strategy import TQAIStrategy

# a plain literal, since the Manager reads it without running it
NODE_CLASS_MAPPINGS = {
    "TQAIScorer": TQAIScorer,
    "TQAIStrategy": TQAIStrategy,
    "TQAIMonitor": TQAIMonitor,
    "TQAISkipLayers": TQAISkipLayers,
    "TQAICompress": TQAICompress,
    "TQAICache": TQAICache,
    "TQAIReport": TQAIReport,
    "TQAISavePipeline": TQAISavePipeline,
    "TQAILoadPipeline": TQAILoadPipeline,
    "TQAISampler": TQAISampler,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "TQAIScorer": "TQAI Scorer",
    "TQAIStrategy": "TQAI Strategy",
    "TQAIMonitor": "TQAI Monitor",
    "TQAISkipLayers": "TQAI Skip Layers",
    "TQAICompress": "TQAI Compress",
    "TQAICache": "TQAI Cache",
    "TQAIReport": "TQAI Report",
    "TQAISavePipeline": "TQAI Save Pipeline",
    "TQAILoadPipeline": "TQAI Load Pipeline",
    "TQAISampler": "TQAI Calibrated Sampler",
}
