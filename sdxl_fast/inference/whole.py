"""A whole call from noise and conditions to uint8 pictures as one stage, which one CUDA graph can hold.

Between the graphs of a UNet and a decoder lie a dozen small kernels a step: the time embedding, the move, casts and
scalings. One by one they cost the host more than the GPU; in a graph they cost next to nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import ops
from . import pictures
from .graphs import GraphCache
from .install import PartReport
from .runner import Use, refusal, runner_of
from .sampler import Sampler
from .unet_program import UNetProgram
from .vae_program import DecoderProgram


class WholeCall:
    """Draws calls through graphs of its own.

    Args:
        graphs: where they are kept.

    Attributes:
        use: how many calls ran so, and why others went network by network.
    """

    def __init__(self, graphs: GraphCache) -> None:
        self.graphs, self.use = graphs, Use()

    @property
    def report(self) -> PartReport:
        """How calls ran and what became of the graphs."""
        return PartReport(True, "", self.use, graphs=self.graphs.stats, graph_bytes=self.graphs.nbytes)

    def draw(self, sampler: Sampler, vae: Any, noises: Sequence[Tensor], state: dict[str, Tensor]) -> Tensor | None:
        """Pictures uint8 [N, H, W, 3] on the device; None if the call has to go network by network.

        Args:
            sampler: with the UNet to draw with.
            vae: the network that decodes.
            noises: `Sampler.noises`.
            state: "prompt_embeds", "add_text_embeds" and "add_time_ids", one row per picture.
        """
        drawn = self._drawn(sampler, vae, noises, state)
        if isinstance(drawn, str):
            self.use.modules[drawn] += 1
            return None
        self.use.packed += 1
        return drawn

    def _drawn(self, sampler: Sampler, vae: Any, noises: Sequence[Tensor], state: dict[str, Tensor]) -> Tensor | str:
        """The pictures, or why there are none."""
        start = noises[0]
        unet, decoder = _ready(sampler.unet, start), _ready(vae, start)
        for found in (unet, decoder):
            if isinstance(found, str):
                return found
        stage = _stage(sampler, unet.program, decoder.program, vae)
        inputs = _inputs(unet.program, noises, state)
        weights = unet.identity, decoder.identity
        drawn = self.graphs.through(_name(sampler), stage, inputs, weights, size=start.nbytes)
        return "no graph can hold it" if drawn is None else drawn


def _ready(network: Any, start: Tensor) -> Any:
    """The runner of a network whose packed code can take part; otherwise why it cannot."""
    runner = runner_of(network)
    program = None if runner is None else runner.ready()
    if runner is None or program is None:
        return f"the {type(network).__name__} runs by its modules"
    reason = refusal(network, program, start, {})
    if reason is None and not program.fits(start):
        return "the latents cannot be halved as often as the UNet does"
    return runner if reason is None else reason


def _name(sampler: Sampler) -> str:
    """All that decides what the stage does beside its inputs and weights."""
    preset = sampler.preset
    how = (preset.sampler, preset.prediction_type, preset.eta, *sampler.timesteps)
    return " ".join(map(str, ("image", *how)))


def _inputs(unet: UNetProgram, noises: Sequence[Tensor], state: dict[str, Tensor]) -> tuple[Tensor, ...]:
    kv = unet.keys_and_values(state["prompt_embeds"])
    return kv, state["add_text_embeds"], state["add_time_ids"], *noises


def _stage(sampler: Sampler, unet: UNetProgram, decoder: DecoderProgram, vae: Any) -> Any:
    def draw(kv: Tensor, pooled: Tensor, ids: Tensor, *noises: Tensor) -> Tensor:
        added = {"text_embeds": pooled, "time_ids": ids}

        def predict(x_t: Tensor, timestep: int) -> Tensor:
            # on the device, so that the embedding is made in the graph, of whatever the weights are by then
            t = torch.full((1,), timestep, device=x_t.device)
            shifts = unet.shifts(t, len(x_t), added)
            return unet(x_t.to(unet.dtype), shifts.expand(len(x_t), -1), kv)

        latents = sampler.run(predict, noises).to(unet.dtype)
        return ops.to_uint8(decoder(pictures.unscaled(vae, latents)))

    return draw
