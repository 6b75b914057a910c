"""Solving problems with a trained model: retrieve strategies from a bank, write one, execute it."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

from transformers.utils import logging

from ..bank import StrategyBank
from ..bank.export_files import is_export
from ..bank.files import BANK_DIRECTORY
from ..bank.hub import pull_bank
from ..bank.snapshot import embed_with, open_copy, open_export
from ..bank.strategy import DEFAULT_EMBEDDING_MODEL
from ..checks.characters import misplaced
from ..data.final_answers import final_answer
from ..errors import BankError, ConfigError, DataError, ModelError
from ..evaluation.statistics import derived_seed
from ..hub.card_results import HUB_NAME
from ..hub.pull import pull_run
from ..method.context_length import EXECUTION, STRATEGY
from ..method.control_tokens import TextEncoder
from ..method.problem import Problem
from ..method.prompts import ParsedStrategy, Prompt, with_system_prompt
from .model import Decoding, TwoPhaseModel
from .pretrained import load_tokenizer
from .retrieval import with_retrieved
from .server import ServerModel, encoder_of
from .settings import TwoPhaseSettings
from .solution import Attempt, Solution, vote


logger = logging.get_logger(__name__)

Watch = Callable[[str, str], None]


class SGPOPipeline:
    """
    Solves problems in two phases, with strategies of a bank. Only trusted strategies that were not written for the
    problem itself are retrieved, and the bank is not changed.

    Args:
        model ([`~trl_sgpo.inference.model.TwoPhaseModel`] or [`~trl_sgpo.inference.server.ServerModel`]):
            The model.
        bank ([`StrategyBank`], *optional*):
            Bank whose strategies are shown with problems.

    Attributes:
        pulled (`str` or `None`): Repository and commit that a bank, or the model with it, was pulled from.

    Example:

    ```python
    from trl_sgpo import SGPOPipeline

    with SGPOPipeline.from_pretrained("runs/quickstart") as pipeline:
        solution = pipeline("Find the Least Common Multiple (LCM) of these numbers: 4, 6")
    print(solution.strategy, solution.execution, solution.answer, sep="\\n")
    ```
    """

    def __init__(self, model: TwoPhaseModel | ServerModel, bank: StrategyBank | None = None):
        self.model = model
        self.bank = bank
        self.pulled: str | None = None
        self._resources = ExitStack()

    @classmethod
    def from_pretrained(
        cls,
        name: str,
        bank: str | Path | StrategyBank | None = "auto",
        run: str | None = None,
        settings: TwoPhaseSettings | None = None,
        batch_size: int = 32,
        device: str | None = None,
        revision: str | None = None,
        trust_bank: bool = False,
        embedding_model: str | None = None,
        **model_kwargs: Any,
    ) -> "SGPOPipeline":
        """
        Loads a model, or an adapter with its base model, and the bank of its run.

        A model that `trl_sgpo` pushed to the Hub and its bank are pulled at one commit. Strategies that its author
        trusted are retrieved, because the weights are from the same author. Those of other authors are retrieved only
        with `trust_bank`.

        Args:
            name (`str`):
                A run's output folder, a checkpoint, a merged or any other model's directory, or a Hub id.
            bank (`str`, `Path` or [`StrategyBank`], *optional*, defaults to `"auto"`):
                A bank, or the directory of one, of a checkpoint or of a run, which is copied and stays unlocked; or,
                with `trust_bank`, an export or the Hub id of a model with one. `"auto"` is the one in `run`, if it has
                one, and `None` is none.
            run (`str`, *optional*):
                Output folder of the training run, with its `sgpo.json` and bank, or Hub id of what was pushed of it.
                If `None`, that of the model. Name it for a model that was merged or converted to another place.
            settings ([`~trl_sgpo.inference.settings.TwoPhaseSettings`], *optional*):
                Prompts and limits. If `None`, those of the run.
            batch_size (`int`, *optional*, defaults to `32`):
                Texts generated at a time.
            device (`str`, *optional*):
                Where to run. If `None`, the accelerator, if there is one.
            revision (`str`, *optional*):
                Branch, tag or commit on the Hub. If `None`, the latest commit.
            trust_bank (`bool`, *optional*, defaults to `False`):
                Whether an export of strategies that does not come with the model may be shown, with the trust states
                that its author gave it.
            embedding_model (`str`, *optional*):
                Embeds problems and strategies. If `None`, the model that the bank was made with, if it is on this
                machine, and for an export the default one: what someone else's file names is not downloaded.
            **model_kwargs:
                Passed on to `from_pretrained`, such as `dtype` (`"auto"` by default) or `quantization_config`.

        Raises:
            [`ModelError`]: There are no such weights.
            [`BankError`]: There is no such bank, or another process has it open.
        """
        _check_directory(name)
        with ExitStack() as opened:
            pulled = pull_run(name, revision)
            if pulled is not None:
                model_kwargs["use_safetensors"] = True
            directory = name if pulled is None else str(pulled)
            run = None if run is None else str(pull_run(run) or run)
            opened_bank = _open_bank(bank, run or directory, trust_bank, embedding_model, opened)
            settings = settings or _settings(run)
            model_kwargs.setdefault("dtype", "auto")
            model = TwoPhaseModel.from_pretrained(directory, settings, batch_size, device, **model_kwargs)
            pipeline = cls(model, opened_bank)._owning(opened)
            pipeline.pulled = None if pulled is None else f"{name}@{pulled.name}"
            return pipeline

    @classmethod
    def from_server(
        cls,
        url: str,
        name: str | None = None,
        bank: str | Path | StrategyBank | None = "auto",
        run: str | None = None,
        settings: TwoPhaseSettings | None = None,
        revision: str | None = None,
        trust_bank: bool = False,
        embedding_model: str | None = None,
        **server_kwargs: Any,
    ) -> "SGPOPipeline":
        """
        Uses a model behind an OpenAI-compatible server: vLLM, llama.cpp, `transformers serve` or others.

        Args:
            url (`str`):
                Base address with its version, such as `http://127.0.0.1:8000/v1`.
            name (`str`, *optional*):
                The model's name on the server. If `None`, the only one that the server lists.
            bank (`str`, `Path` or [`StrategyBank`], *optional*, defaults to `"auto"`):
                As in [`SGPOPipeline.from_pretrained`].
            run (`str`, *optional*):
                Output folder of the training run, with its `sgpo.json` and bank, or Hub id of what was pushed of it.
                If `None`, `name` where that is given and a directory, else the default prompts are used.
            settings ([`~trl_sgpo.inference.settings.TwoPhaseSettings`], *optional*):
                Prompts and limits. If `None`, those of the run.
            revision (`str`, *optional*):
                Branch, tag or commit of the run on the Hub. If `None`, the latest commit.
            trust_bank (`bool`, *optional*, defaults to `False`):
                As in [`SGPOPipeline.from_pretrained`].
            embedding_model (`str`, *optional*):
                As in [`SGPOPipeline.from_pretrained`].
            **server_kwargs:
                Passed on to [`~trl_sgpo.inference.server.ServerModel`], such as `token` or `concurrency`.

        Raises:
            [`ModelError`]: There is no server, or it has several models and none is named.
            [`BankError`]: There is no such bank, or another process has it open.
        """
        with ExitStack() as opened:
            model = ServerModel(url, name or "", **server_kwargs)
            listed = model.list_models()
            named_by_user = name is not None
            if name is None:
                if len(listed) != 1:
                    raise ModelError(
                        f"The server at {url} lists {len(listed)} models ({', '.join(listed[:8])}): name one of them "
                        "by `--model`."
                    )
                name = listed[0]
                if run is None and Path(name).is_dir():
                    logger.warning(
                        f"The server's model {name} is also a folder here: name it by `--run` to use its prompts."
                    )
            elif run is None and Path(name).is_dir():
                run = name
            model.name = name
            pulled = None if run is None else pull_run(run, revision)
            directory = run if pulled is None else str(pulled)
            model.settings = settings or _settings(directory) or TwoPhaseSettings()
            if directory is not None and (Path(directory) / "tokenizer_config.json").is_file():
                model.encoder = TextEncoder(load_tokenizer(directory))
            else:
                model.encoder = encoder_of(name, named_by_user)
            pipeline = cls(model, _open_bank(bank, directory, trust_bank, embedding_model, opened))._owning(opened)
            pipeline.pulled = None if pulled is None else f"{run}@{pulled.name}"
            return pipeline

    def _owning(self, opened: ExitStack) -> "SGPOPipeline":
        """Transfers open resources to this pipeline, which closes them."""
        self._resources = opened.pop_all()
        return self

    def prepare(
        self, problems: Sequence[Prompt], classes: Sequence[str | None] | None = None, retrieve: bool = True
    ) -> list[Problem]:
        """
        Adds the run's system message and retrieved strategies to problems.

        Args:
            problems (`Sequence[str | list[dict]]`):
                Texts, or conversations that end with a problem.
            classes (`Sequence[str | None]`, *optional*):
                Class of each problem, to which retrieved strategies must belong. `None` is any.
            retrieve (`bool`, *optional*, defaults to `True`):
                Whether to retrieve strategies from the bank.

        Returns:
            `list[Problem]`: In the order of the problems.

        Raises:
            [`DataError`]: A problem is empty.
        """
        prepared = []
        for prompt, name in zip(problems, classes or [None] * len(problems), strict=True):
            messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            problem = Problem(with_system_prompt(messages, self.model.settings.system_prompt), name or "")
            if not problem.text.strip():
                raise DataError("The problem is empty: write what is to be solved.")
            prepared.append(problem)
        settings, bank = self.model.settings, self.bank if retrieve else None
        return with_retrieved(prepared, bank, settings.num_retrieved, merged=settings.merged_classes)

    def check_room(self, problems: Sequence[Prompt], strategy: str | None = None, plain: bool = False) -> None:
        """
        Checks all problems before the first is solved. The arguments are those of [`SGPOPipeline.prepare`] and
        [`SGPOPipeline.solve`].

        Raises:
            [`DataError`]: A problem is empty.
            [`ConfigError`]: A row would be longer than the model's table of positions, if it is on this machine.
        """
        prompts = [problem.prompt for problem in self.prepare(problems, retrieve=False)]
        if isinstance(self.model, TwoPhaseModel):
            shown = 0 if self.bank is None or strategy is not None or plain else self.model.settings.num_retrieved
            self.model.check_room(prompts, shown, [STRATEGY, EXECUTION] if strategy is None else [EXECUTION], plain)

    def solve(
        self,
        problems: Sequence[Problem],
        strategy: str | None = None,
        samples: int = 1,
        decoding: Decoding | None = None,
        watch: Watch | None = None,
        plain: bool = False,
    ) -> list[Solution]:
        """
        Solves prepared problems.

        Args:
            problems (`Sequence[Problem]`):
                Result of [`SGPOPipeline.prepare`].
            strategy (`str`, *optional*):
                A strategy to execute on all problems. If `None`, the model writes one for each problem.
            samples (`int`, *optional*, defaults to `1`):
                Attempts at each problem, each with a strategy of its own. The answer that most agree on is chosen.
            decoding ([`~trl_sgpo.inference.model.Decoding`], *optional*):
                How to decode. If `None`, greedily for one attempt and sampled for more.
            watch (`Callable[[str, str], None]`, *optional*):
                Called with `"strategy"`, `"execution"` or `"plain answer"` and a piece of text while it is generated,
                and with an empty one where the phase begins. For one attempt at one problem only.
            plain (`bool`, *optional*, defaults to `False`):
                Whether to answer the bare problems, without a strategy. An answer may be as long as a strategy and an
                execution together, and the strategies of the solutions are empty.

        Returns:
            `list[Solution]`: In the order of the problems.

        Raises:
            [`ConfigError`]: Several attempts that would all be the same, a strategy without text, or one for a plain
                answer.
        """
        decoding = decoding or Decoding(greedy=samples == 1)
        if samples > 1 and decoding.greedy:
            raise ConfigError("Greedy attempts are all the same: sample them (`--temperature` above 0), or make one.")
        if strategy is not None and plain:
            raise ConfigError("A plain answer executes no strategy: leave out the strategy, or `plain`.")
        if strategy is not None and not strategy.strip():
            raise ConfigError("The strategy is empty: write one, or leave it out and let the model write it.")
        if found := misplaced(strategy, halves_only=True):
            raise ConfigError(f"The strategy holds {found}: remove the character.")
        rows = [problem for problem in problems for _ in range(samples)]
        executing = replace(decoding, seed=derived_seed(decoding.seed, "execution"))
        if plain:
            written, prompts = [ParsedStrategy("")] * len(rows), [row.prompt for row in rows]
            stream, limit = _phase(watch, "plain answer"), self.model.settings.max_plain_length
            executions = self.model.answer(prompts, executing, stream=stream, limit=limit)
        else:
            if strategy is not None:
                written = [ParsedStrategy(strategy.strip())] * len(rows)
            else:
                written = self.model.write_strategies(rows, decoding, stream=_phase(watch, "strategy"))
            executions = self.model.execute(rows, written, executing, stream=_phase(watch, "execution"))
        attempts = [
            Attempt(each.text, execution, final_answer(execution), each.flaw)
            for each, execution in zip(written, executions, strict=True)
        ]
        return [
            vote(problem, attempts[index * samples : (index + 1) * samples]) for index, problem in enumerate(problems)
        ]

    def __call__(
        self,
        problem: Prompt,
        problem_class: str | None = None,
        strategy: str | None = None,
        samples: int = 1,
        decoding: Decoding | None = None,
        watch: Watch | None = None,
        plain: bool = False,
    ) -> Solution:
        """
        Prepares and solves one problem. The arguments are those of [`SGPOPipeline.prepare`] and
        [`SGPOPipeline.solve`]. With a `strategy`, or `plain`, none is retrieved from the bank.
        """
        prepared = self.prepare([problem], [problem_class], retrieve=strategy is None and not plain)
        return self.solve(prepared, strategy, samples, decoding, watch, plain)[0]

    def close(self) -> None:
        """Close the bank, if it was opened here."""
        self._resources.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _open_bank(
    bank: str | Path | StrategyBank | None,
    run: str | None,
    trust_bank: bool,
    embedding_model: str | None,
    opened: ExitStack,
) -> StrategyBank | None:
    if bank is None or isinstance(bank, StrategyBank):
        return bank
    if bank == "auto":
        if run is None or not (Path(run) / BANK_DIRECTORY).is_dir():
            return None
        bank = Path(run) / BANK_DIRECTORY
        trust_bank = True  # it was pushed with the model
    elif not Path(bank).is_dir() and HUB_NAME.fullmatch(str(bank)):
        _require_trust(trust_bank, f"There is no folder {bank}, and an export of strategies on the Hub")
        with TemporaryDirectory(prefix="trl-sgpo-pull-") as temporary:
            directory, sha = pull_bank(str(bank), Path(temporary) / "export", repo_type="model")
            return opened.enter_context(open_export(directory, _of_export(embedding_model, run), f"{bank}@{sha}"))
    for directory in (Path(bank), Path(bank) / BANK_DIRECTORY):
        if is_export(directory):
            _require_trust(trust_bank, f"{bank} is an export of strategies that")
            return opened.enter_context(open_export(directory, _of_export(embedding_model, run)))
    copy = opened.enter_context(open_copy(bank))
    embed_with(copy, embedding_model)
    return copy


def _require_trust(trust_bank: bool, export: str) -> None:
    if not trust_bank:
        raise BankError(
            f"{export} does not come with the model, and nothing of it was verified here. Show those that its author "
            "trusted by `--trust_bank`, or import it into a bank to train with."
        )


def _of_export(named: str | None, run: str | None) -> str:
    """Embedding model for an export, which has no embeddings: the one that the user named, or the default one."""
    if named is not None:
        return named
    if run is not None and Path(run).is_dir():
        recorded = TwoPhaseSettings.load(run).embedding_model
        if recorded != DEFAULT_EMBEDDING_MODEL:
            logger.warning(
                f"The default embedding model is used, and not {recorded!a}, which the author of the run used: to use "
                "that one, pass it as `--embedding_model`."
            )
    return DEFAULT_EMBEDDING_MODEL


def _settings(run: str | None) -> TwoPhaseSettings | None:
    if run is not None and not Path(run).is_dir():
        raise ConfigError(f"There is no run in {run}: name the output folder of one, or leave out `--run`.")
    return None if run is None else TwoPhaseSettings.load(run)


def _check_directory(name: str) -> None:
    """Raises an error that names the last checkpoint if a run's folder holds no model."""
    directory = Path(name)
    if not directory.is_dir() or any((directory / f"{kind}config.json").is_file() for kind in ("", "adapter_")):
        return
    steps = [path.name.removeprefix("checkpoint-") for path in directory.glob("checkpoint-*")]
    numbers = sorted(int(step) for step in steps if step.isdecimal())
    fix = "name the folder of a model"
    if numbers:
        fix = f"the run did not finish, so take its last checkpoint, {directory / f'checkpoint-{numbers[-1]}'}"
    raise ModelError(f"{name} holds no config.json and no adapter_config.json: {fix}.")


def _phase(watch: Watch | None, phase: str) -> Callable[[str], None] | None:
    """Announces a phase and returns the callback for its text."""
    if watch is None:
        return None
    watch(phase, "")
    return lambda text: watch(phase, text)
