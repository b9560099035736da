from dtr_scale.engines.vote import LeaveVote
from dtr_scale.engines.world import join_world
from tests.support.ranks import run_on_ranks


def votes() -> list[bool]:
    """Runs on each rank: the second wishes to leave at step 3 of 5, the others never do."""
    world = join_world(needs_process_group=True)
    vote = LeaveVote(world)
    passed = [vote.passed(world.rank == 1 and step >= 3) for step in range(1, 6)]
    world.leave()
    return passed


def test_ranks_learn_of_a_wish_at_the_same_step_and_alone_at_once():
    assert run_on_ranks(2, votes) == [[False, False, False, True, True]] * 2
    (alone,) = run_on_ranks(1, votes)
    assert not any(alone)
