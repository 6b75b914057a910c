"""Rows that share a prompt: the same log-probabilities, entropies and gradients as rows apart."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import ARCHITECTURES, ROWS_APART, evenness, padded, problems, save_tiny_model
from transformers import AutoModelForCausalLM

from trl_sgpo import SGPOConfig, SGPOTrainer
from trl_sgpo.speed import generation
from trl_sgpo.speed.scoring import RowScorer, problems_together
from trl_sgpo.speed.shared_prompts import packed_attention, share_prompts


token = st.integers(3, 250)
group = st.tuples(
    st.lists(token, min_size=1, max_size=5),
    st.lists(st.lists(token, max_size=4), min_size=1, max_size=4),
)


def merged(groups):
    """Neighbouring groups with the same prompt, as one."""
    together: list[tuple[list[int], list[list[int]]]] = []
    for prompt, completions in groups:
        if together and together[-1][0] == prompt:
            together[-1][1].extend(completions)
        else:
            together.append((prompt, list(completions)))
    return together


repeating = (
    st.lists(group, min_size=1, max_size=4).map(merged).filter(lambda groups: any(len(c) > 1 for _, c in groups))
)


@given(repeating)
def test_each_token_attends_to_its_row(groups):
    """Every row reads as its tokens in order, and attention gives what it gives on each row alone."""
    ids, mask, width = padded(groups)
    shared = share_prompts(ids, mask, width)
    place = {source: index for index, source in enumerate(shared.source.tolist())}
    T = len(place)
    query, key, value = (torch.randn(1, heads, T, 8) for heads in (4, 2, 2))
    layer = torch.nn.Module()
    layer.num_key_value_groups = 2
    found = shared.attend(layer, query, key, value)
    row = 0
    for prompt, completions in groups:
        first = row
        for completion in completions:
            columns = range(width - len(prompt), width + len(completion))
            places = [place[(first if c < width - 1 else row) * ids.size(1) + c] for c in columns]
            assert shared.input_ids[0, places].tolist() == prompt + completion
            assert shared.position_ids[0, places].tolist() == list(range(len(places)))
            alone = torch.nn.functional.scaled_dot_product_attention(
                *(x[:, :, places] for x in (query, key, value)), is_causal=True, enable_gqa=True
            )
            torch.testing.assert_close(found[:, places], alone.transpose(1, 2), rtol=1e-4, atol=1e-5)
            row += 1


@given(repeating)
def test_labels_and_values_find_their_places(groups):
    """Every completion token is predicted exactly once, and what is said of it returns to its place."""
    ids, mask, width = padded(groups)
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :width] = -100
    shared = share_prompts(ids, mask, width)
    predicted = shared.next_labels(labels)
    back = shared.to_rows(torch.where(predicted == -100, 0, predicted))[:, :-1]
    assert torch.equal(back, torch.where(labels == -100, 0, labels)[:, 1:])
    assert (predicted != -100).sum() == (labels != -100).sum()


@given(st.lists(group, min_size=1, max_size=4))
def test_prompts_are_read_once_and_padding_never(groups):
    ids, mask, width = padded(groups)
    shared = share_prompts(ids, mask, width)
    problems = merged(groups)
    if all(len(completions) == 1 for _, completions in problems):
        assert shared is None
    else:
        tokens = sum(len(prompt) - 1 + sum(1 + len(c) for c in completions) for prompt, completions in problems)
        assert shared.input_ids.shape == shared.position_ids.shape == (1, tokens)
        assert shared.counts == [len(completions) for _, completions in problems]


def make_trainer(directory, architecture, attention=None, **settings):
    path = save_tiny_model(directory / "model", architecture)
    args = SGPOConfig(
        str(directory / "out"),
        per_device_train_batch_size=8,
        num_generations=4,
        use_bank=False,
        report_to="none",
        bf16=False,
        gradient_checkpointing=False,
    )
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation=attention, **settings)
    return SGPOTrainer(model, evenness, args, problems())


@pytest.fixture(scope="module", params=[*sorted(ARCHITECTURES.keys() - {*ROWS_APART}), "llama-eager"])
def trainer(request, tmp_path_factory):
    architecture, _, attention = request.param.partition("-")
    return make_trainer(tmp_path_factory.mktemp(request.param), architecture, attention or None)


GROUPS = [([5, 6, 7, 8, 9], [[10, 11, 12], [13], [14, 15]]), ([20, 21, 22], [[23, 24, 25, 26], [27, 28]])]


def scored(trainer, share, groups=GROUPS):
    ids, mask, width = padded(groups)
    trainer.shares_prompts = share
    trainer.model.zero_grad()
    with packed_attention():
        logps, entropies, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model, ids, mask, ids.size(1) - width, compute_entropy=True
        )
        weights = torch.arange(logps.numel()).view_as(logps).cos()
        (logps * weights).sum().backward()
    return logps.detach(), entropies.detach(), [p.grad for p in trainer.model.parameters() if p.grad is not None]


def test_same_scores_and_gradients_as_apart(trainer):
    if trainer.model.config._attn_implementation == "eager":
        assert not trainer.shares_prompts  # and its generation is tested below
        return
    assert trainer.shares_prompts
    for groups in ([GROUPS[0]], [GROUPS[1]], GROUPS):
        apart, together = scored(trainer, False, groups), scored(trainer, True, groups)
        torch.testing.assert_close(together[:2], apart[:2], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(together[2], apart[2], rtol=1e-3, atol=1e-5)


def test_same_scores_and_gradients_where_layers_are_computed_again(tmp_path):
    trainer = make_trainer(tmp_path, "llama")
    trainer.model.train()
    kept = scored(trainer, True)
    trainer.model.gradient_checkpointing_enable({"use_reentrant": False})
    again = scored(trainer, True)
    assert trainer.model.is_gradient_checkpointing
    torch.testing.assert_close(again, kept)


@pytest.mark.parametrize(
    ("prompts", "rest"),
    [
        ([[5, 6, 7, 8], [20, 21]], 4),
        ([[5, 6, 7, 8], [5, 6, 7]], 3),  # the second is all that is read ahead of the first
        ([[5], [20, 21]], None),
    ],
)
def test_same_generation_as_apart(trainer, prompts, rest):
    """
    Greedy completions of both phases are those of rows read apart. The requests are read once for both, unless one has
    nothing to share.
    """
    requests = [prompts[0], prompts[0], prompts[1], prompts[0]]
    contexts = [request + rest for request, rest in zip(requests, [[9], [], [30, 31, 32], [40, 41]], strict=True)]
    trainer.generation_config.do_sample = False
    apart = [trainer.generate(phase, 6)[0] for phase in (prompts, contexts)]
    read = []
    embeddings = trainer.model.get_input_embeddings()
    handle = embeddings.register_forward_hook(lambda module, args, output: read.append(tuple(args[0].shape)))
    with trainer.fast_generation(requests, calls=2):
        together = [trainer.generate(phase, 6)[0] for phase in (prompts, contexts)]
    handle.remove()
    assert together == apart
    prefills = [shape for shape in read if shape[1] > 1]
    assert prefills == ([(2, 3), (4, rest - 1)] if rest else [(2, 2), (4, 5)])
    assert "generate" not in vars(trainer.model)


def test_contexts_are_read_in_parts(trainer, monkeypatch):
    """Tokens and log-probabilities are those of all contexts read at once."""
    requests = [[5, 6, 7, 8]] * 3 + [[20, 21]] * 2
    contexts = [request + rest for request, rest in zip(requests, [[9], [], [30, 31, 32], [40], [41, 7]], strict=True)]
    read = []
    embeddings = trainer.model.get_input_embeddings()
    handle = embeddings.register_forward_hook(lambda module, args, output: read.append(tuple(args[0].shape)))
    trainer.generation_config.do_sample, generated = True, []
    for tokens in (2048, 6, 1):
        monkeypatch.setattr(generation, "READ_TOKENS", tokens)
        torch.manual_seed(0)
        with trainer.fast_generation(requests):
            generated.append(trainer.generate(contexts, 6))
    handle.remove()
    contexts_read = [5], [2, 2, 1], [1] * 5
    assert [shape for shape in read if shape[1] > 1] == [(rows, 3) for parts in contexts_read for rows in [2, *parts]]
    (ids, log_probs), *others = generated
    for other_ids, other_log_probs in others:
        assert other_ids == ids
        for row, other in zip(log_probs, other_log_probs, strict=True):
            torch.testing.assert_close(torch.tensor(other), torch.tensor(row), rtol=1e-4, atol=1e-5)


def test_rows_that_ended_are_left_out(trainer):
    """Greedy completions stay the same where rows end apart, and the model reads fewer tokens for them."""
    requests = [[5, 6, 7, 8]] * 3 + [[20, 21]] * 3
    contexts = [
        request + rest for request, rest in zip(requests, [[9], [], [30, 31], [40], [41], [7, 9]], strict=True)
    ]
    trainer.generation_config.do_sample, ends = False, (trainer.eos_token_ids, trainer.generation_config.eos_token_id)
    read = []
    handle = trainer.model.get_input_embeddings().register_forward_hook(
        lambda module, args, output: read.append(args[0].numel())
    )
    try:
        full = trainer.generate(contexts, 12)[0]
        trainer.eos_token_ids = trainer.generation_config.eos_token_id = sorted(
            {*ends[0], *(full[row][len(full[row]) // 2] for row in (0, 3))}
        )
        expected = [
            row[: 1 + min((i for i, t in enumerate(row) if t in trainer.eos_token_ids), default=12)] for row in full
        ]
        found, tokens = [], []
        for trainer.drops_finished_rows in (False, True):
            read.clear()
            with trainer.fast_generation(requests):
                found.append(trainer.generate(contexts, 12)[0])
            tokens.append(sum(read))
    finally:
        handle.remove()
        trainer.eos_token_ids, trainer.generation_config.eos_token_id = ends
    assert found == [expected, expected]
    lengths = sorted(map(len, expected))
    assert (tokens[1] < tokens[0]) == (lengths[1] < lengths[-1])  # a quarter of six rows are two


def test_a_cache_of_a_kind_asked_for_is_left_to_generation(tmp_path):
    trainer = make_trainer(tmp_path, "llama")
    trainer.generation_config.do_sample = False
    prompts = [[5, 6, 7, 8], [5, 6, 7, 8]]
    with trainer.fast_generation(prompts):
        dynamic = trainer.generate(prompts, 6)[0]
    trainer.generation_config.cache_implementation = "static"
    with trainer.fast_generation(prompts):
        assert trainer.generate(prompts, 6)[0] == dynamic


def shapes_read(trainer):
    """Shapes of what the model reads to score the groups."""
    read = []
    embeddings = trainer.model.get_input_embeddings()
    handle = embeddings.register_forward_hook(lambda module, args, output: read.append(tuple(args[0].shape)))
    scored(trainer, trainer.shares_prompts)
    handle.remove()
    return read


APART, TOGETHER = [(5, 9)], [(1, 4 + 4 + 2 + 3 + 2 + 5 + 3)]


def test_prompts_are_shared_where_attention_allows_it(tmp_path):
    """A window counts only where rows are longer. A router loss counts tokens by row, so rows stay as they are."""
    assert shapes_read(make_trainer(tmp_path, "llama")) == TOGETHER
    assert shapes_read(make_trainer(tmp_path, "llama", "eager")) == APART
    assert shapes_read(make_trainer(tmp_path, "mistral", sliding_window=8)) == TOGETHER
    assert shapes_read(make_trainer(tmp_path, "mistral", sliding_window=7)) == APART
    for architecture in ROWS_APART:
        assert shapes_read(make_trainer(tmp_path, architecture)) == APART


def test_untrained_tokens_are_not_scored(tmp_path):
    """What the loss leaves out is not projected onto the vocabulary; what it counts is the same."""
    trainer = make_trainer(tmp_path, "llama")
    everything = scored(trainer, True)[0]
    trained = torch.tensor([[1, 1, 0, 0], [0] * 4, [0, 1, 0, 0], [1, 1, 1, 1], [0] * 4])
    ids, mask, width = padded(GROUPS)
    scorer = RowScorer(trainer.model, width, trained)
    some = trainer._get_per_token_logps_and_entropies(scorer, ids, mask, ids.size(1) - width)[0]
    torch.testing.assert_close(some, everything * trained, rtol=1e-4, atol=1e-5)


@settings(max_examples=30)
@given(st.lists(st.integers(0, 3), min_size=8, max_size=8), st.sampled_from([1, 2, 4]))
def test_problems_together(problem, batches):
    """Rows of a problem become neighbours, each row stays whole, none is lost."""
    rows = {
        "prompt_ids": torch.tensor(problem).unsqueeze(1).expand(-1, 3),
        "completion_ids": torch.arange(8).unsqueeze(1),
        "advantages": torch.arange(8.0),
        "num_items_in_batch": torch.tensor(8),
        "old_per_token_logps": None,
    }
    size = 8 // batches
    split = [
        {k: v if v is None or v.dim() == 0 else v[i * size : (i + 1) * size] for k, v in rows.items()}
        for i in range(batches)
    ]
    moved = problems_together(split)
    assert len(moved) == batches and all(len(batch["advantages"]) == size for batch in moved)
    order = [int(row) for batch in moved for row in batch["completion_ids"]]
    prompts = [int(row[0]) for batch in moved for row in batch["prompt_ids"]]
    assert sorted(order) == list(range(8))
    assert prompts == [problem[row] for row in order] == sorted(problem, key=problem.index)
    assert [float(row) for batch in moved for row in batch["advantages"]] == order
    assert all(batch["num_items_in_batch"] == 8 and batch["old_per_token_logps"] is None for batch in moved)
