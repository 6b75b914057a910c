"""Transfer blocks: order of problems, sampler, layout of the outcome matrix."""

from collections import Counter
from itertools import combinations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from trl_sgpo.method.transfer import BlockGeometry, TransferBlockSampler, block_order, outcome_matrix, rows_of


properties = settings(max_examples=60, deadline=None, derandomize=True)
seeds = st.integers(0, 2**32)


def chunks(items, size):
    """Consecutive pieces of `size`; the last may be shorter."""
    return [items[i : i + size] for i in range(0, len(items), size)]


def interleaved(sizes):
    """Class names of a dataset whose classes have the given sizes, in mixed order."""
    names = [f"class-{number}" for number, size in enumerate(sizes) for _ in range(size)]
    return names[::2] + names[1::2]


@st.composite
def sized_classes(draw, multiples=False):
    """K and classes with at least K problems each, their sizes multiples of K if wanted."""
    size = draw(st.integers(1, 4))
    counts = st.integers(1, 4).map(lambda blocks: blocks * size) if multiples else st.integers(size, 13)
    return size, interleaved(draw(st.lists(counts, min_size=1, max_size=4)))


@st.composite
def samplers(draw):
    """A sampler, its geometry and the number of ranks it feeds."""
    size, classes = draw(sized_classes())
    geometry = BlockGeometry(size, draw(st.integers(1, 3)), draw(st.integers(0, 2)))
    ranks, blocks_a_rank = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    sampler = TransferBlockSampler(
        classes, geometry, size * ranks * blocks_a_rank, draw(st.integers(1, 3)), seed=draw(seeds)
    )
    return sampler, ranks


class TestBlockGeometry:
    def test_counts(self):
        geometry = BlockGeometry(problems=3, own=2, bank=4)
        assert (geometry.written, geometry.executions, geometry.rows) == (6, 10, 30)

    def test_writer_of_every_strategy(self):
        geometry = BlockGeometry(problems=3, own=2, bank=2)
        assert [geometry.writer(s) for s in range(geometry.executions)] == [0, 0, 1, 1, 2, 2, None, None]

    @pytest.mark.parametrize(("problems", "own"), [(1, 4), (2, 1), (4, 3)])
    def test_every_problem_writes_own_strategies(self, problems, own):
        geometry = BlockGeometry(problems, own)
        writers = Counter(geometry.writer(s) for s in range(geometry.executions))
        assert writers == dict.fromkeys(range(problems), own)


class TestOutcomeMatrix:
    def test_layout_is_block_strategy_problem(self):
        geometry = BlockGeometry(problems=2, own=1, bank=1)
        # Rows: problem 0 with strategies 0, 1, 2, then problem 1 with strategies 0, 1, 2, then the next block
        matrix = outcome_matrix(torch.arange(12.0), geometry)
        assert matrix.tolist() == [
            [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]],
            [[6.0, 9.0], [7.0, 10.0], [8.0, 11.0]],
        ]

    def test_single_problem_blocks(self):
        matrix = outcome_matrix(torch.arange(4.0), BlockGeometry(problems=1, own=2))
        assert matrix.tolist() == [[[0.0], [1.0]], [[2.0], [3.0]]]

    @given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.integers(0, 3))
    @properties
    def test_rows_of_is_the_inverse(self, blocks, problems, own, bank):
        geometry = BlockGeometry(problems, own, bank)
        rows = torch.arange(float(blocks * geometry.rows))
        matrix = outcome_matrix(rows, geometry)
        assert matrix.shape == (blocks, geometry.executions, problems)
        assert torch.equal(rows_of(matrix), rows)
        assert torch.equal(outcome_matrix(rows_of(matrix), geometry), matrix)

    @given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.integers(0, 3))
    @properties
    def test_entry_is_the_row_of_strategy_and_problem(self, blocks, problems, own, bank):
        geometry = BlockGeometry(problems, own, bank)
        matrix = outcome_matrix(torch.arange(blocks * geometry.rows), geometry)
        for row in range(blocks * geometry.rows):
            position, strategy = divmod(row, geometry.executions)
            block, problem = divmod(position, problems)
            assert matrix[block, strategy, problem] == row


class TestBlockOrder:
    @given(sized_classes(), seeds, st.integers(0, 3))
    @properties
    def test_covers_all_problems_in_blocks_of_one_class(self, drawn, seed, epoch):
        size, classes = drawn
        order = block_order(classes, size, seed, epoch)
        assert set(order) == set(range(len(classes)))
        assert len(order) % size == 0
        for block in chunks(order, size):
            assert len({classes[index] for index in block}) == 1
            assert len(set(block)) == size

    @given(sized_classes(), seeds)
    @properties
    def test_fills_each_class_by_less_than_a_block(self, drawn, seed):
        size, classes = drawn
        occurrences = Counter(classes[index] for index in block_order(classes, size, seed))
        for name, count in Counter(classes).items():
            assert 0 <= occurrences[name] - count < size

    @given(sized_classes(multiples=True), seeds)
    @properties
    def test_exactly_once_when_classes_are_multiples(self, drawn, seed):
        size, classes = drawn
        assert sorted(block_order(classes, size, seed)) == list(range(len(classes)))

    @given(st.data(), seeds)
    @properties
    def test_equal_answers_stay_apart(self, data, seed):
        size, blocks = data.draw(st.integers(2, 4)), data.draw(st.integers(1, 5))
        answers = data.draw(st.lists(st.sampled_from("abcdefgh"), min_size=size * blocks, max_size=size * blocks))
        assume(max(Counter(answers).values()) <= blocks)
        for block in chunks(block_order(["x"] * len(answers), size, seed, answers=answers), size):
            assert len({answers[index] for index in block}) == size

    @given(st.data(), seeds)
    @properties
    def test_equal_answers_stay_apart_in_filled_blocks(self, data, seed):
        size = data.draw(st.integers(2, 4))
        answers = data.draw(st.lists(st.sampled_from("abcdefgh"), min_size=size, max_size=20))
        assume(max(Counter(answers).values()) <= -(-len(answers) // size))
        # Otherwise no block of `size` different answers exists
        assume(len(set(answers)) >= size)
        for block in chunks(block_order(["x"] * len(answers), size, seed, answers=answers), size):
            assert len({answers[index] for index in block}) == size

    def test_answers_are_kept_apart_within_each_class(self):
        classes = ["odd", "even"] * 6
        answers = ["7", "8", "7", "8", "7", "8", "1", "2", "3", "4", "5", "6"]
        for seed in range(20):
            for block in chunks(block_order(classes, 2, seed, answers=answers), 2):
                assert answers[block[0]] != answers[block[1]]

    def test_frequent_answer_loses_no_problem(self):
        answers = ["0"] * 7 + ["1"]
        assert sorted(block_order(["x"] * 8, 2, seed=0, answers=answers)) == list(range(8))

    @given(sized_classes(), seeds, st.integers(0, 5))
    @properties
    def test_deterministic(self, drawn, seed, epoch):
        size, classes = drawn
        assert block_order(classes, size, seed, epoch) == block_order(classes, size, seed, epoch)

    @pytest.mark.parametrize("answers", [None, [str(index % 7) for index in range(24)]])
    def test_epochs_and_seeds_make_different_blocks(self, answers):
        classes = ["a", "b", "c"] * 8
        orders = [block_order(classes, 2, seed, epoch, answers) for seed in (0, 1) for epoch in range(4)]
        partitions = {frozenset(frozenset(block) for block in chunks(order, 2)) for order in orders}
        assert len(partitions) == len(orders)

    @given(sized_classes(), seeds, st.integers(0, 3))
    @properties
    def test_classes_are_spread_evenly(self, drawn, seed, epoch):
        """At any point of the epoch, all classes are equally far through their blocks, give or take one."""
        size, classes = drawn
        names = [classes[block[0]] for block in chunks(block_order(classes, size, seed, epoch), size)]
        blocks, seen = Counter(names), Counter()
        for name in names:
            seen[name] += 1
            for one, other in combinations(blocks, 2):
                apart = abs(seen[one] / blocks[one] - seen[other] / blocks[other])
                assert apart < 1 / blocks[one] + 1 / blocks[other]

    @given(sized_classes(), seeds, st.booleans())
    @properties
    def test_without_shuffling_blocks_are_in_the_order_of_the_dataset(self, drawn, seed, with_answers):
        """Also problems with equal answers. The last block of a class is filled with those before it."""
        size, classes = drawn
        answers = ["same"] * len(classes) if with_answers else None
        order = block_order(classes, size, seed, epoch=seed % 3, answers=answers, shuffle=False)
        blocks = chunks(order, size)
        for name in set(classes):
            members = [index for index, each in enumerate(classes) if each == name]
            of_class = [block for block in blocks if classes[block[0]] == name]
            full = len(members) // size
            assert of_class[:full] == chunks(members, size)[:full]
            assert [sorted(block) for block in of_class[full:]] == [members[-size:]] * (len(members) % size > 0)
        firsts = [block[0] for block in blocks]
        assert firsts == sorted(firsts)

    def test_frequent_answers_come_anywhere(self):
        answers = ["0", "0", "1", "2", "3", "4", "5", "6"]
        first = [block_order(["x"] * 8, 2, seed, answers=answers)[:2] for seed in range(30)]
        frequent = sum("0" in {answers[index] for index in block} for block in first)
        assert 0 < frequent < len(first)


class TestTransferBlockSampler:
    @given(samplers())
    @properties
    def test_length_is_the_number_yielded(self, drawn):
        sampler, _ = drawn
        assert len(sampler) == len(list(sampler)) > 0

    @given(samplers())
    @properties
    def test_drops_no_problem(self, drawn):
        sampler, _ = drawn
        assert set(sampler) == set(range(len(sampler.classes)))

    @given(samplers())
    @properties
    def test_repeats_problems_and_batches(self, drawn):
        sampler, _ = drawn
        G = sampler.geometry.executions
        problems = chunks(list(sampler), G)
        assert all(len(rows) == G and len(set(rows)) == 1 for rows in problems)
        batches = chunks([rows[0] for rows in problems], sampler.problems_per_batch)
        assert all(len(batch) == sampler.problems_per_batch for batch in batches)
        passes = chunks(batches, sampler.repeat_count)
        assert all(len(times) == sampler.repeat_count for times in passes)
        for times in passes:
            assert all(batch == times[0] for batch in times)

    @given(samplers())
    @properties
    def test_follows_block_order_and_wraps_round(self, drawn):
        sampler, _ = drawn
        K, per_batch = sampler.geometry.problems, sampler.problems_per_batch
        order = block_order(sampler.classes, K, sampler.seed)
        rows_a_pass = per_batch * sampler.geometry.executions
        first_passes = chunks(list(sampler), rows_a_pass)[:: sampler.repeat_count]
        sampled = [batch[i] for batch in first_passes for i in range(0, rows_a_pass, sampler.geometry.executions)]
        assert sampled[: len(order)] == order
        assert 0 <= len(sampled) - len(order) < per_batch
        assert sampled == [order[i % len(order)] for i in range(len(sampled))]

    @given(samplers())
    @properties
    def test_ranks_hold_whole_blocks(self, drawn):
        sampler, ranks = drawn
        geometry = sampler.geometry
        K, G = geometry.problems, geometry.executions
        local = sampler.problems_per_batch // ranks * G
        blocks = {tuple(block) for block in chunks(block_order(sampler.classes, K, sampler.seed), K)}
        slices = chunks(list(sampler), local)
        assert len(slices) % ranks == 0
        for rows in slices:
            assert len(rows) == local
            for block in chunks(rows, geometry.rows):
                assert tuple(block[::G]) in blocks
                assert block == [index for index in block[::G] for _ in range(G)]

    def test_dataset_smaller_than_a_batch(self):
        sampler = TransferBlockSampler(["a"] * 2, BlockGeometry(2, 1), problems_per_batch=6, repeat_count=1, seed=0)
        assert Counter(sampler) == {0: 6, 1: 6}
        assert len(sampler) == 12

    def test_epoch_is_asked_at_each_pass(self):
        epoch = 0
        classes = ["a", "b"] * 10
        sampler = TransferBlockSampler(classes, BlockGeometry(2, 1), 4, 1, seed=3, epoch=lambda: epoch)
        first = list(sampler)
        assert list(sampler) == first
        epoch = 1
        assert list(sampler) != first
        epoch = 0
        assert list(sampler) == first

    def test_without_shuffling_epochs_are_equal(self):
        epochs = iter(range(10))
        sampler = TransferBlockSampler(
            ["a"] * 20, BlockGeometry(2, 1), 4, 1, seed=3, shuffle=False, epoch=lambda: next(epochs)
        )
        assert list(sampler) == list(sampler)
        assert list(sampler)[::2] == list(range(20))

    def test_passes_answers_on(self):
        answers = ["1"] * 6 + ["2"] * 6
        for seed in range(10):
            sampler = TransferBlockSampler(["a"] * 12, BlockGeometry(2, 1), 4, 1, seed=seed, answers=answers)
            for block in chunks(list(sampler)[::2], 2):
                assert {answers[index] for index in block} == {"1", "2"}
