"""A model behind an OpenAI-compatible server, with the methods of [`~trl_sgpo.inference.model.TwoPhaseModel`]."""

import logging
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx
from tqdm.auto import tqdm

from ..checks.addresses import address_problem, header_problem
from ..checks.http_limits import Answer, AnswerRefused, LimitedClient, limited_client
from ..checks.json_text import parse_json
from ..checks.secrets import without_sent
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
from .chat_completions import Completion, CompletionFailed, NoCompletion, StreamedCompletion, read_completion
from .model import Decoding, Stream
from .pretrained import load_tokenizer
from .settings import TwoPhaseSettings


logger = logging.getLogger(__name__)

TOKEN_VARIABLE = "TRL_SGPO_SERVER_TOKEN"
_TRY_AGAIN = (408, 409, 425, 429, 500, 502, 503, 504)
_LONGEST_WAIT = 60.0
LIST_SECONDS = 10.0
MAX_ANSWER_BYTES = 8 * 2**20  # its JSON takes about twenty times as much memory, for each request at a time
MOST_CHARACTERS = 64  # of a token. What an answer has beyond the tokens that were asked for is cut off
_TOKENIZER = "tokenizer_config.json"
_LIKE_CONTROL = re.compile(r"<[|\uff5c][^|\uff5c<>\s]{1,64}[|\uff5c]>")  # some models write the wide bar
_ADDRESSES = "http://127.0.0.1:8000/v1 or https://example.org/v1"


def encoder_of(name: str, named_by_user: bool) -> TextEncoder | None:
    """
    The encoder of a model whose tokenizer is on this machine. Nothing is downloaded.

    Args:
        name (`str`):
            A Hub id that may be in the Hugging Face cache, or a directory.
        named_by_user (`bool`):
            Whether the user named the model. A directory that only the server names is not read.

    Returns:
        [`~trl_sgpo.method.control_tokens.TextEncoder`] or `None`: `None` if the tokenizer is not there.
    """
    from huggingface_hub import try_to_load_from_cache

    try:
        if named_by_user and Path(name, _TOKENIZER).is_file():
            return TextEncoder(load_tokenizer(name))
        found = try_to_load_from_cache(name, _TOKENIZER)
        if isinstance(found, str):  # its folder, because one here may have the same name
            return TextEncoder(load_tokenizer(Path(found).parent))
    except (OSError, ValueError):  # the name means something on the server only
        pass
    return None


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
            Time limit of a request in seconds, up to the end of the answer.
        retries (`int`, *optional*, defaults to `5`):
            Number of times that a request is repeated after a dropped connection, a timeout, status 429 or 5xx.
        first_wait (`float`, *optional*, defaults to `1.0`):
            Seconds before the first repetition, doubled for each further one, unless the server says how long.

    Raises:
        [`ModelError`]: If the address or the token cannot be one.

    Attributes:
        encoder ([`~trl_sgpo.method.control_tokens.TextEncoder`] or `None`): Knows the control tokens of the model, in
            which a space is put where a text holds them. Without it texts are sent as they are, and a warning names
            the first `<|…|>` in one.
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
        headers = {"Authorization": f"Bearer {token.strip()}"} if token else {}
        problem = address_problem(url, "a server, `--server`,", _ADDRESSES, TOKEN_VARIABLE)
        if problem := problem or header_problem(headers, "the server", TOKEN_VARIABLE):
            raise ModelError(problem)
        self._sent = headers
        self.base = url.rstrip("/")
        self.url = f"{self.base}/chat/completions"
        self.name = name
        self.settings = settings or TwoPhaseSettings()
        self.concurrency, self.retries, self.first_wait = concurrency, retries, first_wait
        self.generated_tokens = 0
        self._separates_reasoning = False
        self._limit_key = "max_tokens"
        self.encoder: TextEncoder | None = None
        self._warned_of_control = False
        self.listed: list[str] = []
        self._timeout = timeout
        self._headers = headers

    def list_models(self) -> list[str]:
        """
        Requests the list of models, without repetition. Not every server has one.

        Returns:
            `list[str]`: Names, empty if the server has no list.

        Raises:
            [`ModelError`]: There is no server.
        """
        try:
            with self._client() as client:
                answer = client.request("GET", f"{self.base}/models", LIST_SECONDS)
        except (httpx.UnsupportedProtocol, httpx.InvalidURL, UnicodeError) as error:
            raise self._no_address(error) from error
        except (httpx.HTTPError, TimeoutError, AnswerRefused) as error:
            raise ModelError(
                f"No server answers at {self.base} ({_reason(error)}): start it, or correct `--server`."
            ) from error
        try:
            self.listed = [str(entry["id"]) for entry in parse_json(answer.content)["data"]]
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
            replace(
                parse_strategy(each.text, self.settings.strategy_format, each.truncated, opened), sampled=each.text
            )
            for each in written
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
        return [each.text for each in completed]

    def answer(
        self,
        prompts: Sequence[Prompt],
        decoding: Decoding | None = None,
        progress: str | None = None,
        stream: Stream | None = None,
        limit: int | None = None,
    ) -> list[str]:
        """Answers prompts as they are, without a strategy."""
        requests = [self._prompt(prompt) for prompt in prompts]
        limit = self.settings.max_completion_length if limit is None else limit
        completed = self._complete(requests, limit, decoding, progress, stream)
        return [each.text for each in completed]

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
            for message in messages:
                self._without_control(problem_text([message]))
            return messages
        for message in messages:
            self.encoder.check_fields(message)
        return [message | {"content": self._without_control(problem_text([message]))} for message in messages]

    def _without_control(self, text: str, but: Sequence[str] = ()) -> str:
        if self.encoder is not None:
            return self.encoder.broken(text, but)
        found = _LIKE_CONTROL.search(text)
        if found is not None and not self._warned_of_control:
            self._warned_of_control = True
            logger.warning(
                "A problem or strategy holds %s, which is sent unchanged and may be a control token of the server's "
                "model: name its run (`--run`), or download its tokenizer and name it as on the Hub, and a space is "
                "put into control tokens.",
                found[0],
            )
        return text

    def _complete(
        self,
        requests: list[Prompt],
        limit: int,
        decoding: Decoding | None,
        progress: str | None,
        stream: Stream | None = None,
    ) -> list[Completion]:
        decoding = decoding or Decoding()
        common: dict[str, Any] = {"model": self.name, self._limit_key: limit, "temperature": 0.0}
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
        with ThreadPoolExecutor(self.concurrency) as workers, self._client() as client:
            completed = list(
                tqdm(
                    workers.map(partial(self._post, limit=limit, client=client, stream=stream), bodies),
                    total=len(bodies),
                    desc=progress,
                    unit="text",
                    leave=False,
                    disable=progress is None,
                )
            )
        self.generated_tokens += sum(each.tokens for each in completed)
        self._separates_reasoning |= any(each.reasoned for each in completed)
        self._warn_of_missing_texts(completed)
        return completed

    @contextmanager
    def _client(self) -> Iterator[LimitedClient]:
        timeout = httpx.Timeout(self._timeout, connect=10.0)
        with limited_client(self._headers, MAX_ANSWER_BYTES, timeout=timeout) as client:
            yield client

    def _post(
        self, body: dict[str, Any], limit: int, client: LimitedClient, stream: Stream | None = None
    ) -> Completion:
        """A request is not repeated after `stream` received text."""
        url = f"{self.base}/completions" if "prompt" in body else self.url
        for attempt in range(self.retries + 1):
            wait = min(self.first_wait * 2**attempt, _LONGEST_WAIT)
            events = None if stream is None else StreamedCompletion(stream)
            try:
                answer = self._send(client, url, body, events)
                if answer.is_success:
                    return self._read(answer, events, stream).at_most(limit * MOST_CHARACTERS)
            except (httpx.UnsupportedProtocol, httpx.InvalidURL, UnicodeError) as error:
                raise self._no_address(error) from error
            except NoCompletion as error:
                raise ModelError(
                    f"The server at {self.url} does not answer like a server of chat completions ({error}): check "
                    "`--server`, with its /v1."
                ) from error
            except CompletionFailed as error:
                raise ModelError(f"The server at {self.url} failed: {error}. See its log.") from error
            except AnswerRefused as error:
                raise ModelError(f"The server at {self.url} cannot be used: {error}.") from error
            except (httpx.HTTPError, TimeoutError) as error:
                reason = _reason(error)
                if events is not None and events.started:
                    raise ModelError(
                        f"The connection to {self.url} broke off ({reason}): run the same command again."
                    ) from error
            else:
                reason = f"status {answer.status}: {without_sent(answer.text, self._sent)[:200]}"
                if answer.status not in _TRY_AGAIN:
                    raise ModelError(
                        f"The server at {self.url} refuses requests with {reason}. Check `--server` (with its /v1), "
                        f"the name of the model, {self._name_and_listed()}, and, if it asks for a token, the "
                        f"environment variable {TOKEN_VARIABLE}."
                    )
                asked = answer.headers.get("Retry-After", "")
                wait = min(float(asked), _LONGEST_WAIT) if asked.isdecimal() else wait
            if attempt < self.retries:
                client.sleep(wait)
        raise ModelError(
            f"The server at {self.url} failed {self.retries + 1} times, at last with {reason}. Check the name of the "
            f"model, {self._name_and_listed()}. Once the server is up, run the same command again: what was written "
            "to files is kept and continued. If it is overloaded, lower `--concurrency` or raise `--timeout`."
        )

    def _send(
        self, client: LimitedClient, url: str, body: dict[str, Any], events: StreamedCompletion | None
    ) -> Answer:
        """Sends a request, and again where the server wants the other name of the limit of tokens."""
        if events is not None:
            body = body | {"stream": True}
        on_line = None if events is None else events.read_line
        answer = client.request("POST", url, self._timeout, body, on_line)
        if answer.status == 400 and "max_tokens" in body and "max_completion_tokens" in answer.text:
            self._limit_key = "max_completion_tokens"
            body = {self._limit_key if key == "max_tokens" else key: value for key, value in body.items()}
            answer = client.request("POST", url, self._timeout, body, on_line)
        return answer

    def _read(self, answer: Answer, events: StreamedCompletion | None, stream: Stream | None) -> Completion:
        if events is not None and not answer.content:
            return events.completion()
        completion = read_completion(answer.content)
        if stream is not None:
            stream(completion.text)
        return completion

    def _warn_of_missing_texts(self, completed: list[Completion]) -> None:
        empty = [each for each in completed if not each.text]
        filtered = sum(each.filtered for each in completed)
        reasoned = sum(each.reasoned and not each.filtered for each in empty)
        if filtered:
            logger.warning(
                "The content filter of the server at %s withheld %d of %d texts (`content_filter`).",
                self.url,
                filtered,
                len(completed),
            )
        if reasoned:
            logger.warning(
                "%d of %d texts of the server at %s are reasoning only (`reasoning_content`): raise "
                "`--max_strategy_length` and `--max_completion_length`, or switch reasoning off on the server.",
                reasoned,
                len(completed),
                self.url,
            )

    def _no_address(self, error: Exception) -> ModelError:
        return ModelError(f"{self.base} is no address of a server ({error}): correct `--server`.")

    def _name_and_listed(self) -> str:
        listed = f" (the server lists {', '.join(self.listed[:8])})" if self.listed else ""
        return f"`{self.name}`{listed}"


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__
