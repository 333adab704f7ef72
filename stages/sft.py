"""SFT stage: imitate demonstrations, with the loss on completion tokens only.

The same module trains the cold start (a few rough demonstrations of many domains) and SFT experts (gold answers of one
domain). Every step takes the next `batch_size` demonstrations of an endless shuffled stream and makes one update on
the mean cross-entropy of their completion tokens; `mask_conflicts` leaves out tokens that conflict with confident
predictions of the model. Left out: packing, because the loss must not depend on neighbours.
"""

import itertools
from collections.abc import Iterator

from base.store.checkpoint import Artifact
from stages.config.training import SFTConfig
from stages.learner.stage import draw_training, load_start
from stages.learner.supervised import demonstrations, imitate
from stages.learner.training import Learner, epochs
from stages.learner.update import Row, token_weights
from stages.learner.workspace import Workspace


def train(config: SFTConfig, workspace: Workspace) -> Artifact:
    """Fine-tune the checkpoint `start` on demonstrations of the workspace's domains.

    Raises:
        UserError: a domain has fewer than `examples` training examples, or some do not fit the model.
    """
    policy = load_start(workspace, config.lora)
    examples = draw_training(workspace, config)
    imitated, notes = demonstrations(workspace, policy, examples, config, rough=config.demonstrations == "rough")
    learner = Learner(policy, config, config.max_steps, workspace.progress, workspace.seed)

    def batches(done: int) -> Iterator[list[Row]]:
        stream = itertools.islice(epochs(imitated, workspace.seed), done * config.batch_size, None)
        while True:
            batch = learner.shard(list(itertools.islice(stream, config.batch_size)))
            weights = token_weights([len(completion) for _, completion in batch], "token", learner)
            yield [
                Row([*prompt, *completion], len(prompt), weights_N)
                for (prompt, completion), weights_N in zip(batch, weights, strict=True)
            ]

    return imitate("sft", learner, workspace, examples, batches, config.mask_conflicts, notes)
