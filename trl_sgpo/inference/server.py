"""A model behind an OpenAI-compatible server, with the methods of [`~trl_sgpo.inference.model.TwoPhaseModel`]."""

import json
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

import httpx
from tqdm.auto import tqdm

from ..errors import ModelError
from ..method.control_tokens import REASONING_MARKS, TextEncoder
from ..method.conversation import execution_messages
from ..method.problem import Problem
from ..method.prompts import (
    ParsedStrategy,
    Prompt,
    as_text,
    parse_strategy,
    plain_bridge,
    problem_text,
    strategy_prompt,
)
from .model import Decoding, Stream
from .settings import TwoPhaseSettings


TOKEN_VARIABLE = "TRL_SGPO_SERVER_TOKEN"
_TRY_AGAIN = (408, 409, 425, 429, 500, 502, 503, 504)
_LONGEST_WAIT = 60.0


class ServerModel:
    """
    Writes and executes strategies by chat completions of a server: vLLM, llama.cpp, `transformers serve` or others.
    Problems of a model that was trained on texts are completed as texts.

    Args:
        url (`str`):
            Base address with its version, such as `http://127.0.0.1:8000/v1`.
        name (`str`):
            The model's name on the server.
        settings ([`~trl_sgpo.inference.settings.TwoPhaseSettings`], *optional*):
            Prompts and limits.
        token (`str`, *optional*):
            Sent as bearer token.
        concurrency (`int`, *optional*, defaults to `8`):
            Requests at a time.
        timeout (`float`, *optional*, defaults to `600.0`):
            Seconds to wait for an answer.
        retries (`int`, *optional*, defaults to `5`):
            Number of times that a request is repeated after a dropped connection, a timeout, status 429 or 5xx.
        first_wait (`float`, *optional*, defaults to `1.0`):
            Seconds before the first repetition, doubled for each further one, unless the server says how long.

    Attributes:
        encoder ([`~trl_sgpo.method.control_tokens.TextEncoder`] or `None`): Knows the control tokens of the model, in
            which a space is put where a text holds them. Without it the server encodes texts as it does.
        generated_tokens (`int`): Tokens generated so far, as the server counts them.
        listed (`list[str]`): Names of models that the server lists, after [`ServerModel.list_models`].
    """

    def __init__(
        self,
        url: str,
        name: str,
        settings: TwoPhaseSettings | None = None,
        token: str | None = None,
        concurrency: int = 8,
        timeout: float = 600.0,
        retries: int = 5,
        first_wait: float = 1.0,
    ):
        self.base = url.rstrip("/")
        self.url = f"{self.base}/chat/completions"
        self.name = name
        self.settings = settings or TwoPhaseSettings()
        self.concurrency, self.retries, self.first_wait = concurrency, retries, first_wait
        self.generated_tokens = 0
        self._separates_reasoning = False
        self.encoder: TextEncoder | None = None
        self.listed: list[str] = []
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._client = httpx.Client(headers=headers, timeout=httpx.Timeout(timeout, connect=10.0))

    def list_models(self) -> list[str]:
        """
        Requests the list of models, without repetition. Not every server has one.

        Returns:
            `list[str]`: Names, empty if the server has no list.

        Raises:
            [`ModelError`]: There is no server.
        """
        try:
            response = self._client.get(f"{self.base}/models", timeout=10.0)
        except (httpx.UnsupportedProtocol, httpx.InvalidURL, UnicodeError) as error:
            raise self._no_address(error) from error
        except httpx.HTTPError as error:
            reason = str(error) or type(error).__name__
            raise ModelError(
                f"No server answers at {self.base} ({reason}): start it, or correct `--server`."
            ) from error
        try:
            self.listed = [str(entry["id"]) for entry in response.json()["data"]]
        except (ValueError, LookupError, TypeError):
            self.listed = []
        return self.listed

    def write_strategies(
        self,
        problems: Sequence[Problem],
        decoding: Decoding | None = None,
        progress: str | None = None,
        stream: Stream | None = None,
    ) -> list[ParsedStrategy]:
        """Writes a strategy for each problem."""
        requests = [self._request(problem) for problem in problems]
        written = self._complete(requests, self.settings.max_strategy_length, decoding, progress, stream)
        opened = self.settings.opens_reasoning and not self._separates_reasoning
        return [
            replace(parse_strategy(text, self.settings.strategy_format, truncated, opened), sampled=text)
            for text, truncated in written
        ]

    def execute(
        self,
        problems: Sequence[Problem],
        strategies: Sequence[str | ParsedStrategy],
        decoding: Decoding | None = None,
        progress: str | None = None,
        stream: Stream | None = None,
    ) -> list[str]:
        """Executes a strategy on each problem."""
        requests = [
            self._execution_request(problem, strategy) for problem, strategy in zip(problems, strategies, strict=True)
        ]
        completed = self._complete(requests, self.settings.max_completion_length, decoding, progress, stream)
        return [text.strip() for text, _ in completed]

    def answer(
        self, prompts: Sequence[Prompt], decoding: Decoding | None = None, progress: str | None = None
    ) -> list[str]:
        """Answers prompts as they are, without a strategy."""
        requests = [self._prompt(prompt) for prompt in prompts]
        completed = self._complete(requests, self.settings.max_completion_length, decoding, progress)
        return [text.strip() for text, _ in completed]

    def _request(self, problem: Problem) -> Prompt:
        chat = not self.settings.plain_text
        return self._prompt(strategy_prompt(problem.prompt, self.settings.strategy_prompt, problem.shown, chat))

    def _execution_request(self, problem: Problem, strategy: str | ParsedStrategy) -> Prompt:
        if isinstance(strategy, ParsedStrategy):
            strategy = strategy.sampled if isinstance(strategy.sampled, str) else strategy.as_written
        strategy = self._without_control(strategy, REASONING_MARKS)
        request, execution_prompt = self._request(problem), self.settings.execution_prompt
        if isinstance(request, str):
            return f"{request}{strategy}{self.settings.turn_end or ''}{plain_bridge(execution_prompt)}"
        return execution_messages(request, strategy, execution_prompt)

    def _prompt(self, prompt: Prompt) -> Prompt:
        if self.settings.plain_text:
            return self._without_control(as_text(prompt))
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        if self.encoder is None:
            return messages
        return [message | {"content": self._without_control(problem_text([message]))} for message in messages]

    def _without_control(self, text: str, but: Sequence[str] = ()) -> str:
        return text if self.encoder is None else self.encoder.broken(text, but)

    def _complete(
        self,
        requests: list[Prompt],
        limit: int,
        decoding: Decoding | None,
        progress: str | None,
        stream: Stream | None = None,
    ) -> list[tuple[str, bool]]:
        """Texts, and whether each was cut off by length."""
        decoding = decoding or Decoding()
        common: dict[str, Any] = {"model": self.name, "max_tokens": limit, "temperature": 0.0}
        if not decoding.greedy:
            common |= {"temperature": decoding.temperature, "top_p": decoding.top_p}
        if self.settings.chat_template_kwargs:
            common["chat_template_kwargs"] = self.settings.chat_template_kwargs
        bodies = [
            {
                **common,
                ("prompt" if isinstance(request, str) else "messages"): request,
                "seed": decoding.seed + position,
            }
            for position, request in enumerate(requests)
        ]
        with ThreadPoolExecutor(self.concurrency) as workers:
            answers = list(
                tqdm(
                    workers.map(partial(self._post, stream=stream), bodies),
                    total=len(bodies),
                    desc=progress,
                    unit="text",
                    leave=False,
                    disable=progress is None,
                )
            )
        self.generated_tokens += sum(tokens for _, _, tokens in answers)
        return [(text, truncated) for text, truncated, _ in answers]

    def _post(self, body: dict[str, Any], stream: Stream | None = None) -> tuple[str, bool, int]:
        """Text, whether it was cut off, and its tokens. A request is not repeated after `stream` received text."""
        url = f"{self.base}/completions" if "prompt" in body else self.url
        for attempt in range(self.retries + 1):
            wait = min(self.first_wait * 2**attempt, _LONGEST_WAIT)
            try:
                if stream is None:
                    response = self._client.post(url, json=body)
                else:
                    with self._client.stream("POST", url, json=body | {"stream": True}) as response:
                        if response.is_success and "event-stream" in response.headers.get("Content-Type", ""):
                            return self._read_stream(response, stream)
                        response.read()
            except (httpx.UnsupportedProtocol, httpx.InvalidURL, UnicodeError) as error:
                raise self._no_address(error) from error
            except httpx.HTTPError as error:
                reason = str(error) or type(error).__name__
            else:
                if response.is_success:
                    answer = self._read(response)
                    if stream is not None:
                        stream(answer[0])
                    return answer
                reason = f"status {response.status_code}: {response.text[:200]}"
                if response.status_code not in _TRY_AGAIN:
                    raise ModelError(
                        f"The server at {self.url} refuses requests with {reason}. Check `--server` (with its /v1), "
                        f"the name of the model, {self._name_and_listed()}, and, if it asks for a token, the "
                        f"environment variable {TOKEN_VARIABLE}."
                    )
                asked = response.headers.get("Retry-After", "")
                wait = min(float(asked), _LONGEST_WAIT) if asked.isdecimal() else wait
            if attempt < self.retries:
                time.sleep(wait)
        raise ModelError(
            f"The server at {self.url} failed {self.retries + 1} times, at last with {reason}. Check the name of the "
            f"model, {self._name_and_listed()}. Once the server is up, run the same command again: what was written "
            "to files is kept and continued. If it is overloaded, lower `--concurrency` or raise `--timeout`."
        )

    def _no_address(self, error: Exception) -> ModelError:
        return ModelError(f"{self.base} is no address of a server ({error}): correct `--server`.")

    def _name_and_listed(self) -> str:
        listed = f" (the server lists {', '.join(self.listed[:8])})" if self.listed else ""
        return f"`{self.name}`{listed}"

    def _read_stream(self, response: httpx.Response, stream: Stream) -> tuple[str, bool, int]:
        """Reads server-sent events and passes on their text."""
        text, truncated, tokens = "", False, 0
        try:
            for line in response.iter_lines():
                data = line.removeprefix("data:").strip()
                if not line.startswith("data:") or data == "[DONE]":
                    continue
                event = json.loads(data)
                tokens = (event.get("usage") or {}).get("completion_tokens") or tokens
                if "choices" not in event:
                    raise ModelError(f"The server at {self.url} stopped with an error: {data[:200]}. See its log.")
                for choice in event["choices"]:
                    if piece := choice.get("text") or self._content(choice.get("delta") or {}):
                        text += piece
                        stream(piece)
                    truncated = truncated or choice.get("finish_reason") == "length"
        except httpx.HTTPError as error:
            reason = str(error) or type(error).__name__
            raise ModelError(
                f"The connection to {self.url} broke off ({reason}): run the same command again."
            ) from error
        except (ValueError, TypeError, AttributeError) as error:
            raise ModelError(
                f"The server at {self.url} does not stream like a server of chat completions ({error}): check "
                "`--server`, with its /v1."
            ) from error
        return text, truncated, int(tokens)

    def _content(self, message: dict[str, Any]) -> str:
        """Content of a message or of its next piece. It is `None` in a reasoning part that the server separates."""
        self._separates_reasoning |= bool(message.get("reasoning_content") or message.get("reasoning"))
        return message.get("content") or ""

    def _read(self, response: httpx.Response) -> tuple[str, bool, int]:
        try:
            answer = response.json()
            choice = answer["choices"][0]
            text = choice["text"] if "text" in choice else self._content(choice["message"])
            tokens = (answer.get("usage") or {}).get("completion_tokens") or 0
            return str(text), choice.get("finish_reason") == "length", int(tokens)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise ModelError(
                f"The server at {self.url} does not answer like a server of chat completions "
                f"({response.text[:200]!r}): check `--server`, with its /v1."
            ) from error
