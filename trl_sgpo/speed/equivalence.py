"""
Log-probabilities of a few fixed rows of different lengths by each fast path, compared with those of the plain path.

They detect architectures whose attention ignores or refuses the arguments of a fast path, adapters that cannot be
merged exactly, and faults.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from peft import PeftModel
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from .generation import left_padded, limited, shared_prefixes
from .lm_head import contiguous_head_input
from .merging import AdapterMerge, base_of, inexact, merge_is_exact
from .sampling import sampled_log_probs


_END = 0
# Prompt of each row, what follows it without being generated, and what is generated, as places of tokens. No token
# that something follows is in two rows, so that each token says which one comes next. Rows end after 1, 2 and 4
# tokens: some leave the batch twice, and what stays is generated for two more tokens. Each forward pass reads all
# weights, so they are few
_LONG, _SHORT = [30, 31, 32, 33], [35, 36]
_ROWS = (
    (_LONG, [38, 1], [2, _END]),
    (_LONG, [4], [_END]),
    (_LONG, [39, 40, 5], [6, 7, 8, 9]),
    (_SHORT, [12], [_END]),
    (_SHORT, [41, 16], [13, 14, 15, _END]),
)
_PLACES = 48

Score = Callable[[dict[str, Any], bool, bool], torch.Tensor]
"""Maps a micro-batch, whether to pack its rows, and whether to cut its padding to log-probabilities `(B, T)`."""


class PathDiffers(Exception):
    """A fast path gives other values than the plain one. The message has the difference or the error."""


@dataclass(frozen=True)
class _Probe:
    """Prompts of the rows, what follows them, and what is generated then, as token ids."""

    prompts: list[list[int]]
    contexts: list[list[int]]
    generated: list[list[int]]
    end: int

    @classmethod
    def of(cls, vocab_size: int, shift: int = 0) -> "_Probe":
        """The rows for a vocabulary, with the same tokens generated after other prompts for another `shift`."""
        stride = max(1, vocab_size // _PLACES)

        def tokens(places: list[int], shift: int = 0) -> list[int]:
            return [(3 + stride * place + shift) % vocab_size for place in places]

        prompts = [tokens(prompt, shift) for prompt, _, _ in _ROWS]
        rests, generated = ([tokens(row[part]) for row in _ROWS] for part in (1, 2))
        contexts = [prompt + rest for prompt, rest in zip(prompts, rests, strict=True)]
        return cls(prompts, contexts, generated, tokens([_END])[0])

    def and_rows_of(self, other: "_Probe") -> "_Probe":
        """The rows of both."""
        prompts, contexts = self.prompts + other.prompts, self.contexts + other.contexts
        return _Probe(prompts, contexts, self.generated + other.generated, self.end)

    def micro_batch(self, device: torch.device, padding: int = 0) -> tuple[dict[str, Any], torch.Tensor]:
        """A micro-batch with columns of padding on both sides, and which tokens of its completions to compare."""
        prompt_ids, prompt_mask = left_padded(self.prompts, 0, device)
        rests = [context[len(prompt) :] for context, prompt in zip(self.contexts, self.prompts, strict=True)]
        rows = [rest + generated for rest, generated in zip(rests, self.generated, strict=True)]
        ids, mask = (each.flip(1) for each in left_padded([row[::-1] for row in rows], 0, device))
        starts = torch.tensor([[len(rest)] for rest in rests], device=device)
        compared = mask.bool() & (torch.arange(mask.size(1), device=device) >= starts)
        batch = {"prompt_ids": prompt_ids, "prompt_mask": prompt_mask, "completion_ids": ids, "completion_mask": mask}
        sides = {"prompt": (padding, 0), "completion": (0, padding)}
        padded = {key: torch.nn.functional.pad(value, sides[key.partition("_")[0]]) for key, value in batch.items()}
        return padded, torch.nn.functional.pad(compared, (0, padding))

    def following(self) -> dict[int, int]:
        """The token that is generated after each other one."""
        chains = [[context[-1], *row] for context, row in zip(self.contexts, self.generated, strict=True)]
        return {token: after for chain in chains for token, after in pairwise(chain)}


class _Forced(LogitsProcessor):
    """Makes `generate` choose the tokens of a probe."""

    def __init__(self, probe: _Probe):
        self.following, self.end = probe.following(), probe.end

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        chosen = [[self.following.get(token, self.end)] for token in input_ids[:, -1].tolist()]
        return torch.full_like(scores, -torch.inf).scatter(1, torch.tensor(chosen, device=scores.device), 0.0)


class PathChecks:
    """
    The checks of all fast paths. Each raises [`PathDiffers`] or an error of the model.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Model that is trained.
        score (`Callable`):
            Scores rows as training does, see [`Score`].
        temperature (`float`):
            Temperature of sampling and training.
        exact (`bool`):
            Whether the model computes in float32, with smaller tolerances.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, score: Score, temperature: float, exact: bool):
        self.model, self.score, self.temperature, self.exact = model, score, temperature, exact
        self.expected, self.effect_of_prompts = torch.empty(0), 0.0
        vocab_size = model.config.get_text_config().vocab_size
        self.probe = _Probe.of(vocab_size)
        self.after_both_prompts = self.probe.and_rows_of(_Probe.of(vocab_size, shift=1))

    def plain(self) -> torch.Tensor:
        """Log-probabilities by the plain path."""
        return self._scored()

    def compute_expected(self) -> None:
        """Computes what the paths are compared with."""
        self.expected, after_other_prompts = self._scored(self.after_both_prompts).chunk(2)
        self.effect_of_prompts = (after_other_prompts - self.expected).abs().mean().item()

    def _scored(self, probe: _Probe | None = None, pack: bool = False, trim: bool = False) -> torch.Tensor:
        batch, compared = (probe or self.probe).micro_batch(self.model.device, padding=2)
        log_probs = self.score(batch, pack, trim)
        return log_probs[compared[:, : log_probs.size(1)]]

    def own_logits(self) -> None:
        """The model's own logits, of which the plain path computes only the product with the LM head."""
        rows = [context + new for context, new in zip(self.probe.contexts, self.probe.generated, strict=True)]
        ids, mask = (each.flip(1) for each in left_padded([row[::-1] for row in rows], 0, self.model.device))
        logits = self.model(input_ids=ids, attention_mask=mask).logits[:, -ids.size(1) :].float() / self.temperature
        log_probs = logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None]).squeeze(2)
        generated = [
            log_probs[row, len(context) - 1 : len(tokens) - 1]
            for row, (context, tokens) in enumerate(zip(self.probe.contexts, rows, strict=True))
        ]
        self._expect_plain(torch.cat(generated), slack=10.0 if self.exact else 2.0)  # other kernels, and it is refused

    def _expect_plain(self, fast: torch.Tensor, slack: float = 1.0) -> None:
        """Raises [`PathDiffers`] if values differ by more than rounding. Other prompts give the scale."""
        if fast.shape != self.expected.shape:
            raise PathDiffers(f"{len(fast)} log-probabilities in place of {len(self.expected)}")
        difference = (fast - self.expected).abs().mean().item()
        allowed = 1e-5 + 1e-3 * self.effect_of_prompts if self.exact else 1e-2 + 0.1 * self.effect_of_prompts
        if not difference <= slack * allowed:  # also where it is NaN
            raise PathDiffers(f"log-probabilities differ by {difference:.2g} on average")

    def trimmed_padding(self) -> None:
        """Micro-batches cut to their own length."""
        self._expect_plain(self._scored(trim=True))

    def packed_rows(self) -> None:
        """Rows of a prompt packed into one sequence."""
        self._expect_plain(self._scored(pack=True))

    def merged_adapters(self, adapters: AdapterMerge, effect: float) -> None:
        """
        Adapters merged into the base weights, compared with the whole effect that adapters have. If there is none yet,
        only faults are looked for.
        """
        with adapters.merged():
            merged = self.plain()
        if effect == 0:
            self._expect_plain(merged)
            return
        difference = (merged - self.expected).abs().mean().item()
        if not merge_is_exact(difference, effect, self.exact):
            raise PathDiffers(inexact(difference, effect))

    def generation(self, drop_finished: bool) -> None:
        """
        Generation from the KV cache of the prompts, in which finished rows stay or leave the batch. Of two calls with
        different numbers of rows the second is compared, because some models keep positions of the last call.
        """
        probe, base = self.probe, base_of(self.model)
        limit = max(map(len, probe.generated))
        config = GenerationConfig(max_new_tokens=limit, do_sample=False, eos_token_id=[probe.end], pad_token_id=0)
        before, base.generation_config = base.generation_config, config
        try:
            with shared_prefixes(self.model, config, probe.prompts, calls=2, drop_finished=drop_finished):
                with limited(config, 1):
                    self._generated(config, probe.contexts[:2])
                with sampled_log_probs(self.model, self.temperature) as sampled:
                    found = self._generated(config, probe.contexts)
        finally:
            base.generation_config = before
        if [row[: len(other)] for row, other in zip(found, probe.generated, strict=True)] != probe.generated:
            raise PathDiffers("rows get tokens of other rows")
        log_probs = [value for row in sampled.of(probe.generated) for value in row]
        self._expect_plain(torch.tensor(log_probs, device=self.model.device))

    def _generated(self, config: GenerationConfig, contexts: list[list[int]]) -> list[list[int]]:
        ids, mask = left_padded(contexts, 0, self.model.device)
        with contiguous_head_input(self.model):
            output = self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                generation_config=config,
                logits_processor=LogitsProcessorList([_Forced(self.probe)]),
            )
        return output[:, ids.size(1) :].tolist()
