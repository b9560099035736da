"""Every engine from its first step to its samples, on both kinds of GPU."""

import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.gpu_stub.cases import COMBINED, COMPILED, HSDP, Case, all_cases, pairwise

HOURS = 8  # of all cases of an engine
EAGER = [case for case in all_cases() if not case.compiled]
PAIRWISE = pairwise(EAGER)
GROUPS = {engine: [case for case in PAIRWISE if case.engine == engine] for engine in COMBINED}
GROUPS["hsdp"] = [HSDP]
GROUPS |= {f"{case.engine}_compiled": [case] for case in COMPILED}


def test_few_cases_have_every_pair_of_settings(tell):
    pairs = {pair for case in EAGER for pair in case.pairs}
    assert pairs == {pair for case in PAIRWISE for pair in case.pairs}
    tell(f"{len(PAIRWISE)} of {len(EAGER)} cases that are not compiled")
    assert len(PAIRWISE) <= 45


def live(machine, place, cases: list[Case], hours: float = 0.25) -> None:
    """Train, save, evaluate, resume and sample cases of one engine, in one process."""
    results = machine.call(
        "live", place, [case.arguments() for case in cases], timeout_seconds=3600 * hours
    )
    for case, result in zip(cases, results, strict=True):
        assert not result["error"], f"{case}:\n{result['error']}"
        assert bool(result["graphs"]) == case.compiled, case
        assert not result["breaks"], case


@pytest.fixture(scope="module")
def runs(machine, request, tmp_path_factory):
    """The groups that are selected, as many at a time as there are cores."""
    here = [item for item in request.session.items if item.path == request.path]
    items = [item for item in here if "runs" in item.fixturenames]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        yield {
            group: pool.submit(live, machine, tmp_path_factory.mktemp(group), GROUPS[group])
            for group in (item.callspec.params["group"] for item in items)
        }


@pytest.mark.slow
@pytest.mark.parametrize("group", GROUPS)
def test_every_pair_of_settings_trains_resumes_and_samples(group, runs):
    runs[group].result()


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.timeout(HOURS * 3600)
@pytest.mark.parametrize("engine", COMBINED)
def test_all_settings_train_resume_and_sample(engine, machine, tmp_path):
    live(machine, tmp_path, [case for case in all_cases() if case.engine == engine], hours=HOURS)
