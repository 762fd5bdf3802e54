"""dskernels: the kernels and systems behind DeepSeek-V3."""

__version__ = "0.1.0"
