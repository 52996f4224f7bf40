"""PFT-SR, the Progressive Focused Transformer for single image super-resolution (arXiv 2503.20337), in plain torch."""

from .config import PRESETS, PFTConfig
from .network import PFTSR, PFTBlock, ProgressiveFocusedAttention, create_pft_sr
from .upscale import upscale
from .weights import CATALOGUE, WeightsError, load_model

__version__ = "0.1.0"
__all__ = [
    "CATALOGUE",
    "PFTSR",
    "PRESETS",
    "PFTBlock",
    "PFTConfig",
    "ProgressiveFocusedAttention",
    "WeightsError",
    "create_pft_sr",
    "load_model",
    "upscale",
]
