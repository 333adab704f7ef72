"""Client of one vLLM server, which draws completions, scores tokens and loads weights.

Prompts and completions are sent as token ids, so that no tokenizer is involved between trainer and server. Weights and
adapters are folders that the server reads itself, so that trainer and server need a shared file system.
"""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx

from base.errors import UserError
from experts.endpoint import NEUTRAL
from stages.sampling.samples import Sampling
from stages.vllm.settings import KEY_VARIABLE, PROBE_HEADER, barring, is_local

# Time-out of requests that need no forward pass of the model.
QUICK_SECONDS = 10.0
CONNECTIONS = 512
# vLLM closes a connection that was idle for 5 s; a request sent at that moment gets no answer.
IDLE_SECONDS = 2.0
COMPLETIONS = "/v1/completions"
# Client errors after which another attempt may succeed. A missing model is treated alike, since a restarted server has
# not loaded the adapter yet.
TEMPORARY = {408, 425, 429}
FORGET_ATTEMPTS, FORGET_SECONDS = 20, 0.5


class ServerLostError(ConnectionError):
    """A server does not answer, is too slow, or has failed inside: another attempt may succeed."""


class ServerFailedError(ServerLostError):
    """A server answers with an internal error; the message quotes it."""


@dataclass(frozen=True)
class Completion:
    """A completion drawn by a server.

    Attributes:
        token_ids: The tokens.
        logprobs: The log-probability of each, in the server's `--logprobs-mode`.
        stopped: Whether a stop string ended it.
    """

    token_ids: list[int]
    logprobs: list[float]
    stopped: bool = False


@dataclass(frozen=True)
class Ends:
    """Token ids that end a completion, and ids that are never drawn.

    Attributes:
        stop_ids: Each of them ends a completion.
        barred_ids: Never drawn, because they are no tokens.
    """

    stop_ids: Sequence[int]
    barred_ids: Sequence[int] = ()


class VllmServer:
    """Client of one server; several threads may use it at once.

    Args:
        url: Without the final `/v1`.
        timeout: Longest time for one answer, in seconds.
    """

    def __init__(self, url: str, timeout: float) -> None:
        self.url = url
        self.timeout = timeout
        limits = httpx.Limits(
            max_connections=CONNECTIONS, max_keepalive_connections=CONNECTIONS, keepalive_expiry=IDLE_SECONDS
        )
        key = os.environ.get(KEY_VARIABLE)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        # Proxies of the environment apply to other machines only.
        self._client = httpx.Client(
            base_url=url, timeout=timeout, limits=limits, headers=headers, trust_env=not is_local(url)
        )

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def healthy(self) -> bool:
        """Whether the server answers and its engine is alive."""
        try:
            return self._request("GET", "/health", None, QUICK_SECONDS).is_success
        except httpx.TransportError:
            return False

    def models(self) -> dict[str, Mapping[str, Any]]:
        """The served models, including adapters: name -> `max_model_len`, `parent`, …"""
        return {entry["id"]: entry for entry in self._get("/v1/models")["data"]}

    def context(self) -> int:
        """The most tokens of a prompt and its completion together."""
        return int(self.models()[self.base_model()]["max_model_len"])

    def base_model(self) -> str:
        """The name of the model under its adapters."""
        return next(name for name, entry in self.models().items() if not entry.get("parent"))

    def setting(self, group: str, name: str) -> Any:
        """A setting of the server, such as `model_config`, `logprobs_mode`; None if it has no such group.

        Only a server in development mode reports its settings (and takes weights).
        """
        # The full time-out: before the first answer vLLM inspects the machine.
        answer = self._answer("GET", "/server_info?config_format=json", None, self.timeout)
        settings = _json(answer)["vllm_config"][group]
        return None if settings is None else settings[name]

    def weight_version(self) -> str:
        """The version of the server's weights; `NO_VERSION` until they are verified after a change."""
        return str(self._get("/weight_info")["weight_version"])

    def set_weight_version(self, version: str) -> None:
        """Set the version of the weights that the server has now."""
        self._post("/update_weight_version", {"new_version": version})

    def world_size(self) -> int:
        """Number of devices that the server runs on."""
        return int(self._get("/get_world_size")["world_size"])

    def load_weights(self, folder: Path) -> None:
        """Load full weights from a folder; the server's cache is dropped, and it has no version until one is set.

        Args:
            folder: With safetensors of all parameters under their names in the checkpoint.

        Raises:
            ServerFailedError: the server cannot load them, and is out of service until it is restarted.
        """
        self._post("/collective_rpc", {"method": "take_weights", "kwargs": {"folder": str(folder)}})
        self.forget()

    def forget(self) -> None:
        """Drop the prefix cache, which older weights filled.

        Raises:
            ServerLostError: the server does not drop it, because it is busy with requests of other clients.
        """
        for _ in range(FORGET_ATTEMPTS):
            if self._post("/reset_prefix_cache", {}).json()["success"]:
                return
            time.sleep(FORGET_SECONDS)
        raise ServerLostError(f"{self.url}: requests of other clients keep it from dropping its cache")

    def load_adapter(self, name: str, folder: Path) -> None:
        """Serve an adapter under a name."""
        self._post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)})

    def unload_adapter(self, name: str) -> None:
        """Stop serving an adapter."""
        self._post("/v1/unload_lora_adapter", {"lora_name": name})

    def complete(
        self, model: str, prompt: Sequence[int], count: int, sampling: Sampling, seed: int, ends: Ends
    ) -> list[Completion]:
        """Draw `count` completions of a prompt; each ends with a stop token or stop string, or has the maximum length.

        Raises:
            ServerLostError: the server does not answer, or fails.
            UserError: the server refuses the request.
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
        """Log-probabilities, at temperature 1, of given tokens.

        Args:
            model: Name of the model or adapter.
            tokens: A prompt and its completion.
            start: Index of the completion's first token.
            top: Number of likeliest tokens to report; 0 for none.
            probe: Whether the answer serves to verify weights; the server then answers without a version.

        Returns:
            For each completion token: log-probability by id of the `top` likeliest tokens and of the token itself.

        Raises:
            ServerLostError: the server does not answer, or fails.
            UserError: the server refuses the request.
        """
        options = {"max_tokens": 1, "temperature": 0, "prompt_logprobs": top}
        body = {"model": model, "prompt": list(tokens), **NEUTRAL, **options}
        headers = {PROBE_HEADER: "1"} if probe else {}
        (choice,) = _json(self._answer("POST", COMPLETIONS, body, self.timeout, headers))["choices"]
        by_token = choice["prompt_logprobs"][start:]
        return [{int(token): float(entry["logprob"]) for token, entry in by_id.items()} for by_id in by_token]

    def _get(self, path: str) -> Any:
        return _json(self._answer("GET", path, None, QUICK_SECONDS))

    def _post(self, path: str, body: Mapping[str, Any]) -> httpx.Response:
        return self._answer("POST", path, body, self.timeout)

    def _request(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None,
        timeout: float,
        headers: Mapping[str, str] | None = None,
    ) -> httpx.Response:
        """Send a request, a second time if the connection closes before the answer.

        The server ended, or closed an idle connection during the request; a second attempt on a new connection shows
        which. A request that changes the server is not sent twice.
        """
        send = partial(self._client.request, method, path, json=body, timeout=timeout, headers=headers)
        try:
            return send()
        except (httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError):
            if method != "GET" and path != COMPLETIONS:
                raise
            return send()

    def _answer(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None,
        timeout: float,
        headers: Mapping[str, str] | None = None,
    ) -> httpx.Response:
        try:
            answer = self._request(method, path, body, timeout, headers)
        except httpx.TransportError as error:
            raise ServerLostError(f"{self.url}{path}: {type(error).__name__}: {error}") from error
        gone = answer.status_code == httpx.codes.NOT_FOUND and path == COMPLETIONS
        if answer.is_server_error or answer.status_code in TEMPORARY or gone:
            internal = answer.status_code == httpx.codes.INTERNAL_SERVER_ERROR
            lost = ServerFailedError if internal else ServerLostError
            raise lost(f"{self.url}{path}: HTTP {answer.status_code}: {_error_message(answer)}")
        if answer.status_code == httpx.codes.NOT_FOUND and not path.startswith("/v1/"):
            raise UserError(
                f"the vLLM server {self.url} has no {path}: it does not run in development mode, which is needed to "
                f"load a student's weights; `mopd serve rollout` starts such servers"
            )
        if answer.status_code == httpx.codes.UNAUTHORIZED:
            raise UserError(
                f"the vLLM server {self.url} has another key: set {KEY_VARIABLE} to it, for this run as for the server"
            )
        if answer.is_client_error:
            raise UserError(
                f"the vLLM server {self.url}{path} refuses with HTTP {answer.status_code}: {_error_message(answer)}"
            )
        return answer


def wait_for_any(
    servers: Sequence[VllmServer], seconds: float, lost: Callable[[ServerLostError], None] = lambda error: None
) -> list[VllmServer]:
    """Wait until a server answers; returns all that answer then.

    Args:
        servers: The servers to try.
        seconds: Longest time to wait.
        lost: Called for each server that does not answer the first request.

    Raises:
        ServerLostError: none answers in time.
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


def _error_message(answer: httpx.Response) -> str:
    """The message of an error in vLLM's format; else the beginning of the body."""
    try:
        return str(answer.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return answer.text[:300]
