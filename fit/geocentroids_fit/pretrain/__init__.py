"""Training a small encoder from a folder of images, without labels."""

from geocentroids_fit.pretrain.config import ModelConfig, PretrainConfig, make_pretrain_config
from geocentroids_fit.pretrain.run import pretrain

__all__ = ["ModelConfig", "PretrainConfig", "make_pretrain_config", "pretrain"]
