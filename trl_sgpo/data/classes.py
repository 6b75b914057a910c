"""Problem classes: from a column, or by clustering the problems."""

import logging
import warnings
from collections import Counter
from collections.abc import Callable, Set
from typing import TYPE_CHECKING, Any

from ..bank.embedding import load_embedder
from ..bank.rows import MAX_NAME
from ..errors import DataError
from ..method.prompts import problem_text


if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset

    from ..bank import StrategyBank
    from ..sgpo_config import SGPOConfig

logger = logging.getLogger(__name__)

_AT_A_TIME = 256  # small classes that are compared with all large ones
CLASS_COLUMN = "transfer_class"
"""Column that [`with_classes`] adds."""


def problem_classes(
    dataset: "Dataset",
    column: str | None,
    embed: Callable[[list[str]], "np.ndarray"],
    num_clusters: int,
    seed: int,
    min_size: int = 1,
) -> tuple[list[str], set[str]]:
    """
    Returns the class of every problem, and which classes are clusters.

    Args:
        dataset ([`~datasets.Dataset`]):
            Problems with a `prompt` column.
        column (`str` or `None`):
            Column with the classes. `None` takes `problem_class` if the dataset has it. Rows without a class, and
            all rows if there is no such column, get the cluster of their prompt as class: `cluster-0`, ...
        embed (`Callable[[list[str]], np.ndarray]`):
            Embeds the prompts. Only called if problems are clustered.
        num_clusters (`int`):
            Number of clusters; fewer if they could not have `min_size` problems each.
        seed (`int`):
            Seed of the clustering.
        min_size (`int`, *optional*, defaults to `1`):
            Number of problems that a class needs.

    Returns:
        `tuple[list[str], set[str]]`: One class per row, and the names of the clusters.

    Raises:
        `DataError`: If there is no column `column`.
    """
    if column is not None and column not in dataset.column_names:
        raise DataError(
            f"No column '{column}' with problem classes among {', '.join(dataset.column_names)}: name one of them, "
            "or none to cluster the problems."
        )
    column = column or "problem_class"
    classes: list[Any] = list(dataset[column]) if column in dataset.column_names else [None] * len(dataset)
    missing = [row for row, name in enumerate(classes) if name is None]
    if any(len(str(name)) > MAX_NAME for name in classes):
        raise DataError(
            f"The column `{column}` has names of classes with more than {MAX_NAME} characters: name another column as "
            "`class_column`."
        )
    if missing:
        from sklearn.cluster import KMeans
        from sklearn.exceptions import ConvergenceWarning

        prompts = dataset.select(missing)["prompt"]
        embeddings = embed([problem_text(prompt) for prompt in prompts])
        possible = max(len(missing) // min_size, 1)
        if num_clusters > possible:
            logger.warning(
                f"`num_clusters` is {num_clusters}, but {len(missing)} problems without a class make {possible} "
                f"cluster{'s' * (possible > 1)} of at least {min_size}: {possible} made."
            )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # of fewer different problems than clusters
            kmeans = KMeans(min(num_clusters, possible), n_init=4, random_state=seed).fit(embeddings)
        for row, label in zip(missing, kmeans.labels_, strict=True):
            classes[row] = f"cluster-{label}"
        sizes = Counter(classes[row] for row in missing)
        logger.info("Clustered problems: " + ", ".join(f"{name} {size}" for name, size in sorted(sizes.items())))
    return [str(name) for name in classes], {classes[row] for row in missing}


def merge_small_classes(
    classes: list[str],
    min_size: int,
    policy: str,
    embeddings: Callable[[], "np.ndarray"],
    clusters: Set[str] = frozenset(),
) -> list[str]:
    """
    Merges or refuses classes that are too small for a transfer block.

    Args:
        classes (`list[str]`):
            The class of every problem.
        min_size (`int`):
            Number of problems that a class needs.
        policy (`"error"` or `"merge"`):
            `"error"` refuses them, `"merge"` relabels each as the large enough class with the nearest centroid
            (cosine).
        embeddings (`Callable[[], np.ndarray]`):
            Returns the embeddings of all problems, (N, D). Only called if classes have to be merged.
        clusters (`Set[str]`, *optional*, defaults to an empty set):
            Classes that are clusters, which are merged with any policy.

    Returns:
        `list[str]`: The class of every problem, each with at least `min_size` problems.

    Raises:
        `DataError`: If there are small classes and the policy is `"error"`, or no class is large enough.
    """
    import numpy as np

    sizes = Counter(classes)
    small = sorted((name for name in sizes if sizes[name] < min_size), key=lambda name: (sizes[name], name))
    if not small:
        return classes
    large = sorted(set(sizes) - set(small))
    refused = [name for name in small if policy == "error" and name not in clusters] if large else small
    if refused:
        listed = ", ".join(f"'{name}' ({sizes[name]})" for name in refused[:5])
        merge = "`--small_classes merge`, " if large else ""
        made = "" if clusters.isdisjoint(refused) else " Problems without a class form `num_clusters` clusters."
        raise DataError(
            f"{len(refused)} of {len(sizes)} problem classes have fewer than {min_size} problems: {listed}: use "
            f"{merge}a smaller `--transfer_block_size` or more data.{made}"
        )
    vectors = embeddings()
    places = {name: place for place, name in enumerate([*large, *small])}
    centroids = np.zeros((len(places), vectors.shape[1]), dtype=vectors.dtype)
    np.add.at(centroids, [places[name] for name in classes], vectors)  # sums, whose directions are those of means
    directions = centroids[: len(large)] / np.linalg.norm(centroids[: len(large)], axis=1, keepdims=True)
    nearest: dict[str, str] = {}
    for start in range(0, len(small), _AT_A_TIME):
        some = small[start : start + _AT_A_TIME]
        found = (directions @ centroids[len(large) + start :][: len(some)].T).argmax(axis=0)
        nearest |= {name: large[place] for name, place in zip(some, found.tolist(), strict=True)}
    return [nearest.get(name, name) for name in classes]


def block_classes(
    dataset: "Dataset", args: "SGPOConfig", min_size: int, embed: Callable[[list[str]], "np.ndarray"]
) -> list[str]:
    """
    Returns the class of every problem, each with enough problems for a block.

    Args:
        dataset ([`~datasets.Dataset`]):
            Problems with a `prompt` column.
        args ([`SGPOConfig`]):
            Its `class_column`, `num_clusters`, `small_classes` and seed are used.
        min_size (`int`):
            Number of problems of a block.
        embed (`Callable[[list[str]], np.ndarray]`):
            Embeds prompts, where embeddings are needed.

    Returns:
        `list[str]`: One class per row.

    Raises:
        [`DataError`]: The class column is missing, or a class has too few problems for a block.
    """
    classes, clusters = problem_classes(dataset, args.class_column, embed, args.num_clusters, args.seed, min_size)
    return merge_small_classes(
        classes,
        min_size,
        args.small_classes,
        lambda: embed([problem_text(prompt) for prompt in dataset["prompt"]]),
        clusters,
    )


def merged_classes(dataset: "Dataset", args: "SGPOConfig") -> dict[str, str]:
    """
    Returns which classes [`with_classes`] merged.

    Args:
        dataset ([`~datasets.Dataset`]):
            Training problems with the classes of their blocks.
        args ([`SGPOConfig`]):
            Its `class_column` is used.

    Returns:
        `dict[str, str]`: The class that each merged class belongs to.
    """
    column = args.class_column or "problem_class"
    if column not in dataset.column_names:
        return {}
    pairs = zip(dataset[column], dataset[CLASS_COLUMN], strict=True)
    return {str(own): block for own, block in pairs if own is not None and str(own) != block}


def with_classes(dataset: "Dataset", args: "SGPOConfig", bank: "StrategyBank | None" = None) -> "Dataset":
    """
    Adds the column with the class that each problem's block is formed from.

    Args:
        dataset ([`~datasets.Dataset`]):
            Training problems. If they have the column already they are returned as they are.
        args ([`SGPOConfig`]):
            Its `class_column`, `num_clusters`, `small_classes` and seed are used.
        bank ([`StrategyBank`], *optional*):
            Its embedder is used where embeddings are needed.

    Returns:
        [`~datasets.Dataset`]

    Raises:
        [`DataError`]: The class column is missing, or a class has too few problems for a block.
    """
    if CLASS_COLUMN in dataset.column_names:
        return dataset

    def embed(texts: list[str]) -> Any:
        return bank.embed(texts) if bank is not None else load_embedder(args.embedding_model)(texts)

    classes = block_classes(dataset, args, args.transfer_block_size, embed)
    wanted = args.generation_batch_size // args.num_generations
    if wanted > len(dataset):
        logger.warning(
            f"A step takes {wanted} problems, and there are {len(dataset)}: it repeats some of them. Lower "
            "`per_device_train_batch_size` or `gradient_accumulation_steps`, or add problems."
        )
    return dataset.add_column(CLASS_COLUMN, classes)
