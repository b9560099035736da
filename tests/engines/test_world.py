"""Ranks form a mesh, and all of them hear of a failure."""

import os

import pytest

from dtr_scale.config.schema import EngineConfig
from dtr_scale.engines.world import join_world, without_lines_of_gloo
from dtr_scale.errors import ConfigError, DataError, EngineError
from tests.support.ranks import run_on_ranks


@pytest.mark.parametrize(
    ("replicate", "shard", "expected"),
    [(None, None, (1, 8)), (2, None, (2, 4)), (None, 4, (2, 4)), (4, 2, (4, 2)), (8, None, (8, 1))],
)
def test_a_mesh_uses_every_rank(replicate, shard, expected):
    assert EngineConfig(replicate=replicate, shard=shard).mesh(8) == expected


@pytest.mark.parametrize(("replicate", "shard"), [(2, 3), (3, None), (None, 16), (16, None)])
def test_a_mesh_that_does_not_fit_is_refused(replicate, shard):
    with pytest.raises(ConfigError, match=r"engine\.\w+ = \d+ .*do not fit 8 ranks: replicate x"):
        EngineConfig(replicate=replicate, shard=shard).mesh(8)


def test_what_is_no_line_of_gloos_is_printed_all_the_same(capfd):
    with pytest.raises(ValueError, match="here"), without_lines_of_gloo():
        os.write(1, b"before\n[Gloo] Rank 0 is connected to 1 peer ranks.\n")
        os.write(1, b"after\n")
        raise ValueError("here")
    assert capfd.readouterr().out == "before\nafter\n"


def verdicts() -> list[str]:
    """What a rank is told when rank 1 alone fails, in ways we know and do not know."""
    world = join_world(needs_process_group=True)
    told = []
    for error in (DataError("a shard is missing"), KeyError("surprise")):
        try:
            with world.agree():
                if world.rank == 1:
                    raise error
        except (DataError, EngineError) as verdict:
            told.append(f"{type(verdict).__name__}: {verdict} {verdict.on_every_rank}")
    with world.agree():
        told.append("none")
    world.leave()
    return told


def test_all_ranks_get_the_verdict_of_the_one_that_failed():
    first, second = run_on_ranks(2, verdicts)
    assert (
        first
        == second
        == [
            "DataError: a shard is missing True",
            "EngineError: rank 1 failed: KeyError: 'surprise' True",
            "none",
        ]
    )
