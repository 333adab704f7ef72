"""One vLLM server as a stage sees it: a URL that draws completions, scores tokens and takes weights.

Prompts and completions travel as token ids, so that no tokenizer stands between trainer and server. Weights and
adapters are folders that the server reads itself: both need one file system.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from base.errors import UserError
from experts.endpoint import NEUTRAL
from stages.sampling.sampler import Sampling
from stages.vllm.settings import PROBE_HEADER, barring, is_local

# Answers that need no model come at once or not at all.
QUICK_SECONDS = 10.0
CONNECTIONS = 512
# vLLM closes a connection nobody has used for 5 s; a request sent in that moment gets no answer.
IDLE_SECONDS = 2.0
COMPLETIONS = "/v1/completions"
# Of the client's errors those that pass with time. A model that is not there passes too: a server that was started anew
# has not been told of the adapter yet.
PASSING = {408, 425, 429}
FORGET_ATTEMPTS, FORGET_SECONDS = 20, 0.5


class ServerLostError(ConnectionError):
    """A server does not answer, is too slow, or has failed inside: another attempt may succeed."""


class ServerFailedError(ServerLostError):
    """A server answers that it has failed inside; the message has its words."""


@dataclass(frozen=True)
class Completion:
    """What a server drew.

    Attributes:
        token_ids: The tokens.
        logprobs: The log-probability of each, as the server's `--logprobs-mode` has it.
        stopped: Whether a stop string ended it.
    """

    token_ids: list[int]
    logprobs: list[float]
    stopped: bool = False


@dataclass(frozen=True)
class Ends:
    """What ends a completion, and what is no token.

    Attributes:
        stop_ids: Each of them ends a completion.
        barred_ids: Never drawn.
    """

    stop_ids: Sequence[int]
    barred_ids: Sequence[int] = ()


class VllmServer:
    """One server; several threads may ask at once.

    Args:
        url: Without the final `/v1`.
        timeout: Seconds one answer may take.
    """

    def __init__(self, url: str, timeout: float) -> None:
        self.url = url
        self.timeout = timeout
        limits = httpx.Limits(
            max_connections=CONNECTIONS, max_keepalive_connections=CONNECTIONS, keepalive_expiry=IDLE_SECONDS
        )
        # A proxy is for other machines.
        self._client = httpx.Client(base_url=url, timeout=timeout, limits=limits, trust_env=not is_local(url))

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def healthy(self) -> bool:
        """Whether it answers and its engine lives."""
        try:
            return self._client.get("/health", timeout=QUICK_SECONDS).is_success
        except httpx.TransportError:
            return False

    def models(self) -> dict[str, Mapping[str, Any]]:
        """What it serves, adapters included: name -> `max_model_len`, `parent`, …"""
        return {entry["id"]: entry for entry in self._get("/v1/models")["data"]}

    def context(self) -> int:
        """Tokens a prompt and its completion may have together."""
        return int(self.models()[self.base_model()]["max_model_len"])

    def base_model(self) -> str:
        """The name of the model under its adapters."""
        return next(name for name, entry in self.models().items() if not entry.get("parent"))

    def setting(self, group: str, name: str) -> Any:
        """One of its settings, such as `model_config`, `logprobs_mode`; None where it has no such group.

        Told, as weights are taken, by a server in development mode only.
        """
        # The first answer waits for a look at the machine.
        told = self._answer("GET", "/server_info?config_format=json", None, self.timeout)
        settings = _json(told)["vllm_config"][group]
        return None if settings is None else settings[name]

    def weight_version(self) -> str:
        """The version of its weights; `NO_VERSION` until they are verified after a change."""
        return str(self._get("/weight_info")["weight_version"])

    def set_weight_version(self, version: str) -> None:
        """Tell it the version of the weights it now has."""
        self._post("/update_weight_version", {"new_version": version})

    def world_size(self) -> int:
        """Devices it runs on."""
        return int(self._get("/get_world_size")["world_size"])

    def load_weights(self, folder: Path) -> None:
        """Let it read full weights; its cache is dropped, and it has no version until it is given one.

        Args:
            folder: With safetensors of all parameters under their checkpoint's names.

        Raises:
            ServerFailedError: it cannot load them, and is out of service until it is started anew.
        """
        self._post("/collective_rpc", {"method": "take_weights", "kwargs": {"folder": str(folder)}})
        self.forget()

    def forget(self) -> None:
        """Drop what is cached of prompts, which other weights made.

        Raises:
            ServerLostError: it does not, for somebody else keeps it at work.
        """
        for _ in range(FORGET_ATTEMPTS):
            if self._post("/reset_prefix_cache", {}).json()["success"]:
                return
            time.sleep(FORGET_SECONDS)
        raise ServerLostError(f"{self.url}: others' requests keep it from dropping its cache")

    def load_adapter(self, name: str, folder: Path) -> None:
        """Serve an adapter under a name."""
        self._post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)})

    def unload_adapter(self, name: str) -> None:
        """Serve it no longer."""
        self._post("/v1/unload_lora_adapter", {"lora_name": name})

    def complete(
        self, model: str, prompt: Sequence[int], count: int, sampling: Sampling, seed: int, ends: Ends
    ) -> list[Completion]:
        """Draw `count` completions of a prompt; each ends with one of the stop tokens, or is as long as allowed.

        Raises:
            ServerLostError: see there.
            UserError: it refuses the request.
        """
        body = {
            "model": model,
            "prompt": list(prompt),
            "n": count,
            "max_tokens": sampling.max_new_tokens,
            **NEUTRAL,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": seed,
            "ignore_eos": True,
            "stop_token_ids": list(ends.stop_ids),
            "stop": list(sampling.stop),
            "logit_bias": barring(ends.barred_ids),
            "logprobs": 0,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
        }
        choices = _json(self._post(COMPLETIONS, body))["choices"]
        ordered = sorted(choices, key=lambda choice: int(choice["index"]))
        return [
            Completion(
                choice["token_ids"], choice["logprobs"]["token_logprobs"], isinstance(choice["stop_reason"], str)
            )
            for choice in ordered
        ]

    def score(
        self, model: str, tokens: Sequence[int], start: int, top: int, *, probe: bool = False
    ) -> list[dict[int, float]]:
        """Log-probabilities, at temperature 1, of tokens that somebody else wrote.

        Args:
            model: Name of the model or adapter.
            tokens: A prompt and its completion.
            start: Where the completion begins.
            top: The likeliest tokens to tell of; 0 for none.
            probe: The answer serves to verify weights, so that the server need not have a version.

        Returns:
            For each completion token: log-probability by id of the `top` likeliest tokens and of the token itself.

        Raises:
            ServerLostError: see there.
            UserError: it refuses the request.
        """
        asked = {"max_tokens": 1, "temperature": 0, "prompt_logprobs": top}
        body = {"model": model, "prompt": list(tokens), **NEUTRAL, **asked}
        headers = {PROBE_HEADER: "1"} if probe else {}
        (choice,) = _json(self._answer("POST", COMPLETIONS, body, self.timeout, headers))["choices"]
        told = choice["prompt_logprobs"][start:]
        return [{int(token): float(entry["logprob"]) for token, entry in known.items()} for known in told]

    def _get(self, path: str) -> Any:
        return _json(self._answer("GET", path, None, QUICK_SECONDS))

    def _post(self, path: str, body: Mapping[str, Any]) -> httpx.Response:
        return self._answer("POST", path, body, self.timeout)

    def _answer(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None,
        timeout: float,
        headers: Mapping[str, str] | None = None,
    ) -> httpx.Response:
        def request() -> httpx.Response:
            return self._client.request(method, path, json=body, timeout=timeout, headers=headers)

        try:
            try:
                answer = request()
            except (httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError):
                # It ended, or closed an idle connection while the request was under way: a new connection tells which.
                # A request that changes the server is not made twice.
                if method != "GET" and path != COMPLETIONS:
                    raise
                answer = request()
        except httpx.TransportError as error:
            raise ServerLostError(f"{self.url}{path}: {type(error).__name__}: {error}") from error
        gone = answer.status_code == httpx.codes.NOT_FOUND and path == COMPLETIONS
        if answer.is_server_error or answer.status_code in PASSING or gone:
            inside = answer.status_code == httpx.codes.INTERNAL_SERVER_ERROR
            lost = ServerFailedError if inside else ServerLostError
            raise lost(f"{self.url}{path}: HTTP {answer.status_code}: {_said(answer)}")
        if answer.status_code == httpx.codes.NOT_FOUND and not path.startswith("/v1/"):
            raise UserError(
                f"the vLLM server {self.url} has no {path}: it does not run in development mode, in which it takes a "
                f"student's weights; `mopd serve rollout` starts such servers"
            )
        if answer.is_client_error:
            raise UserError(f"the vLLM server {self.url}{path} refuses with HTTP {answer.status_code}: {_said(answer)}")
        return answer


def wait_for_any(
    servers: Sequence[VllmServer], seconds: float, lost: Callable[[ServerLostError], None] = lambda error: None
) -> list[VllmServer]:
    """Those that answer, as soon as one does.

    Args:
        servers: Who may answer.
        seconds: How long one is waited for.
        lost: Told of each that does not answer when it is asked first.

    Raises:
        ServerLostError: none does in so many seconds.
    """
    deadline = time.monotonic() + seconds
    up = [server for server in servers if server.healthy()]
    for server in servers:
        if server not in up:
            lost(ServerLostError(f"{server.url} does not answer"))
    while not up:
        if time.monotonic() > deadline:
            names = ", ".join(server.url for server in servers)
            raise ServerLostError(f"no vLLM server answers in {seconds:g} s: {names}")
        time.sleep(0.5)
        up = [server for server in servers if server.healthy()]
    return up


def _json(answer: httpx.Response) -> Any:
    try:
        return answer.json()
    except ValueError as error:
        raise ServerLostError(f"{answer.url}: no JSON but {answer.text[:100]!r}") from error


def _said(answer: httpx.Response) -> str:
    """The message of an error, where it has vLLM's form."""
    try:
        return str(answer.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return answer.text[:300]
