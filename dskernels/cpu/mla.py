"""Latent attention on the CPU; names, arguments and meaning are those of `ref.mla`."""

from .prefill import mla_prefill, mla_prefill_backward

__all__ = ["mla_prefill", "mla_prefill_backward"]
