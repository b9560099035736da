"""Show the reports of benchmarks on a terminal."""

from typing import Any

from dtr_scale.jobs.bench.timing import Spread

HEADER = f"{'':24}{'median':>9}{'min':>9}{'max':>9} s"


def train_table(report: dict[str, Any]) -> str:
    """Return a report as lines for a terminal."""
    config = report["config"]
    lines = [
        f"{report['steps']} steps of {report['global_batch_size']} samples, "
        f"{config['engine.type']}, {config['engine.precision']}, {_compiled(config)}, "
        f"{_place(report['machine'])}",
        f"{HEADER}{'share':>8}",
        _row("step", report["step_seconds"]),
    ]
    lines += [_row(f"  {name.replace('_', ' ')}", row) for name, row in report["parts"].items()]
    if report["collective_seconds"] is not None:
        lines.append(
            f"{'collectives':24}{report['collective_seconds']:9.4f}  under way a step, in part "
            "beside backward and update, which hold the rest"
        )
    stall = report["save_stall_seconds"]
    lines += [
        f"{'a save stands still':24}{stall:9.4f}{report['save_stall_share']:>27.2%} of the steps",
        "",
        f"samples/s               {report['samples_per_second']:9.2f}",
        _flops(report),
        *_beside(report, report["peer_samples_per_second"]),
    ]
    if report["mfu_nominal"]:
        lines.append(f"  of the data sheet's   {report['mfu_nominal']:9.1%}")
    return "\n".join(
        [
            *lines,
            _memory(report),
            f"left out                {report['first_step_seconds']:9.2f} s for the first of "
            f"{report['warm_up_steps']} steps of warm-up, {report['build_seconds']:.2f} s before",
        ]
    )


def sample_table(report: dict[str, Any]) -> str:
    """Return a report as lines for a terminal."""
    return "\n".join(
        [
            f"{report['samples']} samples by {report['batch_size']} in {report['sampling_steps']} "
            f"steps, {report['precision']}, {_compiled(report['config'])}, "
            f"{_place(report['machine'])}",
            HEADER,
            _row("step", report["step_seconds"]),
            "",
            f"network evaluations/s   {report['network_evaluations_per_second']:9.2f}  "
            f"of {report['network_evaluations']}",
            f"samples/s               {report['samples_per_second']:9.4f}",
            _flops(report),
            *_beside(report, report["peer_network_evaluations_per_second"]),
            _memory(report),
            f"left out                {report['warm_up_seconds']:9.2f} s of warm-up",
        ]
    )


def _beside(report: dict[str, Any], peer: float | None) -> list[str]:
    if peer is None:
        return []
    return [
        f"the released code's     {peer:9.2f}  ours over theirs {report['speed_over_peer']:.2f}"
    ]


def _place(machine: dict[str, Any]) -> str:
    ranks, threads = machine["ranks"], machine["threads"]
    return f"ranks: {ranks} on {machine['device']}, threads: {threads}"


def _compiled(config: dict[str, Any]) -> str:
    return f"engine.compile {str(config['engine.compile']).lower()}"


def _flops(report: dict[str, Any]) -> str:
    return (
        f"model TFLOP/s           {report['model_flops_per_second'] / 1e12:9.3f}  "
        f"{report['mfu']:.1%} of a matrix product's "
        f"{report['matmul_flops_per_second'] / 1e12:.3f}"
    )


def _memory(report: dict[str, Any]) -> str:
    return f"memory peak             {report['memory_peak_bytes'] / 1e9:9.2f} GB"


def _row(name: str, row: dict[str, float]) -> str:
    figures = "".join(f"{row[key]:9.4f}" for key in Spread._fields)
    return f"{name:24}{figures}" + (f"{row['share']:10.1%}" if "share" in row else "")
