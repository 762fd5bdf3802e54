"""DeepSeek-V3 (and V2) end to end on `dskernels`: config, layers, checkpoints, text."""

from model.config import DeepseekConfig
from model.transformer import DeepseekV3, TrainOutput

__all__ = ["DeepseekConfig", "DeepseekV3", "TrainOutput"]
