"""The model card of a run, and the facts of the training that a run saves for it."""

import json
import os
import platform
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from .._version import __version__
from ..bank.export_files import is_export, published
from ..bank.files import BANK_DIRECTORY, EXPORT_MANIFEST
from ..checks.damaged import expect_readable
from ..checks.json_text import read_json
from ..checks.repositories import own_file
from ..checks.secrets import redacted
from ..errors import ConfigError
from ..evaluation.tables import in_code, in_markdown, one_line
from ..files import write_file
from ..inference.weights import lab_seed
from .card_results import HUB_NAME, evaluated, measured, results
from .license import check_license


if TYPE_CHECKING:
    from ..sgpo_config import SGPOConfig

CARD = "README.md"
FACTS_FILE = "training.json"
METRICS_FILE = "metrics.json"
TAGS = ("sgpo", "strategy-bank", "trl", "trl-sgpo")

_LOCAL_DATA = ("reasoning_gym/", "list_functions/", "word_programs/")
_SETTINGS = (
    "max_steps",
    "num_train_epochs",
    "learning_rate",
    "num_generations",
    "transfer_block_size",
    "num_bank_rollouts",
    "num_plain_rollouts",
    "internalize",
    "num_retrieved",
    "correctness_weight",
    "transfer_weight",
    "coherence_weight",
    "leak_weight",
    "execution_baseline",
    "loss_type",
    "beta",
    "temperature",
    "max_strategy_length",
    "max_completion_length",
    "embedding_model",
    "seed",
)
# The links to where a run was tracked that TRL puts into a card
_BADGE = re.compile(
    r'\[<img src="https://raw\.githubusercontent\.com/(?:wandb|gradio-app|comet-ml)/[\w./-]+"'
    r'(?: (?:alt|title|width|height)="[\w &]*")* ?/>\]\(https?://[^\s()<>"`\\]+\)'
)
_TAG = re.compile(r"\w[\w .:/+-]{0,99}")
_PACKAGES = ("trl", "transformers", "peft", "torch", "datasets", "tokenizers")


@dataclass(frozen=True)
class TrainingFacts:
    """
    Facts of a training for its model card. Every run saves them beside its model, as `training.json`.

    Args:
        base_model (`str`, *optional*):
            Hub id of the model that was trained, or the name of its directory.
        datasets (`tuple[str, ...]`, *optional*):
            Where the problems come from, as in the recipe.
        rewards (`tuple[str, ...]`, *optional*):
            Names of the reward functions. The first is the verifier.
        settings (`dict`, *optional*):
            Settings of the training.
        versions (`dict[str, str]`, *optional*):
            Versions of the packages in use.
        tags (`tuple[str, ...]`, *optional*):
            Tags of the model.
        badges (`tuple[str, ...]`, *optional*):
            Links to where the run was tracked, in Markdown.
        license (`dict[str, str]`, *optional*):
            `license`, and with it `license_name` and `license_link`, as the Hub names them.
    """

    base_model: str = ""
    datasets: tuple[str, ...] = ()
    rewards: tuple[str, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    tags: tuple[str, ...] = TAGS
    badges: tuple[str, ...] = ()
    license: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_license(self.license)
        public = redacted([self.base_model, list(self.datasets), self.settings])
        for name, value in zip(("base_model", "datasets", "settings"), public, strict=True):
            object.__setattr__(self, name, tuple(value) if name == "datasets" else value)

    def _check(self) -> None:
        """Raises an error if there are values that no run writes, as in the file of another program."""
        texts = [self.base_model, *self.datasets, *self.rewards, *self.tags, *self.badges]
        texts += [text for pair in dict(self.versions).items() for text in pair]
        if not (isinstance(self.settings, dict) and all(isinstance(text, str) for text in texts)):
            raise TypeError("it holds values of other types than a run writes")
        for name, form in (("tags", _TAG), ("badges", _BADGE)):
            if wrong := [text for text in vars(self)[name] if not form.fullmatch(text)]:
                raise ValueError(f"{name} has a value of another form than a run writes: {wrong[0]!r}")

    @classmethod
    def of(cls, config: "SGPOConfig", base_model: str, rewards: Sequence[str]) -> "TrainingFacts":
        """Takes the facts of a training configuration."""
        settings = {name: config.__dict__[name] for name in _SETTINGS}
        settings["embedding_model"] = published(config.embedding_model)
        versions = {"trl_sgpo": __version__, "python": platform.python_version()}
        versions |= {name: version(name) for name in _PACKAGES}
        return cls(base_model, rewards=tuple(rewards), settings=settings, versions=versions)

    def with_card(self, card: str) -> "TrainingFacts":
        """Takes tags and links to where the run was tracked from a card that TRL wrote."""
        metadata = yaml.safe_load(card.split("---\n")[1])
        return replace(self, tags=tuple(sorted({*TAGS, *metadata["tags"]})), badges=tuple(_BADGE.findall(card)))

    def save(self, directory: str | Path) -> None:
        """Writes `training.json`. Local paths of models and data are replaced by their last part."""
        content = asdict(self) | {
            "base_model": _public(self.base_model),
            "datasets": [_public(name) for name in self.datasets],
        }
        write_file(Path(directory, FACTS_FILE), json.dumps(content, indent=2))

    @classmethod
    def load(cls, directory: str | Path) -> "TrainingFacts":
        """Reads `training.json`; without one, all facts are empty."""
        path = own_file(Path(directory), FACTS_FILE)
        if not path.is_file():
            return cls()
        try:
            given = read_json(path)
            for item in fields(cls):
                if isinstance(given.get(item.name), list):
                    given[item.name] = tuple(given[item.name])
            facts = cls(**given)
            facts._check()
            return facts
        except (ValueError, TypeError, AttributeError) as error:
            what = str(error).removesuffix(".")
            raise ConfigError(f"{path} cannot be read ({what}): delete it to make a card without it.") from error


def _public(name: str) -> str:
    return Path(name).name if os.path.exists(name) else published(name)


def on_hub(name: str) -> bool:
    """Whether a name has the form of a model or dataset on the Hub."""
    return bool(HUB_NAME.fullmatch(name)) and lab_seed(name) is None and not name.startswith(_LOCAL_DATA)


# The card


def make_card(
    directory: Path,
    repo_id: str,
    facts: TrainingFacts,
    license: dict[str, str],
    adapter: bool = False,
    evaluation: Path | None = None,
) -> str:
    """
    Writes the model card for a directory of published files.

    Args:
        directory (`Path`):
            Model, `sgpo.json` and, if there are any, the export of the bank and `report.json`.
        repo_id (`str`):
            Name of the model on the Hub.
        facts ([`TrainingFacts`]):
            Facts of its training.
        license (`dict[str, str]`):
            `license`, and with it `license_name` and `license_link`, as the Hub names them. May be empty.
        adapter (`bool`, *optional*, defaults to `False`):
            Whether it is an adapter.
        evaluation (`Path`, *optional*):
            Output folder of `trl-sgpo eval`.

    Returns:
        `str`: Markdown with the metadata that the Hub reads.
    """
    parts = [
        f"# {repo_id.split('/')[-1]}",
        _about(directory, facts, adapter),
        *facts.badges,
        results(directory, evaluation),
        _use(directory, repo_id, facts, adapter),
        _bank(directory, repo_id),
        _training(facts),
        _LIMITS,
        _which(facts),
        _CITATION.replace("VERSION", __version__),
    ]
    metadata = _metadata(directory, repo_id, facts, license, adapter, evaluation)
    front = yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)
    return f"---\n{front}---\n\n" + "\n\n".join(part for part in parts if part) + "\n"


def _metadata(
    directory: Path,
    repo_id: str,
    facts: TrainingFacts,
    license: dict[str, str],
    adapter: bool,
    evaluation: Path | None,
) -> dict[str, Any]:
    metadata: dict[str, Any] = dict(license)
    metadata["library_name"] = "peft" if adapter else "transformers"
    metadata["pipeline_tag"] = "text-generation"
    if on_hub(facts.base_model):
        metadata["base_model"] = facts.base_model
        metadata["base_model_relation"] = "adapter" if adapter else "finetune"
    if datasets := [name for name in facts.datasets if on_hub(name)]:
        metadata["datasets"] = datasets
    metadata["tags"] = sorted({*facts.tags, *(["lora"] if adapter else [])})
    data = one_line(" + ".join(map(_public, facts.datasets))) or "the training's unseen problems"
    if entries := [*measured(directory, data), *evaluated(evaluation)]:
        metadata["model-index"] = [{"name": repo_id.split("/")[-1], "results": entries}]
    return metadata


def _link(name: str, kind: str = "") -> str:
    return f"[{name}](https://huggingface.co/{kind}{name})" if on_hub(name) else in_code(_public(name))


def _about(directory: Path, facts: TrainingFacts, adapter: bool) -> str:
    what = "A LoRA adapter" if adapter else "A language model"
    of = f", {'for' if adapter else 'fine-tuned from'} {_link(facts.base_model)}" if facts.base_model else ""
    data = ", ".join(_link(name, "datasets/") for name in facts.datasets)
    on = f" on {data}" if data else ""
    bank = "; those that proved themselves are in its **strategy bank** and are shown with later problems"
    if not (directory / BANK_DIRECTORY).is_dir():
        bank = ""
    return (
        f"{what}{of}, trained{on} with Strategy-Guided Policy Optimization (SGPO) by `trl_sgpo`, on top of "
        "[TRL](https://github.com/huggingface/trl).\n\n"
        "For each problem it first writes a short general **strategy**, then an **execution** of that strategy. "
        "Strategies were rewarded for being right on their own problem *and* on other problems of the same "
        f"class{bank}."
    )


@expect_readable("tokenizer_config.json")
def _use(directory: Path, repo_id: str, facts: TrainingFacts, adapter: bool) -> str:
    from ..inference.settings import TwoPhaseSettings
    from .snippet import plain_snippet, transformers_snippet

    tokenizer = directory / "tokenizer_config.json"
    in_config = tokenizer.is_file() and "chat_template" in read_json(tokenizer)
    chat = (directory / "chat_template.jinja").is_file() or in_config
    settings = TwoPhaseSettings.load(directory)
    code = transformers_snippet(repo_id, settings, chat=chat).strip()
    needs = "transformers, accelerate and peft" if adapter else "transformers and accelerate"
    plain = ""
    if facts.settings.get("internalize", "none") != "none":
        plain = f"""\
Plain answers, without a strategy, were trained too. The table of results, if there is one, says how good they
are. For them {needs} are enough:

```python
{plain_snippet(repo_id, settings, chat=chat).strip()}
```

With strategies, it writes one first.

"""
    return f"""## Use

{plain}With `trl-sgpo`, which pulls the strategy bank, if there is one, at the same commit as the model:

```bash
pip install trl-sgpo
trl-sgpo solve --model {repo_id} "Find the Least Common Multiple (LCM) of these numbers: 4, 6"
```

```python
from trl_sgpo import SGPOPipeline

with SGPOPipeline.from_pretrained("{repo_id}") as pipeline:
    solution = pipeline("Find the Least Common Multiple (LCM) of these numbers: 4, 6")
print(solution.strategy, solution.execution, solution.answer, sep="\\n")
```

<details><summary>Without <code>trl-sgpo</code>, with {needs} alone</summary>

```python
{code}
```

</details>"""


def _bank(directory: Path, repo_id: str) -> str:
    bank = directory / BANK_DIRECTORY
    if not is_export(bank):  # a run's own bank, which a push exports, or none
        return "" if bank.is_dir() else "## Strategy bank\n\nThere is none."
    manifest = read_json(bank / EXPORT_MANIFEST)
    trust = ", ".join(f"{count} {state}" for state, count in manifest["trust"].items()) or "none yet"
    return f"""## Strategy bank

{manifest["count"]} strategies ({trust}) of {manifest["classes"]} classes, in
`{BANK_DIRECTORY}/{manifest["file"]}`, with their provenance and verified executions. Only trusted ones
are shown when the model is used. To start the training of another model with them, in quarantine until they prove
useful in its own verified executions:

```python
from trl_sgpo import StrategyBank

with StrategyBank.from_pretrained("{repo_id}", "banks/mine") as bank:
    print(len(bank))
```"""


def _training(facts: TrainingFacts) -> str:
    rows = [("base model", _link(facts.base_model))] if facts.base_model else []
    rows += [("problems", ", ".join(_link(name, "datasets/") for name in facts.datasets))] if facts.datasets else []
    rows += [("reward functions, the first is the verifier", ", ".join(map(in_code, facts.rewards)))]
    rows += [(in_code(name), in_code(str(value))) for name, value in facts.settings.items()]
    rows += [("versions", ", ".join(in_markdown(" ".join(pair)) for pair in facts.versions.items()))]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows if value)
    return f"""## Training

Problems of one class stand in transfer blocks of `transfer_block_size`. Every strategy of a block is executed on every
problem of the block. Strategy tokens are credited by how their executions do on all of them, execution tokens are
compared with other executions, as in GRPO. `{METRICS_FILE}` has what was logged.

| | |
|---|---|
{table}"""


def _which(facts: TrainingFacts) -> str:
    is_used = facts.settings.get("internalize") == "kl"
    return f"{_WHICH} {'Its KL term was used here (`internalize: kl`).' if is_used else 'It was **not** used here.'}"


_LIMITS = """\
## Limits and risks

- What it was trained and measured on is above. Nothing is known of its answers to other kinds of problems, other
  languages, or of its safety. It has the limits and biases of its base model.
- **Strategies are text that a model wrote.** They enter prompts. They are never executed as code, and they may be
  wrong or misleading. Those called trusted were not inferior to others on problems that the training's verifier
  checked, and are as reliable as that verifier.
- A model and its bank can contain any text: use both only from people you trust, and pin
  the commit. Strategies that are imported into another bank are in quarantine there.
- Check answers that matter. A sound strategy may be executed wrongly."""

_WHICH = """\
## Which SGPO

Two methods have this name.

- **This one**: strategies are written by the model that is trained. They are rewarded for correctness, for transfer to
  other problems of their class and for coherence, and are kept in a bank.
- "Beyond Trajectory Imitation: Strategy-Guided Policy Optimization for LLM Reasoning"
  ([arXiv 2606.24064](https://arxiv.org/abs/2606.24064)): strategies come from a stronger model, and a token-level KL
  term pulls the unguided policy towards the guided one. It has no strategy bank and no transfer reward."""

_CITATION = """\
## Citation

```bibtex
@software{trl_sgpo,
  title   = {{trl\\_sgpo: Strategy-Guided Policy Optimization for TRL}},
  license = {Apache-2.0},
  version = {VERSION}
}

@article{shao2024deepseekmath,
  title  = {{DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models}},
  author = {Zhihong Shao and Peiyi Wang and Qihao Zhu and Runxin Xu and Junxiao Song and Mingchuan Zhang and Y. K. Li
            and Y. Wu and Daya Guo},
  year   = 2024,
  eprint = {arXiv:2402.03300}
}

@software{vonwerra2020trl,
  title   = {{TRL: Transformers Reinforcement Learning}},
  author  = {von Werra, Leandro and Belkada, Younes and Tunstall, Lewis and Beeching, Edward and Thrush, Tristan and
             Lambert, Nathan and Huang, Shengyi and Rasul, Kashif and Gallouédec, Quentin},
  license = {Apache-2.0},
  url     = {https://github.com/huggingface/trl},
  year    = {2020}
}
```"""
