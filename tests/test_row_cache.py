"""The cache that rows are generated with holds what transformers' own would."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache

from trl_sgpo.speed.row_cache import BLOCK, RowCache


def states(rows, tokens):
    return torch.randn(rows, 2, tokens, 4), torch.randn(rows, 2, tokens, 3)


def held(cache):
    return [(layer.keys, layer.values) for layer in cache.layers]


@given(
    rows=st.lists(st.integers(0, 2), min_size=1, max_size=5),
    steps=st.lists(st.integers(1, BLOCK + 8) | st.just("select"), max_size=5),
)
def test_same_as_a_cache_that_is_copied_for_every_token(rows, steps):
    """Whatever is added and whichever rows are left out, and the beginnings stay what they were."""
    heads = DynamicCache()
    for layer in range(2):
        heads.update(*states(3, 5), layer)
    before = [(keys.clone(), values.clone()) for keys, values in held(heads)]
    index = torch.tensor(rows)
    expected = DynamicCache()
    for layer, (keys, values) in enumerate(before):
        expected.update(keys[index], values[index], layer)
    limit = 5 + sum(step for step in steps if step != "select")
    cache = RowCache(heads, index, length=5, limit=limit)
    count = len(rows)
    for step in steps:
        if step == "select":
            count = -(-count // 2)
            kept = torch.randperm(count)
            cache.batch_select_indices(kept)
            expected.batch_select_indices(kept)
        else:
            for layer in range(2):
                new = states(count, step)
                returned = cache.update(*new, layer)
                torch.testing.assert_close(returned, expected.update(*new, layer), rtol=0, atol=0)
        torch.testing.assert_close(held(cache), held(expected), rtol=0, atol=0)
        assert cache.get_seq_length() == expected.get_seq_length()
    torch.testing.assert_close(held(heads), before, rtol=0, atol=0)


def test_memory_is_taken_for_several_tokens_and_never_for_more_than_the_limit():
    heads = DynamicCache()
    heads.update(*states(1, 5), 0)
    cache = RowCache(heads, torch.tensor([0, 0]), length=5, limit=10 + BLOCK)
    places, lengths = set(), set()
    for _ in range(5 + BLOCK):
        keys, _ = cache.update(*states(2, 1), 0)
        places.add(keys.data_ptr())
        lengths.add(keys.untyped_storage().nbytes() // (2 * 2 * 4 * 4))
    assert len(places) == 2 and lengths == {6 + BLOCK, 10 + BLOCK}


@given(rows=st.lists(st.integers(0, 2), min_size=1, max_size=7), at_a_time=st.integers(1, 8), tokens=st.integers(1, 4))
def test_filled_in_parts_it_holds_what_all_rows_add_at_once(rows, at_a_time, tokens):
    heads = DynamicCache()
    for layer in range(2):
        heads.update(*states(3, 5), layer)
    whole, in_parts = (RowCache(heads, torch.tensor(rows), length=5 + tokens, limit=20) for _ in range(2))
    places = [keys.data_ptr() for keys, _ in held(in_parts)]
    new = [states(len(rows), tokens) for _ in range(2)]
    for layer, (keys, values) in enumerate(new):
        whole.update(keys, values, layer)
    read = []
    for part, cache in in_parts.parts(at_a_time, tokens):
        read.append(len(rows[part]))
        for layer, (keys, values) in enumerate(new):
            cache.update(keys[part], values[part], layer)
    assert sum(read) == len(rows) and max(read) <= at_a_time
    torch.testing.assert_close(held(in_parts), held(whole), rtol=0, atol=0)
    assert in_parts.get_seq_length() == whole.get_seq_length() == 5 + tokens
    assert [keys.data_ptr() for keys, _ in held(in_parts)] == places  # no second copy
