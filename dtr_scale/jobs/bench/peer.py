"""Run the authors' released training loop and sampler from a checkout, to time them beside ours.

Of byeongjun-park/DTR or facebookresearch/DiT. Nothing of them is kept here: the checkout's own
networks, losses and samplers are called as its `train.py` and `sample_ddp.py` call them.
"""

import copy
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dtr_scale.config.schema import Experiment
from dtr_scale.engines.world import World
from dtr_scale.errors import ConfigError
from dtr_scale.models.dit import VARIANTS, DiTSize


class Peer:
    """What a checkout offers, built for an experiment."""

    def __init__(self, checkout: Path, experiment: Experiment, device: torch.device) -> None:
        self._is_dtr = (checkout / "models" / "taskrouting.py").is_file()
        if not self._is_dtr and not (checkout / "models.py").is_file():
            raise ConfigError(
                f"--peer={checkout} is no checkout of byeongjun-park/DTR or facebookresearch/DiT: "
                "it has neither models/taskrouting.py nor models.py"
            )
        if experiment.model.type != "dit" or experiment.model.conditioning == "text":
            raise ConfigError("--peer: the released code has DiTs of classes alone; leave it out")
        self._checkout = checkout
        self._experiment = experiment
        self._device = device
        self.network: nn.Module = self._build_network().to(device)

    def training_step(self, precision: str, batch_size: int) -> Callable[[], None]:
        """Return a call that makes one step of the loop, on latents that are at hand."""
        experiment, device, network = self._experiment, self._device, self.network
        diffusion = self._diffusion("")
        ema = copy.deepcopy(network).requires_grad_(False)
        optimizer = torch.optim.AdamW(network.parameters(), lr=experiment.train.lr, weight_decay=0)
        autocast = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
        model = experiment.model
        x = torch.randn(batch_size, model.in_channels, model.input_size, model.input_size).to(
            device
        )
        y = torch.randint(model.num_classes, (batch_size,), device=device)
        network.train()

        def step() -> None:
            t = torch.randint(diffusion.num_timesteps, (batch_size,), device=device)
            with autocast:
                losses = diffusion.training_losses(network, x, t, model_kwargs={"y": y})
                loss = losses["loss"].mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                for average, parameter in zip(ema.parameters(), network.parameters(), strict=True):
                    average.mul_(experiment.train.ema_decay)
                    average.add_(parameter.data, alpha=1 - experiment.train.ema_decay)
            # Their loop does so for its log: the host waits for each step.
            loss.item()

        return step

    def sampling_step(self, precision: str, batch_size: int) -> Callable[[], None]:
        """Return a call that takes the next step of ancestral sampling, batch after batch."""
        evaluation, device, network = self._experiment.evaluation, self._device, self.network
        if evaluation.sampler != "ddpm":
            raise ConfigError(
                f"--peer: the released code samples by ddpm, evaluation.sampler is "
                f"{evaluation.sampler!r}; give --evaluation.sampler=ddpm"
            )
        diffusion = self._diffusion(str(evaluation.num_sampling_steps))
        autocast = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
        model: Any = network.eval()
        classes, size = self._experiment.model.num_classes, self._experiment.model.input_size

        def steps() -> Any:  # noqa: ANN401
            while True:
                z = torch.randn(batch_size, self._experiment.model.in_channels, size, size)
                y, kwargs, fn = torch.arange(batch_size) % classes, {}, model.forward
                if evaluation.cfg_scale != 1:
                    z, y = torch.cat([z, z]), torch.cat([y, torch.full_like(y, classes)])
                    kwargs, fn = {"cfg_scale": evaluation.cfg_scale}, model.forward_with_cfg
                yield from diffusion.p_sample_loop_progressive(
                    fn, z.shape, z.to(device), clip_denoised=evaluation.clip_denoised,
                    model_kwargs={"y": y.to(device), **kwargs}, device=device,
                )  # fmt: skip

        iterator = steps()

        def step() -> None:
            # Inside the sampler's own context, so that casts of weights are kept between steps.
            with autocast, torch.no_grad():
                next(iterator)

        return step

    def _build_network(self) -> nn.Module:
        network: Any = self._experiment.model
        if network.variant:
            sizes = VARIANTS[network.variant]._asdict()
        else:
            sizes = {name: getattr(network, name) for name in DiTSize._fields}
        sizes |= {
            "input_size": network.input_size,
            "in_channels": network.in_channels,
            "num_classes": network.num_classes,
            "learn_sigma": network.learn_sigma,
        }
        if not self._is_dtr:
            return self._import("models").DiT(**sizes)
        kinds = {"dtr": "DTR", "random": "random"}
        if network.routing.type not in kinds:
            raise ConfigError(
                f"--peer={self._checkout} has the masks of dtr and random, model.routing.type is "
                f"{network.routing.type!r}; give one of them, or a checkout of DiT"
            )
        return self._import("models.DiT.models").DiT(
            **sizes,
            router=self._import("models.taskrouting").TaskRouter,
            sharing_ratio=network.routing.beta,
            taskcount=self._experiment.diffusion.num_timesteps,
            init_method=kinds[network.routing.type],
        )

    def _diffusion(self, respacing: str) -> Any:  # noqa: ANN401
        schedule = self._experiment.diffusion.noise_schedule
        if schedule == "cosine" and not self._is_dtr:
            schedule = "squaredcos_cap_v2"  # DiT's name of it
        return self._import("diffusion").create_diffusion(
            timestep_respacing=respacing,
            noise_schedule=schedule,
            learn_sigma=self._experiment.model.learn_sigma,
            diffusion_steps=self._experiment.diffusion.num_timesteps,
        )

    def _import(self, module: str) -> Any:  # noqa: ANN401
        # Its modules import each other by these names, which are nobody else's here.
        sys.path.insert(0, str(self._checkout))
        try:
            return importlib.import_module(module)
        except ImportError as error:
            raise ConfigError(
                f"--peer={self._checkout} cannot be imported ({error}); install what it needs"
            ) from error
        finally:
            sys.path.remove(str(self._checkout))


def build_peer(checkout: Path, experiment: Experiment, world: World) -> Peer:
    """Return what a checkout offers; ConfigError for several ranks, whose DDP is not set up."""
    if world.world_size > 1:
        raise ConfigError("--peer is timed in one process; start one, or leave --peer out")
    return Peer(checkout.absolute(), experiment, world.device)
