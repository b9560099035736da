"""Write the model card of an exported network: what it is, of what data, and how good."""

import json
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from dtr_scale.config.changes import flatten
from dtr_scale.config.load import resolved
from dtr_scale.config.schema import Experiment
from dtr_scale.data.manifest import Manifest
from dtr_scale.evaluation.comparison.record import Evaluation
from dtr_scale.jobs.description import has_meaning

_HEAD = """\
---
library_name: diffusers
pipeline_tag: unconditional-image-generation
tags: [diffusion, dit, denoising-task-routing, dtr-scale]
---

# {title}

{summary} Exported by dtr-scale, a trainer for diffusion
transformers with Denoising Task Routing.

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("THIS FOLDER", trust_remote_code=True)
pipe({call}).images[0].save("sample.png")
```

`trust_remote_code` runs the three `dtr_*.py` files of this folder: the network with its masks, the
scheduler and the pipeline. They need torch, numpy and diffusers alone. Steps and guidance are those
of the training's own evaluation where they are not given. Another sampler:
`pipe.scheduler = pipe.scheduler.from_config(pipe.scheduler.config, sampler="ddim")`.
"""

_TAIL = """
## Licence

The `dtr_*.py` files are licensed under the Apache License 2.0. The weights are under the terms of
whoever publishes them, and of the data that they were trained on.

## Citation

```bibtex
@inproceedings{park2024dtr,
  title     = {Denoising Task Routing for Diffusion Models},
  author    = {Park, Byeongjun and Woo, Sangmin and Go, Hyojun and Kim, Jin-Young and
               Kim, Changick},
  booktitle = {International Conference on Learning Representations},
  year      = {2024}
}
```
"""


_CALLS = {
    "class": "class_labels=[0, 1]",
    "none": "num_images=2",
    "text": "prompt_embeds=TOKENS",
}


def run_card(
    experiment: Experiment,
    meta: Mapping[str, Any],
    average: str,
    manifest: Manifest | None,
    evaluations: list[Evaluation],
) -> str:
    """Return the card of a run's network, of `meta` of its checkpoint, as Markdown."""
    model, train, objective = experiment.model, experiment.train, experiment.objective
    settings = {
        "network": model.title,
        "routing": _routing(experiment),
        "noise schedule": f"{experiment.diffusion.noise_schedule}, "
        f"{experiment.diffusion.num_timesteps} timesteps",
        "loss weights": objective.type,
        "steps": f"{meta['step']:,} of {train.max_steps:,}, batch {train.global_batch_size}",
        "learning rate": train.lr,
        "seed": train.seed,
        "average of the weights": average,
        "precision": experiment.engine.precision,
        "trained by": f"dtr-scale {meta['version']}, torch {meta['torch']}",
    }
    return card(
        experiment.name,
        experiment.description or f"{model.title}, trained from `{experiment.name}.json`.",
        settings,
        data=_data(experiment, manifest),
        figures=_figures(evaluations, meta["step"]),
        call=_CALLS[model.conditioning],
    )


def card(
    title: str,
    summary: str,
    settings: Mapping[str, Any],
    *,
    data: str,
    figures: str,
    call: str,
) -> str:
    """Return a model card as Markdown; `call` is an example of the pipeline's arguments."""
    rows = "\n".join(f"| {key} | {value} |" for key, value in settings.items())
    sections = {"Training": f"| | |\n|---|---|\n{rows}", "Data": data, "Figures": figures}
    body = "".join(f"\n## {name}\n\n{text}\n" for name, text in sections.items())
    return _HEAD.format(title=title, summary=summary, call=call) + body + _TAIL


def _routing(experiment: Experiment) -> str:
    flat = flatten(resolved(experiment))
    prefix = "model.routing."
    told = {key: flat[key] for key in flat if key.startswith(prefix) and has_meaning(key, flat)}
    kind = told.pop(f"{prefix}type")
    return ", ".join([kind, *(f"{key.removeprefix(prefix)} {told[key]}" for key in told)])


def _data(experiment: Experiment, manifest: Manifest | None) -> str:
    if experiment.data.type == "synthetic":
        return "Made-up numbers (`data.type = synthetic`): a trial of the software."
    if manifest is None:
        return f"`{experiment.data.shards}`, which could not be read when this was exported."
    names = manifest.class_names
    told = [
        f"- {manifest.num_samples('train'):,} training samples {list(manifest.shape)}, "
        f"{manifest.encoding}, {manifest.num_classes} classes"
        + (f": {', '.join(names[:10])}{', ...' if len(names) > 10 else ''}" if names else ""),
        f"- manifest {manifest.hash('train')}",
    ]
    told += [f"- {split}: {origin.source}" for split, origin in manifest.origins.items()]
    if manifest.encoder:
        told.append(f"- encoded by {manifest.encoder.name}, weights {manifest.encoder.sha256}")
    if manifest.text_encoder:
        told.append(
            f"- texts by {manifest.text_encoder.name}, weights {manifest.text_encoder.sha256}: "
            "the last hidden states after the final norm, filled up with the end token"
        )
    return "\n".join(told)


def _figures(evaluations: list[Evaluation], step: int) -> str:
    """Return the evaluations of a step with all they depend on, the newest first."""
    found = [each for each in reversed(evaluations) if each.step == step]
    if not found:
        return f"Step {step:,} was not evaluated."
    parts = []
    for each in found:
        rows = "\n".join(f"| {name} | {value:.6g} |" for name, value in each.metrics.items())
        told = dict(each.manifest)
        if "checkpoints" in told:  # not where they lie: a card is for others
            told["checkpoints"] = [PurePath(place).name for place in told["checkpoints"]]
        manifest = json.dumps(told, indent=1)
        parts.append(
            f"| {each.time} | |\n|---|---|\n{rows}\n\n"
            f"<details><summary>what they depend on</summary>\n\n```json\n{manifest}\n```\n\n"
            "</details>"
        )
    return "\n\n".join(parts)
