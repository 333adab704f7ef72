"""The config of the stage `dummy`. Free of torch."""

from stages.config.training import SFTConfig


class DummyConfig(SFTConfig):
    """Supervised fine-tuning, under another name."""
