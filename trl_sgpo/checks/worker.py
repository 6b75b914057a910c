"""
Process that compares mathematical expressions, runs the verifiers of reasoning-gym, renders chat templates, matches
patterns of adapters, opens models and decodes Parquet files, so that none of these can stop the caller or fill its
memory.

It is started as a script by [`~trl_sgpo.checks.process.CheckProcess`], with its limit of memory in GiB, and imports
nothing of this package. A line of standard input is a JSON list, the name of a request and its arguments; a line of
standard output is the reply. It ends with its input and at its limit of memory, or is ended by the system when a
request takes too long.
"""

import copy
import json
import os
import re
import sys
import tempfile
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import IO, Any


SECONDS = {"equal": 2, "entry": 5, "accepts": 5, "render": 2, "patterns": 2, "opens": 60, "decodes": 300}
MAX_RENDERED, MAX_PRINTED, MAX_ENTRY = 2**22, 2**20, 2**18
DIRECTIONS = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
SAMPLE = "".join(map(chr, range(32, 127))) + "\n\u00e9\u4e2d\U0001f642"
FORMS = "PATTERN", r"(.*\.)?(PATTERN)$", r"(^|.*\.)PATTERN($|\..*)", r"(?:^|.*?\.)PATTERN\.(?P<idx>\d+)\."


@lru_cache(4096)
def read(text: str) -> list[Any]:
    """Parses an expression."""
    from math_verify import LatexExtractionConfig, parse

    return parse(f"${text}$", extraction_config=[LatexExtractionConfig()], parsing_timeout=None)


def differ(first: Any, second: Any) -> bool:
    """Whether two expressions have clearly different values for some values of their variables."""
    from sympy import Expr, Rational

    if not (isinstance(first, Expr) and isinstance(second, Expr)):
        return False
    variables = sorted(first.free_symbols | second.free_symbols, key=str)
    values = {variable: Rational(7 * place + 3, 5 * place + 2) for place, variable in enumerate(variables, start=1)}
    try:
        one, other = (complex(expression.evalf(15, subs=values)) for expression in (first, second))
    except (ArithmeticError, AttributeError, TypeError, ValueError):  # no number, such as a limit
        return False
    return abs(one - other) > 1e-3 * max(abs(one), abs(other))


def equal(gold: str, answer: str) -> bool:
    """Whether two expressions are equal. Different values decide first: they are found a hundred times faster."""
    from math_verify import verify

    sides = [read(gold), read(answer)]
    if not all(sides) or differ(sides[0][0], sides[1][0]):
        return False
    return bool(verify(*sides, timeout_seconds=None))


@lru_cache(64)
def dataset(family: str, settings: str) -> Any:
    """A reasoning-gym dataset. `settings` is a JSON object."""
    import reasoning_gym

    return reasoning_gym.create_dataset(family, **json.loads(settings))


@lru_cache(4096)
def problem(family: str, settings: str, index: int) -> dict[str, Any]:
    """A problem of a reasoning-gym family, generated again."""
    return dataset(family, settings)[index]


def entry(family: str, settings: str, index: int) -> dict[str, Any] | None:
    """A problem as JSON has it, `None` if it is too long."""
    found = problem(family, settings, index)
    return found if len(json.dumps(found, default=str)) <= MAX_ENTRY else None


def accepts(family: str, settings: str, index: int, answer: str) -> bool:
    """Whether the verifier of a family accepts an answer."""
    found = problem(family, settings, index)
    return bool(dataset(family, settings).score_answer(answer, found) >= 0.99)


@lru_cache(1)
def renderer() -> Any:
    """A tokenizer that has no vocabulary and is given its templates."""
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

    return PreTrainedTokenizerBase()


def render(messages: list[dict[str, Any]], variables: dict[str, Any]) -> tuple[str, str] | None:
    """What a chat template makes of a conversation: the kind of the outcome, and the text or error."""
    from jinja2 import TemplateError

    try:
        text = renderer().apply_chat_template(messages, tokenize=False, **variables)
    except TemplateError as error:
        return "refused", str(error)[:1000]
    except MemoryError:
        raise
    except OverflowError:
        return None
    except Exception as error:
        return "failed", " ".join(f"{type(error).__name__}: {str(error)[:200]}".split())
    return ("text", text) if len(text) <= MAX_RENDERED else None


def patterns(texts: list[str], names: list[str]) -> bool:
    """Matches patterns against names, alone and in all that peft puts around them. What is none is left to peft."""
    for text in texts:
        for form in FORMS:
            try:
                pattern = re.compile(form.replace("PATTERN", text))
            except re.error:
                continue
            for name in names:
                pattern.fullmatch(name)
                pattern.search(name)
    return True


@contextmanager
def printed() -> Iterator[IO[bytes]]:
    """A file with all that this process prints, also from libraries that are not written in Python."""
    with tempfile.TemporaryFile() as file:
        before = [os.dup(descriptor) for descriptor in (1, 2)]
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
        try:
            yield file
        finally:
            sys.stderr.flush()
            for descriptor, kept in zip((1, 2), before, strict=True):
                os.dup2(kept, descriptor)
                os.close(kept)


@contextmanager
def errors_left_to_the_caller() -> Iterator[None]:
    try:
        yield
    except MemoryError:
        raise
    except Exception:  # a panic of Rust is none, and ends this process
        pass


def opens(directory: str) -> tuple[bool, int | None, int | None]:
    """
    Reads the config and the tokenizer of a model, builds it without weights, as each class that a library may load it
    as, and runs it on a few tokens. Errors are left to the caller, who does the same. Returns whether something
    printed control characters or without end, the largest number of parameters, and bytes of buffers and of the
    largest tensor of a forward pass, which are made whatever the files hold. Both are `None` where no class can be
    built.
    """
    import torch
    from transformers import AutoTokenizer

    parameters = buffers = 0 if not Path(directory, "config.json").is_file() else None
    with printed() as output:
        with errors_left_to_the_caller():
            tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
            tokenizer.decode(tokenizer(SAMPLE)["input_ids"])
        if parameters is None:
            with errors_left_to_the_caller(), torch.device("meta"):
                for build in _models(directory):
                    with errors_left_to_the_caller():
                        model = build()
                        parameters = max(parameters or 0, sum(weight.numel() for weight in model.parameters()))
                        buffers = max(buffers or 0, sum(buffer.nbytes for buffer in model.buffers()))
                        buffers = max(buffers, _largest_tensor(model) - 8 * parameters)
        sys.stderr.flush()
        output.seek(0)
        content = output.read(MAX_PRINTED + 1)
        text = content.decode(errors="replace")
        acts = any(
            sign in DIRECTIONS or (unicodedata.category(sign) == "Cc" and sign not in "\t\n\r") for sign in text
        )
        return acts or len(content) > MAX_PRINTED, parameters, buffers


def _largest_tensor(model: Any) -> int:
    """Bytes of the largest tensor that a model makes for a few tokens, which takes no memory here."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        bytes = 0

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            made = function(*args, **(kwargs or {}))
            if isinstance(made, torch.Tensor):
                self.bytes = max(self.bytes, made.untyped_storage().nbytes())
            return made

    largest = Largest()
    with errors_left_to_the_caller(), largest, torch.no_grad():
        model.train(False)(input_ids=torch.ones((1, 8), dtype=torch.long))
    return largest.bytes


def _models(directory: str) -> Iterator[Callable[[], Any]]:
    """
    How a library may build a model: as a language model, as a reward model, and as the class that its config names,
    which TRL takes whatever it is.
    """
    import transformers
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    kinds = [transformers.AutoModelForCausalLM, transformers.AutoModelForSequenceClassification]
    kinds += [transformers.AutoModelForTokenClassification]
    known = [kind for kind in kinds if type(config) in kind._model_mapping]
    if kinds[0] not in known:
        known.append(transformers.AutoModel)
    for kind in known:
        yield partial(kind.from_config, copy.deepcopy(config), trust_remote_code=False)
    name = (config.architectures or [None])[0]
    if isinstance(name, str) and name in dir(transformers):
        named = getattr(transformers, name)
        yield partial(named, named.config_class.from_pretrained(directory, local_files_only=True))


def decodes(path: str, columns: list[str] | None, rows: int) -> int:
    """
    Reads a Parquet file, so many rows at a time, and returns the bytes of the largest batch, -1 after an error, which
    is left to the caller. Texts are read as references to different ones.
    """
    from pyarrow import parquet

    largest = -1
    with errors_left_to_the_caller():
        with parquet.ParquetFile(path) as file:
            leaves = [file.schema.column(place) for place in range(len(file.schema))]
        texts = [leaf.path for leaf in leaves if leaf.physical_type == "BYTE_ARRAY"]
        with parquet.ParquetFile(path, read_dictionary=texts) as file:
            largest = max((batch.nbytes for batch in file.iter_batches(rows, columns=columns)), default=0)
    return largest


REQUESTS: dict[str, Callable[..., Any]] = {
    "equal": equal, "entry": entry, "accepts": accepts, "render": render, "patterns": patterns,
    "opens": opens, "decodes": decodes,
}  # fmt: skip


def load(name: str) -> None:
    """Imports what a request needs, which its time limit does not cover."""
    if name == "equal":
        import math_verify  # noqa: F401
    elif name == "render":
        renderer()
    elif name in ("entry", "accepts"):
        import reasoning_gym  # noqa: F401
    elif name == "opens":
        import torch  # noqa: F401
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer  # noqa: F401
    elif name == "decodes":
        import pyarrow.parquet  # noqa: F401


def main() -> None:
    try:
        import resource
        import signal

        memory = int(sys.argv[1]) * 2**30
        resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))  # without the code of libraries
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except ImportError:  # Windows: the caller ends the process after its own time limit
        signal = None  # type: ignore[assignment]
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no reply
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        if name == "load":
            load(*arguments)
            print(json.dumps("loaded"), file=replies, flush=True)
            continue
        if signal is not None:
            # SIGVTALRM ends the process even within a computation in C, which a handler in Python cannot
            signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS[name])
        try:
            reply = json.dumps(REQUESTS[name](*arguments), default=str)
        except MemoryError:  # what earlier requests left in memory would fail the next ones too
            return
        except Exception:  # what cannot be compared is not right
            reply = "null"
        if signal is not None:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        print(reply, file=replies, flush=True)


if __name__ == "__main__":
    main()
