"""
Packed rows by each attention kernel of a device, against rows one by one in float64.

    PYTHONPATH=tests python -m benchmarks.packed_attention --output packed_attention.json
"""

import argparse
import json
import math
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from models import evenness, padded, problems
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForCausalLM
from trl import GRPOConfig

from trl_sgpo import SharedPromptGRPOTrainer
from trl_sgpo.bench.throughput import synchronize
from trl_sgpo.files import write_file
from trl_sgpo.inference.weights import require_model
from trl_sgpo.speed.shared_prompts import SharedPrompts, share_prompts


MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
OWN = 128
"""Tokens that the longest row does not share, so that prompt and row have the same remainder."""
LENGTHS = [256 + remainder for remainder in (0, 1, 63, 64, 65, 127)]
"""Of the longest row. cuDNN's backward pass gives NaN with L % 128 == 64, a mask and low scores (pytorch#196678)."""
DTYPES = (torch.bfloat16, torch.float32)
DEFAULT = "PyTorch's choice"
KERNELS = {
    DEFAULT: None,
    "math": SDPBackend.MATH,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
ROUNDING = 4.0
"""Tolerance, in differences of math attention of rows one by one in the same dtype, which are rounding alone."""
STATES_TOLERANCE = 0.1
"""Of relative differences at scores of -128, where kernels round differently. A fault gives NaN, or values near 1."""

Values = Callable[[torch.dtype, bool], tuple[torch.Tensor, list[torch.Tensor]]]
"""Maps a dtype and whether rows are packed to log-probabilities or outputs, and gradients."""


def rows_of(length: int, vocab_size: int, device: str) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Two prompts with two rows each, of different lengths, the longest of which is given."""
    draw = torch.Generator().manual_seed(length)

    def tokens(count: int) -> list[int]:
        return torch.randint(3, vocab_size, (count,), generator=draw).tolist()

    prompts = (tokens(length - OWN + 1), tokens((length - OWN) // 2))
    ids, mask, width = padded([(prompts[0], [tokens(OWN - 1), tokens(5)]), (prompts[1], [tokens(90), tokens(60)])])
    return ids.to(device), mask.to(device), width


def model_values(
    trainer: SharedPromptGRPOTrainer,
    ids: torch.Tensor,
    mask: torch.Tensor,
    width: int,
    dtype: torch.dtype,
    packed: bool,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Log-probabilities as in training, and gradients of all weights."""
    trainer.shares_prompts, model = packed, trainer.model
    for weight in model.parameters():  # and no buffers, which are in float32 whatever the dtype
        weight.grad, weight.data = None, weight.data.to(dtype)
    rows = [(ids, mask, ids.size(1) - width)]
    if not packed:
        alone = [row[shown].unsqueeze(0) for row, shown in zip(ids, mask.bool(), strict=True)]
        counts = mask[:, width:].sum(dim=1).tolist()
        rows = [(row, torch.ones_like(row), count) for row, count in zip(alone, counts, strict=True)]
    found = []
    for row, shown, count in rows:
        log_probs = trainer._get_per_token_logps_and_entropies(model, row, shown, count)[0]
        log_probs = log_probs[shown[:, -count:].bool()]
        start = sum(map(len, found))
        weights = torch.arange(start, start + len(log_probs), device=ids.device).cos()
        (log_probs * weights).sum().backward()
        found.append(log_probs.detach())
    return torch.cat(found), [weight.grad for weight in model.parameters() if weight.grad is not None]


def state_values(
    states: Sequence[torch.Tensor],
    shared: SharedPrompts,
    places: list[list[int]],
    dtype: torch.dtype,
    packed: bool,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Outputs of one attention layer, and gradients of its queries, keys and values."""
    query, key, value = leaves = [state.to(dtype, copy=True).requires_grad_() for state in states]
    groups = query.size(1) // key.size(1)
    if packed:
        layer = torch.nn.Module()
        layer.num_key_value_groups = groups
        output = shared.attend(layer, query, key, value)[0]
        rows = [output[place] for place in places]
    else:
        heads = query, *(state.repeat_interleave(groups, dim=1) for state in (key, value))
        rows = [
            torch.nn.functional.scaled_dot_product_attention(*(x[:, :, place] for x in heads), is_causal=True)[0]
            for place in places
        ]
        rows = [row.transpose(0, 1) for row in rows]
    output = torch.cat(rows)
    output.backward(torch.arange(output.numel(), device=output.device).cos().view_as(output).to(output.dtype))
    return output.detach(), [leaf.grad for leaf in leaves if leaf.grad is not None]


def low_scores(shared: SharedPrompts, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values in bfloat16 with all scores near -128, below the -89 at which cuDNN's fault shows."""
    draw = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, heads, shared.input_ids.size(1), 64, generator=draw) / 2 for heads in (6, 2, 2)
    )
    query[..., 0], key[..., 0] = 32.0, -32.0
    return tuple(state.to(device, torch.bfloat16) for state in (query, key, value))  # type: ignore[return-value]


def differences(found: Any, expected: Any) -> tuple[float, float]:
    """Largest difference of the values, and the relative one of all gradients together."""
    (values, gradients), (right, right_gradients) = found, expected
    squares = [
        (((a.double() - b) ** 2).sum().item(), (b**2).sum().item())
        for a, b in zip(gradients, right_gradients, strict=True)
    ]
    difference, whole = (sum(part) for part in zip(*squares, strict=True))
    return (values.double() - right).abs().max().item(), math.sqrt(difference / whole)


def measured(values: Callable[[], Any], expected: Any, backend: SDPBackend | None) -> dict[str, Any]:
    """Differences with one kernel, or why PyTorch has none of this kind."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            with nullcontext() if backend is None else sdpa_kernel(backend):
                found = values()
            synchronize()
        except RuntimeError as error:
            refuses = backend is not None and str(error).startswith(("No available kernel", "No viable backend"))
            reasons = [str(each.message).split(" (Triggered")[0] for each in said if each.category is UserWarning]
            message = (" ".join(dict.fromkeys(reasons)) if refuses else "") or str(error)
            return {"refused" if refuses else "error": message[:500]}
    values_differ, gradients_differ = differences(found, expected)
    return {"values": values_differ, "gradients": gradients_differ}


def compare(name: str, lengths: Sequence[int] = LENGTHS) -> Iterator[dict[str, Any]]:
    """
    Compares all kernels at all lengths.

    Args:
        name (`str`):
            Hub id or directory of a model.
        lengths (`Sequence[int]`):
            Lengths of the longest row, at least 131.

    Yields:
        `dict`: What is compared (`of`), with which kernel, dtype and length, with packed rows or rows one by one, and
        the differences from rows one by one by math attention in float64, or why the kernel refuses them.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(require_model(name), dtype=torch.bfloat16)
    with tempfile.TemporaryDirectory() as directory:
        args = GRPOConfig(directory, bf16=False, gradient_checkpointing=False, report_to="none", num_generations=4)
        trainer = SharedPromptGRPOTrainer(model, evenness, args, problems())
        for length in lengths:
            ids, mask, width = rows_of(length, model.config.vocab_size, device)
            shared = share_prompts(ids, mask, width)
            assert shared is not None
            compared: dict[str, Values] = {
                "model": partial(model_values, trainer, ids, mask, width),
                "low scores": partial(
                    state_values, low_scores(shared, device), shared, places_of(shared, mask, width)
                ),
            }
            for of, values in compared.items():
                with sdpa_kernel(SDPBackend.MATH):
                    expected = values(torch.float64, False)
                for dtype, kernel, packed in product(DTYPES, KERNELS, (False, True)):
                    yield {
                        "of": of,
                        "dtype": str(dtype).removeprefix("torch."),
                        "kernel": kernel,
                        "rows": "packed" if packed else "one by one",
                        "length": length,
                        **measured(partial(values, dtype, packed), expected, KERNELS[kernel]),
                    }


def places_of(shared: SharedPrompts, mask: torch.Tensor, width: int) -> list[list[int]]:
    """Places of each row's tokens in the packed sequence. Every second row has a prompt that was read before."""
    place = {source: index for index, source in enumerate(shared.source.tolist())}
    return [
        [
            place[(row - row % 2 if column < width - 1 else row) * mask.size(1) + column]
            for column in shown.nonzero().flatten().tolist()
        ]
        for row, shown in enumerate(mask)
    ]


def largest(values: Iterable[float]) -> float:
    """The largest, NaN if one is."""
    return max(values, key=lambda value: (math.isnan(value), value))


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Largest differences of each kernel over all lengths, beside their tolerances, or why there are none."""
    kinds: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        kinds.setdefault((row["of"], row["dtype"], row["kernel"], row["rows"]), []).append(row)
    found = []
    for (of, dtype, kernel, layout), group in kinds.items():
        line: dict[str, Any] = {"of": of, "dtype": dtype, "kernel": kernel, "rows": layout}
        for reason in ("refused", "error"):
            if told := [row[reason] for row in group if reason in row]:
                line |= {reason: told[0], f"{reason}_lengths": len(told)}
        wrong = {row["length"] for row in group if "error" in row}
        for figure in ("values", "gradients"):
            if part := {row["length"]: row[figure] for row in group if figure in row}:
                rounding = largest(row.get(figure, math.nan) for row in kinds[of, dtype, "math", "one by one"])
                limit = ROUNDING * rounding if of == "model" else STATES_TOLERANCE
                line[f"{figure}_tolerance"] = limit
                line[figure] = largest(part.values())
                wrong |= {length for length, value in part.items() if not value <= limit}
        found.append(line | {"wrong_lengths": sorted(wrong)})
    return found


def json_text(result: Any) -> str:
    """JSON, in which numbers that are not finite are `null`."""

    def finite(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: finite(each) for key, each in value.items()}
        if isinstance(value, list):
            return [finite(each) for each in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(finite(result), indent=2, allow_nan=False)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.packed_attention", description=__doc__)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--output", required=True)
    options = parser.parse_args(argv)
    rows = []
    for row in compare(options.model, options.lengths):
        rows.append(row)  # written after each, so that a kill loses one
        write_file(Path(options.output), json_text({"rows": rows}))
    write_file(Path(options.output), json_text({"summary": summary(rows), "rows": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
