"""List the tables and figures of the paper: which trainings make them, and what it prints.

Every row names files of configs/, whose `expected` holds the paper's figures, and what is changed
of them. Nothing here reads a file.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple


class Column(NamedTuple):
    """One figure of each row."""

    title: str
    key: str
    """In `expected` of an experiment."""
    metric: str
    """In a run's evaluations; or `macs`, `steps_per_second` or `cka`, see `collect.py`."""
    num_samples: int | None = None
    step: int | None = None
    """Of the checkpoint; None: the row's last."""


class Row(NamedTuple):
    """One line of a table: a training, or several that are sampled as one."""

    label: str
    configs: tuple[str, ...]
    """Files of configs/, without `.json`."""
    changes: Mapping[str, Any] = {}
    """What the training has besides, by keys of the experiment."""
    measured_with: Mapping[str, Any] = {}
    """What its evaluation has besides."""
    figures: Mapping[str, float] = {}
    """The paper's figures that `expected` does not hold, by the keys of columns."""
    note: str = ""
    """What differs from the paper, or is not known of it."""


class Part(NamedTuple):
    """Rows with the same columns."""

    title: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]


class Table(NamedTuple):
    title: str
    parts: tuple[Part, ...]
    note: str = ""


def _row(label: str, *configs: str, **more: Any) -> Row:  # noqa: ANN401
    return Row(label, configs, **more)


FID_50K = Column("FID-50K", "fid_50k", "fid", 50_000)
FID_10K = Column("FID-10K", "fid_10k", "fid", 10_000)
_FID = (FID_50K,)
_CLASSES = (
    FID_50K,
    Column("IS", "is_50k", "inception_score", 50_000),
    Column("Prec", "precision_50k", "precision", 50_000),
    Column("Rec", "recall_50k", "recall", 50_000),
)

A100_STEPS_PER_SECOND = {
    ("DiT-S/2", False): 8.19, ("DiT-S/2", True): 8.14,
    ("DiT-B/2", False): 6.90, ("DiT-B/2", True): 6.87,
    ("DiT-L/2", False): 3.72, ("DiT-L/2", True): 3.71,
}  # fmt: skip
"""Table 7, by network and whether it has DTR: batch 256 on 8 A100."""
A100_GPUS, A100_BATCH = 8, 256
A100_SAMPLES_TIMES_MACS = 3.72 * A100_BATCH * 80.71e9
"""Table 7's rate for DiT-L/2: samples a second, times MACs of a forward."""


def _routings(network: str, of: str, *, columns: tuple[Column, ...], title: str) -> Part:
    rows = (
        _row(network, f"{of}_none_vanilla"),
        _row(f"{network} + R-TR", f"{of}_random_vanilla"),
        _row(f"{network} + DTR", f"{of}_dtr_vanilla"),
    )
    return Part(title, columns, rows)


def _alphas(
    network: str, of: str, alphas: tuple[float, ...], *, columns: tuple[Column, ...], title: str
) -> Part:
    """Return table 4's rows of a data set; alpha 4 is the setting of the other tables."""
    swept = (
        _row(
            f"{network} + DTR, alpha {alpha:g}",
            f"{of}_dtr_vanilla" + ("" if alpha == 4 else f"_a{alpha:g}_b0.8"),
        )
        for alpha in alphas
    )
    rows = (_row(f"{network} (beta 1)", f"{of}_none_vanilla"), *swept)
    return Part(title, columns, rows)


_WEIGHTINGS = {"vanilla": "vanilla", "minsnr": "Min-SNR", "antuw": "ANT-UW", "p2": "P2"}


def _weightings(
    network: str, of: str, names: tuple[str, ...], *, columns: tuple[Column, ...], title: str,
    measured_with: Mapping[str, Any] | None = None,
) -> Part:  # fmt: skip
    rows = tuple(
        _row(
            f"{network}{' + DTR' if routing == 'dtr' else ''}, {_WEIGHTINGS[name]}",
            f"{of}_{routing}_{name}",
            measured_with=measured_with or {},
        )
        for routing in ("none", "dtr")
        for name in names
    )
    return Part(title, columns, rows)


_L_WEIGHTINGS = ("vanilla", "minsnr", "antuw")
_TABLE_2_FFHQ = _weightings(
    "DiT-B/2", "dit_b_ffhq", ("vanilla", "minsnr", "antuw", "p2"),
    columns=(FID_10K,), title="FFHQ 256x256",
    measured_with={"evaluation.num_samples": 10_000},
)  # fmt: skip

_BETAS_NOTE = "plotted in the paper, without a number"
_FIGURE_4 = (
    _row("DiT-B/2", "dit_b_ffhq_none_vanilla"),
    _row("DiT-B/2 + R-TR, beta 0.6", "dit_b_ffhq_random_vanilla_a4_b0.6", note=_BETAS_NOTE),
    _row("DiT-B/2 + R-TR, beta 0.8", "dit_b_ffhq_random_vanilla"),
    *(
        _row(
            f"DiT-B/2 + DTR, beta {beta}, alpha {alpha:g}",
            "dit_b_ffhq_dtr_vanilla"
            + ("" if (alpha, beta) == (4, 0.8) else f"_a{alpha:g}_b{beta}"),
            note=_BETAS_NOTE if beta == 0.6 else "",
        )
        for beta in (0.6, 0.8)
        for alpha in (0.5, 1, 2, 3, 4, 5)
    ),
)

# The tick marks of figure 3 are not in its text.
FIGURE_3_SCALES = (1.25, 1.5, 1.75, 2.0, 2.5)

FIGURE_5_STEPS = (100_000, 200_000, 300_000, 400_000)
_FIGURE_5_COLUMNS = tuple(
    Column(f"{step // 1000}K", f"fid_10k_at_{step}", "fid", 10_000, step)
    for step in FIGURE_5_STEPS
)  # fmt: skip
_CURVE = {"evaluation.every_steps": 50_000, "evaluation.num_samples": 10_000}


def _curve(label: str, config: str, **figures: float) -> Row:
    return _row(label, config, changes=_CURVE, figures=figures)


_EXPERTS = tuple(f"dit_b_expert{k}_imagenet_none_vanilla" for k in range(4))

TABLES: dict[str, Table] = {
    "table1": Table(
        "Table 1: comparative results",
        (
            _routings("DiT-B/2", "dit_b_ffhq", columns=_FID, title="FFHQ 256x256"),
            _routings("DiT-L/2", "dit_l_imagenet", columns=_CLASSES, title="ImageNet 256x256"),
            _routings("DiT-B/2", "dit_b_coco", columns=_FID, title="MS-COCO 256x256"),
            _routings("ADM", "adm_ffhq64", columns=_FID, title="FFHQ 64x64"),
            _routings("ADM", "adm_imagenet64", columns=_CLASSES, title="ImageNet 64x64"),
        ),
        "The captions of MS-COCO that samples were drawn for are not told: ours are the held-out "
        "ones in order.",
    ),
    "table2": Table(
        "Table 2: DTR with loss weights",
        (
            _weightings(
                "DiT-L/2", "dit_l_imagenet", _L_WEIGHTINGS,
                columns=_CLASSES, title="ImageNet 256x256",
            ),
            _TABLE_2_FFHQ,
        ),
    ),
    "table3": Table(
        "Table 3: more training iterations",
        (
            Part(
                "ImageNet 256x256",
                _FID,
                (
                    _row(
                        "DiT-XL/2, 2.35M steps",
                        "dit_xl_imagenet_none_vanilla",
                        changes={"train.max_steps": 2_350_000},
                        figures={"fid_50k": 2.55},
                        note="the same training as the next row's, which goes on with it",
                    ),
                    _row("DiT-XL/2, 7M steps", "dit_xl_imagenet_none_vanilla"),
                    _row("DiT-L/2 + DTR + ANT-UW, 2M steps", "dit_l_dtr_antuw",
                         measured_with={"evaluation.num_samples": 50_000}),
                ),
            ),
        ),
        "The paper quotes DiT's own figures for DiT-XL/2: linear schedule, 3 guided channels.",
    ),
    "table4": Table(
        "Table 4: alpha of the masks, beta 0.8",
        (
            _alphas("DiT-B/2", "dit_b_ffhq", (0.5, 1, 2, 3, 4, 5),
                    columns=_FID, title="FFHQ 256x256"),
            _alphas("DiT-L/2", "dit_l_imagenet", (0.5, 1, 2, 3, 4, 5),
                    columns=_CLASSES, title="ImageNet 256x256"),
            _alphas("DiT-B/2", "dit_b_coco", (1, 3, 4, 5), columns=_FID, title="MS-COCO 256x256"),
            _alphas("ADM", "adm_imagenet64", (1, 3, 4, 5),
                    columns=_CLASSES, title="ImageNet 64x64"),
        ),
    ),
    "table5": Table(
        "Table 5: size of the network",
        (
            Part(
                "ImageNet 256x256",
                _CLASSES,
                tuple(
                    _row(f"DiT-{size}/2{' + DTR' if routing == 'dtr' else ''}",
                         f"dit_{size.lower()}_imagenet_{routing}_vanilla")
                    for size in "SBL"
                    for routing in ("none", "dtr")
                ),
            ),
        ),
    ),
    "table6": Table(
        "Table 6: DTR and multi-experts",
        (
            Part(
                "ImageNet 256x256",
                _CLASSES,
                (
                    _row("Vanilla (DiT-L/2)", "dit_l_imagenet_none_vanilla"),
                    _row("Multi-experts (DiT-B/2 x 4)", *_EXPERTS),
                    _row("DTR (DiT-L/2)", "dit_l_imagenet_dtr_vanilla"),
                ),
            ),
        ),
    ),
    "table7": Table(
        "Table 7: computation",
        (
            Part(
                "ImageNet 256x256",
                (
                    Column("GFLOPs", "gmacs", "macs"),
                    Column("Iters/sec", "steps_per_second", "steps_per_second"),
                ),
                tuple(
                    _row(
                        f"DiT-{size}/2{' + DTR' if routing == 'dtr' else ''}",
                        f"dit_{size.lower()}_imagenet_{routing}_vanilla",
                        figures={
                            "gmacs": gmacs,
                            "steps_per_second":
                                A100_STEPS_PER_SECOND[f"DiT-{size}/2", routing == "dtr"],
                        },
                    )
                    for size, routing, gmacs in (
                        ("S", "none", 6.06), ("S", "dtr", 6.06),
                        ("B", "none", 23.01), ("B", "dtr", 23.02),
                        ("L", "none", 80.71), ("L", "dtr", 80.73),
                    )
                ),
            ),
        ),
        "The paper's GFLOPs are multiply-adds. Its speed is that of 8 A100 with the VAE's encoder "
        "in the loop; ours is that of the machine which trained, on latents. Masks are no "
        "multiply-adds here.",
    ),
    "table8": Table(
        "Table 8: alternatives to the sliding window",
        (
            Part(
                "FFHQ 256x256",
                _FID,
                (
                    _row("Vanilla", "dit_b_ffhq_none_vanilla"),
                    _row("MaxRoaming", "dit_b_ffhq_maxroaming_vanilla",
                         note="how often masks roam is not told: ours every 500 steps"),
                    _row("ERCDDT", "dit_b_ffhq_ercddt_vanilla"),
                    _row("CDTR", "dit_b_ffhq_cdtr_vanilla"),
                    _row("DTR", "dit_b_ffhq_dtr_vanilla"),
                ),
            ),
        ),
    ),
    "fig3": Table(
        "Figure 3: guidance scale",
        tuple(
            _weightings(
                "DiT-L/2", "dit_l_imagenet", _L_WEIGHTINGS, columns=_CLASSES,
                title=f"ImageNet 256x256, guidance {scale:g}",
                measured_with={} if scale == 1.5 else {"evaluation.cfg_scale": scale},
            )
            for scale in FIGURE_3_SCALES
        ),
        "The paper plots without numbers; those at 1.5 are table 2's. The scales are ours.",
    ),
    "fig4": Table("Figure 4: alpha and beta", (Part("FFHQ 256x256", _FID, _FIGURE_4),)),
    "fig5": Table(
        "Figure 5: convergence",
        (
            Part(
                "ImageNet 256x256, FID-10K",
                _FIGURE_5_COLUMNS,
                (
                    _curve("DiT-S/2", "dit_s_imagenet_none_vanilla"),
                    _curve("DiT-S/2 + DTR", "dit_s_imagenet_dtr_vanilla"),
                    _curve("DiT-B/2", "dit_b_imagenet_none_vanilla", fid_10k_at_400000=31),
                    _curve("DiT-B/2 + DTR", "dit_b_imagenet_dtr_vanilla", fid_10k_at_200000=31),
                    *(
                        _curve(f"DiT-L/2{' + DTR' if routing == 'dtr' else ''}"
                               f", {_WEIGHTINGS[name]}", f"dit_l_imagenet_{routing}_{name}")
                        for name in _L_WEIGHTINGS
                        for routing in ("none", "dtr")
                    ),
                ),
            ),
        ),
        "The paper plots; its text has one figure: DiT-B/2 is near 31 at 400K steps, with DTR at "
        "200K.",
    ),
    "fig6": Table(
        "Figure 6: similarity of representations between timesteps",
        (
            Part(
                "FFHQ 256x256",
                (Column("mean CKA", "cka", "cka"),),
                (
                    _row("DiT-B/2", "dit_b_ffhq_none_vanilla"),
                    _row("DiT-B/2 + R-TR", "dit_b_ffhq_random_vanilla"),
                    _row("DiT-B/2 + DTR", "dit_b_ffhq_dtr_vanilla"),
                ),
            ),
        ),
        "The paper shows pictures without numbers: R-TR is above plain DiT, DTR below. Ours lie in "
        "RUN_DIR/samples/cka.png.",
    ),
}  # fmt: skip
