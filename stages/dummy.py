"""A stage that shows what one needs: this file, its row in `stages.config.kinds`, and its test."""

from base.store.checkpoint import Artifact
from stages import sft
from stages.config.dummy import DummyConfig
from stages.learner.workspace import Workspace


def train(config: DummyConfig, workspace: Workspace) -> Artifact:
    """Fine-tune the checkpoint `start`, as SFT does; errors as for `stages.sft.train`."""
    return sft.train(config, workspace)
