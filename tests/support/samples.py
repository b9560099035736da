"""Settings of a run that is sampled in tests, and what they ask of the command."""

from pathlib import Path

from dtr_scale.cli.main import main

SMALL = (
    "--train.global_batch_size=16", "--train.micro_batch_size=16", "--train.max_steps=4",
    "--checkpoint.every_steps=2", "--checkpoint.keep_last=9", "--evaluation.every_steps=0",
    "--train.ema_sigma_rel=[0.05, 0.1]", "--train.lr=1e-2",
)  # fmt: skip
STEPS, BATCH = "--evaluation.num_sampling_steps=4", "--evaluation.batch_size=32"
FAST = (STEPS, BATCH)


def refused(capsys, *arguments):
    capsys.readouterr()
    assert main(["sample", *map(str, arguments)]) == 2
    return capsys.readouterr().err.splitlines()[-1]


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}
