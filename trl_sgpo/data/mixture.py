"""A mixture of datasets as recipes have it, each with the columns of its problems and answers."""

from dataclasses import dataclass, field

from trl import DatasetMixtureConfig
from trl.scripts.utils import DatasetConfig

from .columns import Columns


@dataclass
class ProblemsConfig(DatasetConfig):
    """
    A dataset of a mixture: the arguments of [`~trl.scripts.utils.DatasetConfig`], and its columns.

    Args:
        prompt_column (`str`, *optional*), prompt_template (`str`, *optional*), answer_column (`str`, *optional*):
            As in [`~trl_sgpo.data.columns.Columns`].
    """

    prompt_column: str | None = None
    prompt_template: str | None = None
    answer_column: str | None = None

    def __post_init__(self) -> None:
        self.chosen = Columns(self.prompt_column, self.prompt_template, self.answer_column)


@dataclass
class ProblemMixtureConfig(DatasetMixtureConfig):
    """
    A [`~trl.DatasetMixtureConfig`] whose datasets name their columns.

    Args:
        datasets (`list[ProblemsConfig]`):
            The datasets, in recipes as mappings.
    """

    datasets: list[ProblemsConfig] = field(
        default_factory=list, metadata={"help": "Datasets of the mixture, each with the columns of its problems."}
    )

    def __post_init__(self) -> None:
        self.datasets = [ProblemsConfig(**part) if isinstance(part, dict) else part for part in self.datasets]
