"""Sets of ranks, as kernels and host share them: who is in them, and who passes on whose tokens."""

import pytest

from dskernels import _C

comm = _C.comm


@pytest.mark.parametrize("ranks", [0, 1, 0b1011, 1 << 63, (1 << 64) - 1])
def test_a_number_that_is_no_rank_is_in_no_set(ranks):
    for rank in range(64):
        assert comm.has_rank(ranks, rank) == bool(ranks >> rank & 1)
    for rank in (-(1 << 31), -64, -1, 64, 65, 1023, (1 << 31) - 1):
        assert not comm.has_rank(ranks, rank)


@pytest.mark.parametrize("ranks", [0, 1, 0b1011, 1 << 63, (1 << 64) - 1])
def test_sets_are_walked_from_the_lowest_rank(ranks):
    assert comm.list_ranks(ranks) == [r for r in range(64) if ranks >> r & 1]


@pytest.mark.parametrize("ranks, per_node", [(4, 2), (6, 2), (8, 4), (64, 8), (3, 1), (5, 0)])
def test_rails_join_the_same_places_of_different_nodes(ranks, per_node):
    everyone = (1 << ranks) - 1
    for alive in (everyone, everyone & 0x5555555555555555, everyone & ~0b110):
        for me in range(ranks):
            want = [
                r for r in range(ranks)
                if per_node and r != me and r % per_node == me % per_node and alive >> r & 1
            ]  # fmt: skip
            assert comm.list_ranks(comm.rails_of(me, per_node, alive)) == want


@pytest.mark.parametrize("ranks", [1, 3, 63, 64])
def test_no_living_rank_lies_behind_the_last(ranks):
    """What lets kernels ask for membership alone: the host's masks hold the group's ranks only."""
    emu = pytest.importorskip("dskernels.emu")
    if not emu.available():
        pytest.skip(emu.available().reason)
    from dskernels.cuda.ep import PeerGroup

    group = PeerGroup("emu", ranks, num_experts=ranks, max_tokens=1, hidden=16, topk=1, num_sms=1)
    for up in ([True] * ranks, [r % 2 == 0 for r in range(ranks)]):
        group.alive = up
        for rank in group.ranks:
            mask = int(rank.control[0]) % (1 << 64)
            assert comm.list_ranks(mask) == [r for r in range(ranks) if up[r]]
    with pytest.raises(ValueError, match=f"alive: expected {ranks} entries"):
        group.alive = [True] * (ranks + 1)
