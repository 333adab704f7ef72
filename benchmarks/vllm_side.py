"""vLLM as a side of `rollout.py`: an engine in a process, and mostly in an environment, of its own, for its pins and
the project's exclude each other.

The file has both ends of a line of JSON: `Vllm` asks, and `serve`, which the other interpreter runs, answers. It
imports nothing but the standard library where it asks, and vLLM besides where it answers. The engine runs inside
the process that answers: asked by one thread it is faster so than with vLLM's own worker processes, and takes one
core as the other sides do.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

# Given, for otherwise vLLM takes nine tenths of the memory there is.
KV_CACHE_BYTES = 2 << 30
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "HF_HUB_OFFLINE": "1",
}


@dataclass(frozen=True)
class Answer:
    """What vLLM made of the prompts of a turn.

    Attributes:
        completions: Token ids, a group for each prompt; EOS is the last where a completion ended by itself.
        logprobs: Log-probability of each of these tokens, under the model.
        seconds: From prompts to both of these as lists; passing them on is not in it.
    """

    completions: list[list[list[int]]]
    logprobs: list[list[list[float]]]
    seconds: float

    @property
    def tokens(self) -> int:
        """Completion tokens, EOS included."""
        return sum(len(completion) for group in self.completions for completion in group)


class Vllm:
    """An engine that is ready to sample.

    Args:
        python: An interpreter that can import vllm.
        checkpoint: A Hugging Face directory.
        eos_id: The token that ends a completion.
        max_length: Longest prompt and completion together.
        max_rows: Completions sampled together.
        threads: Of the engine's kernels.
        log: File for what it has to say.

    Attributes:
        facts: `versions` of its packages and `start_seconds`, from the interpreter's start to the engine's.

    Raises:
        SystemExit: the engine does not start, or ends; with the last lines it wrote.
    """

    def __init__(
        self, python: str, checkpoint: Path, eos_id: int, max_length: int, max_rows: int, threads: int, log: Path
    ) -> None:
        settings = {
            "model": str(checkpoint.resolve()),
            "dtype": "float32",
            "max_model_len": max_length,
            "max_num_seqs": max_rows,
            "kv_cache_memory_bytes": KV_CACHE_BYTES,
        }
        self.eos_id = eos_id
        self._log = log
        started = time.perf_counter()
        with log.open("w") as stderr:
            self._process = subprocess.Popen(
                [python, __file__, json.dumps(settings)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env={**os.environ, **ENVIRONMENT, "OMP_NUM_THREADS": str(threads)},
            )
        self.facts = {"versions": self._read(), "start_seconds": time.perf_counter() - started}

    def sample(self, prompts: Sequence[list[int]], group_size: int, length: int) -> Answer:
        """Draw completions at temperature 1.

        Args:
            prompts: Token ids of each.
            group_size: Completions of each prompt.
            length: Longest completion.
        """
        request = {"prompts": prompts, "group_size": group_size, "length": length, "eos_id": self.eos_id}
        assert self._process.stdin
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return Answer(**self._read())

    def close(self) -> None:
        """End the process; it stops where its input does."""
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            raise SystemExit("\n".join([f"vLLM ended with code {code}:", *self._log.read_text().splitlines()[-20:]]))
        answer: dict[str, Any] = json.loads(line)
        return answer


def serve(settings: dict[str, Any], requests: TextIO, answers: TextIO) -> None:
    """Start the engine, say the versions, and answer a line for each line.

    Args:
        settings: Arguments of vLLM's `LLM`.
        requests: Arguments of `Vllm.sample`, with `eos_id`.
        answers: The versions first, then an `Answer` for each request.
    """
    import torch
    import transformers
    import vllm

    def answer(content: dict[str, Any]) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    engine = vllm.LLM(**settings)
    answer({"vllm": vllm.__version__, "torch": torch.__version__, "transformers": transformers.__version__})
    for line in requests:
        request = json.loads(line)
        # In training the weights change between rollouts, and what the cache holds is void.
        engine.reset_prefix_cache()
        sampling = vllm.SamplingParams(
            n=request["group_size"],
            temperature=1.0,
            max_tokens=request["length"],
            logprobs=0,
            flat_logprobs=True,
            detokenize=False,
            ignore_eos=True,
            stop_token_ids=[request["eos_id"]],
        )
        started = time.perf_counter()
        prompts = [{"prompt_token_ids": prompt} for prompt in request["prompts"]]
        groups = [output.outputs for output in engine.generate(prompts, sampling, use_tqdm=False)]
        completions = [[list(row.token_ids) for row in group] for group in groups]
        logprobs = [[list(row.logprobs.logprobs) for row in group] for group in groups]
        seconds = time.perf_counter() - started
        answer({"completions": completions, "logprobs": logprobs, "seconds": seconds})


if __name__ == "__main__":
    # vLLM prints to standard output too.
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    serve(json.loads(sys.argv[1]), sys.stdin, channel)
