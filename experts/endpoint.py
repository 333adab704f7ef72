"""An OpenAI-compatible endpoint: requests with retries, and errors that name the cause if none is answered."""

import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from base.errors import UserError

if TYPE_CHECKING:
    import httpx

CHAT = "/chat/completions"
FIRST_BACKOFF_SECONDS = 0.5
LONGEST_BACKOFF_SECONDS = 30.0
# The only client errors that are temporary.
_PASSING = {408, 409, 425, 429}
# Client errors about the request's content, not about the client: it is too long for the model, or refused by it.
_OF_THE_CONTENT = {400, 413, 422}

# Neutral values, sent to override a server's own: vLLM takes missing ones from its model's generation_config. Those in
# the second group are specific to vLLM, and other endpoints may refuse them as unknown.
_OF_OPENAI: dict[str, Any] = {"top_p": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
_OF_VLLM: dict[str, Any] = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "min_tokens": 0}
NEUTRAL: dict[str, Any] = _OF_OPENAI | _OF_VLLM


class ContentRefusedError(UserError):
    """The endpoint refuses one request because of its content; others may be answered."""


@dataclass(frozen=True)
class Endpoint:
    """The address of an endpoint, and the limits of waiting for it.

    Attributes:
        key: The options in the run file, `domains.NAME.options`, for the messages of errors.
        url: The URL, with or without the final `/v1`.
        api_key_env: Environment variable that holds the API key.
        timeout_seconds: Longest wait for the next part of an answer.
        retries: New attempts after a failure.
        unknown: Names of `NEUTRAL` that the endpoint has refused as unknown.
    """

    key: str
    url: str
    api_key_env: str | None
    timeout_seconds: float
    retries: int
    unknown: set[str] = field(default_factory=set, compare=False)

    @property
    def base(self) -> str:
        """The address to which paths are appended."""
        return self.url.rstrip("/").removesuffix("/v1").rstrip("/") + "/v1"

    def client(self) -> "httpx.Client":
        """An HTTP client whose connections several threads can share.

        Raises:
            UserError: the environment has no such API key.
        """
        import httpx

        headers = {"Content-Type": "application/json"}
        if self.api_key_env is not None:
            if not os.environ.get(self.api_key_env):
                raise UserError(f"{self.key}.api_key_env: no variable '{self.api_key_env}' in the environment")
            headers["Authorization"] = f"Bearer {os.environ[self.api_key_env]}"
        return httpx.Client(headers=headers, timeout=self.timeout_seconds)

    def models(self, retries: int | None = None) -> list[str]:
        """Names of the models served.

        Args:
            retries: Used instead of the endpoint's own number.

        Raises:
            UserError: the answer lists no models; otherwise as `request`.
        """
        with self.client() as client:
            body = self.request(client, "GET", "/models", retries=retries)
        try:
            return [str(entry["id"]) for entry in body["data"]]
        except (KeyError, TypeError):
            raise UserError(f"{self.key}.url: {self.base}/models lists no models: {json.dumps(body)[:300]}") from None

    def chat(self, client: "httpx.Client", body: Mapping[str, Any]) -> Any:
        """Request a chat completion at neutral sampling values, except for those in `body`.

        If an endpoint refuses some of them as unknown, this request is repeated without them, and later ones omit them.

        Returns:
            The answer's JSON.

        Raises:
            ContentRefusedError: the request is refused because of its content; otherwise as `request`.
        """
        dropped: set[str] = set()
        while True:
            sent = {name: value for name, value in NEUTRAL.items() if name not in self.unknown | dropped}
            try:
                answer = self.request(client, "POST", CHAT, sent | dict(body))
            except ContentRefusedError as error:
                named = {name for name in sent if name in str(error)}
                if not named:
                    raise
                # The refusal names one of vLLM's values first; the others would be next.
                dropped |= named | (_OF_VLLM.keys() if named & _OF_VLLM.keys() else set())
            else:
                # Only after an answer, because a refusal may quote a key from the request's text.
                self.unknown.update(dropped)
                return answer

    def request(
        self,
        client: "httpx.Client",
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        retries: int | None = None,
    ) -> Any:
        """Send a request until it is answered, doubling the wait after each failure.

        Returns:
            The answer's JSON.

        Raises:
            ContentRefusedError: the request is refused because of its content.
            UserError: it is refused for another reason, or the answer is not JSON.
            ConnectionError: every attempt found no server, timed out or met a failing server.
        """
        import httpx

        content = None if body is None else json.dumps(body)
        attempts = 1 + (self.retries if retries is None else retries)
        failure = ""
        for attempt in range(attempts):
            if attempt:
                time.sleep(min(FIRST_BACKOFF_SECONDS * 2 ** (attempt - 1), LONGEST_BACKOFF_SECONDS))
            try:
                answer = client.request(method, self.base + path, content=content)
            except httpx.TransportError as error:
                failure = f"{type(error).__name__}: {error}"
                continue
            if answer.is_success:
                try:
                    return answer.json()
                except ValueError:
                    raise UserError(
                        f"{self.key}.url: {self.base}{path} returned no JSON: {answer.text[:300]!r}"
                    ) from None
            failure = f"HTTP {answer.status_code}: {answer.text[:300]}"
            if answer.status_code < 500 and answer.status_code not in _PASSING:
                refused = ContentRefusedError if answer.status_code in _OF_THE_CONTENT else UserError
                raise refused(f"{self.key}.url: {self.base}{path} refuses the request with {failure}")
        raise ConnectionError(f"{self.key}.url: no answer from {self.base}{path} in {attempts} attempt(s): {failure}")
