"""The model of steps and all-reduces, by exact values."""

import sys

import pytest

from kit import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "benchmarks"))
from scaling_model import Link, Ranks, Step, all_reduce_s, efficiency, step_s

FREE = Link(0.0, 1e30)
LINK = Link(latency_s=0.001, bytes_per_s=1000, what="a slow one")


def ranks(world_size: int, link: Link = LINK) -> Ranks:
    return Ranks(1, world_size, link, FREE)


@pytest.mark.parametrize(
    ("world_size", "expected"),
    [
        (1, 0),
        (2, 2 * (0.001 + 0.5)),  # 1,000 bytes in halves, there and back
        (4, 6 * (0.001 + 0.25)),
        (1000, 2 * 999 * (0.001 + 0.001)),
    ],
)
def test_a_ring(world_size, expected):
    assert all_reduce_s(1000, ranks(world_size)) == pytest.approx(expected)


def test_between_nodes_each_rank_sends_its_share_of_the_sum():
    slow = Link(0.01, 100)
    assert all_reduce_s(1000, Ranks(2, 4, LINK, slow)) == pytest.approx(6 * 0.251 + 2 * (0.01 + 1.25))
    assert all_reduce_s(1000, Ranks(2, 1, LINK, slow)) == pytest.approx(2 * (0.01 + 5))


def test_one_bucket_is_sent_when_all_is_computed():
    assert step_s(2.0, 1000, 1000, ranks(2)) == pytest.approx(2 + 1.002)
    assert step_s(2.0, 1000, 5000, ranks(2)) == pytest.approx(2 + 1.002)


def test_buckets_are_sent_while_the_next_ones_are_computed():
    # Forward 10 s, then two halves of the backward pass: the first is sent at 20 s, the second at 30 s.
    assert step_s(30.0, 1000, 500, ranks(2)) == pytest.approx(30 + 0.502)
    # Sending a bucket takes longer than computing the next one: the second one waits for the line.
    assert step_s(0.3, 1000, 500, ranks(2)) == pytest.approx(0.2 + 2 * 0.502)


def test_nothing_is_sent_by_a_single_rank():
    assert step_s(2.0, 1000, 500, ranks(1)) == 2.0


def test_efficiency_is_lost_to_what_does_not_shrink_and_to_the_line():
    step = Step(fixed_s=0.1, sample_s=0.01)
    assert efficiency(step, 90, 1000, 1000, ranks(1)) == pytest.approx(1)
    assert efficiency(step, 90, 1000, 1000, ranks(10, FREE)) == pytest.approx(1.0 / (10 * 0.19))
    assert efficiency(step, 90, 1000, 1000, ranks(2)) == pytest.approx(1.0 / (2 * (0.55 + 1.002)))
