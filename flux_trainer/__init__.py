"""flux_trainer: train FLUX text-to-image transformers in plain PyTorch."""

__version__ = "0.1.0"
