"""UNet, VAE and text encoders with packed code in front: `attach` swaps the class, `detach` swaps it back.

The modules stay what they were and where they were; only where a call begins is different. Whatever packed code does
not know (LoRA layers, IP-Adapter, other attention processors, hooks, gradients, masks) goes to the modules.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor

from ..nn import FuseReport, fuse
from ..nn import restore as unfuse
from .graphs import cache_on
from .packing import unpack
from .runner import SLOT, Runner, refusal, runner_of, tensors
from .text_program import STOCK as STOCK_TEXT
from .text_program import PackedText, PackedTextWithProjection, TextProgram
from .unet_program import UNetProgram
from .vae_program import DecoderProgram


class _Packed:
    """What both packed networks change beside their forward.

    diffusers looks through all modules for offloading hooks whenever it is asked for a network's dtype or device, half
    a dozen times a call; and some of its weight changes leave no trace, which have to be announced to the runner.
    """

    @property
    def dtype(self) -> torch.dtype:
        """As diffusers', without looking again while the first weight stays what it was."""
        known = _place(self)
        return super().dtype if known is None else known[0]  # type: ignore[misc, no-any-return]

    @property
    def device(self) -> torch.device:
        """As diffusers', without looking again while the first weight stays where it was."""
        known = _place(self)
        return super().device if known is None else known[1]  # type: ignore[misc, no-any-return]

    def fuse_lora(self, *args: Any, **kwargs: Any) -> Any:
        """As diffusers', which writes through `.data`."""
        try:
            return super().fuse_lora(*args, **kwargs)  # type: ignore[misc]
        finally:
            _touch(self)

    def unfuse_lora(self, *args: Any, **kwargs: Any) -> Any:
        """As diffusers', which writes through `.data`."""
        try:
            return super().unfuse_lora(*args, **kwargs)  # type: ignore[misc]
        finally:
            _touch(self)


class _EqualToStock(type):
    """Makes a packed class equal to the stock class it stands for, its last base.

    `from_pipe` hands a network on to another pipeline only if `type(network) in` the classes that this one declares.
    """

    def __eq__(cls, other: object) -> bool:
        return other is cls or other is cls.__bases__[-1]

    def __hash__(cls) -> int:
        return hash(cls.__bases__[-1])


class PackedUNet(_Packed, UNet2DConditionModel, metaclass=_EqualToStock):  # type: ignore[misc, metaclass]
    """diffusers' UNet2DConditionModel; its forward takes the same arguments and returns the same."""

    def forward(  # type: ignore[override]
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        encoder_hidden_states: Tensor,
        class_labels: Tensor | None = None,
        timestep_cond: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
        down_block_additional_residuals: tuple[Tensor, ...] | None = None,
        mid_block_additional_residual: Tensor | None = None,
        down_intrablock_additional_residuals: tuple[Tensor, ...] | None = None,
        encoder_attention_mask: Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DConditionOutput | tuple[Tensor, ...]:
        """See UNet2DConditionModel."""
        others = {
            "class_labels": class_labels,
            "timestep_cond": timestep_cond,
            "attention_mask": attention_mask,
            "cross_attention_kwargs": cross_attention_kwargs,
            "down_intrablock_additional_residuals": down_intrablock_additional_residuals,
            "encoder_attention_mask": encoder_attention_mask,
        }
        added = added_cond_kwargs or {}
        control = _residuals(down_block_additional_residuals, mid_block_additional_residual)
        y = _run_unet(self, sample, timestep, encoder_hidden_states, added, control, others)
        if y is None:
            stock: Any = super()
            return stock.forward(  # type: ignore[no-any-return]
                sample,
                timestep,
                encoder_hidden_states,
                added_cond_kwargs=added_cond_kwargs,
                down_block_additional_residuals=down_block_additional_residuals,
                mid_block_additional_residual=mid_block_additional_residual,
                return_dict=return_dict,
                **others,
            )
        return UNet2DConditionOutput(sample=y) if return_dict else (y,)


class PackedVae(_Packed, AutoencoderKL, metaclass=_EqualToStock):  # type: ignore[misc, metaclass]
    """diffusers' AutoencoderKL with a packed decoder."""

    use_tiling: bool
    tile_latent_min_size: int

    def _decode(self, z: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        tiled = self.use_tiling and max(z.shape[-2:]) > self.tile_latent_min_size
        y = None if tiled else _run_decoder(self, z)
        if y is None:
            stock: Any = super()
            return stock._decode(z, return_dict)  # type: ignore[no-any-return]
        return DecoderOutput(sample=y) if return_dict else (y,)


_STOCK: dict[Any, Any] = {PackedUNet: UNet2DConditionModel, PackedVae: AutoencoderKL}
for _packed, _stock in _STOCK.items():
    # the name is what saved configurations and pipeline indices say
    _packed.__name__, _packed.__qualname__ = _stock.__name__, _stock.__qualname__
_STOCK |= STOCK_TEXT
_PROGRAMS: dict[Any, Any] = {
    PackedUNet: UNetProgram,
    PackedVae: DecoderProgram,
    PackedText: TextProgram,
    PackedTextWithProjection: TextProgram,
}


def packable(network: Any) -> bool:
    """Whether `attach` knows this kind of network, or has been there before."""
    return type(network) in (*_STOCK, *_STOCK.values())


def attach(network: Any) -> Runner[Any]:
    """Put packed code in front of a UNet2DConditionModel, an AutoencoderKL or a CLIP text encoder, in place.

    Fused operations are swapped into the modules of UNet and VAE, which get channels-last weights and, on a GPU, CUDA
    graphs; those of the text encoders are their caller's (`texts`). A second call changes nothing.

    Returns:
        the runner, which says whether the network could be packed and how its calls ran.

    Raises:
        ValueError: another kind of network.
    """
    found = runner_of(network)
    if found is not None:
        return found
    cls = next((packed for packed, stock in _STOCK.items() if stock is type(network)), None)
    if cls is None:
        kinds = ", ".join(stock.__name__ for stock in _STOCK.values())
        raise ValueError(f"{type(network).__name__} cannot be packed; these can: {kinds}")
    graphs, fused, was_contiguous = None, FuseReport(), False
    device = next(network.parameters()).device
    if cls in (PackedUNet, PackedVae):
        graphs = cache_on(device)
        first = network.conv_in.weight if cls is PackedUNet else network.decoder.conv_in.weight
        was_contiguous = first.is_contiguous()
        network.to(memory_format=torch.channels_last)
        fused = fuse(network)
    runner: Runner[Any] = Runner(network, _PROGRAMS[cls], facts=lambda: _facts(network), graphs=graphs)
    runner.fusion = fused
    runner.was_contiguous = was_contiguous
    network.__dict__[SLOT] = runner
    network.__class__ = cls
    return runner


def detach(network: Any) -> None:
    """Undo `attach`: the stock classes, weights with memory of their own in the layout they came in."""
    runner = network.__dict__.pop(SLOT, None)
    for packed, stock in _STOCK.items():
        if isinstance(network, packed):
            network.__class__ = stock
    if runner is None:
        return
    if runner.graphs is not None:
        runner.graphs.clear()
    if runner.fusion.replaced:
        unfuse(network)
    unpack(network)
    if runner.was_contiguous:
        network.to(memory_format=torch.contiguous_format)


def _place(network: Any) -> tuple[torch.dtype, torch.device] | None:
    """A packed network's dtype and device; None where diffusers has to look."""
    runner = runner_of(network)
    if runner is None or runner.program is None:
        return None
    first = next(network.parameters())
    return runner.place if (first.dtype, first.device) == runner.place else None


def _touch(network: Any) -> None:
    runner = runner_of(network)
    if runner is not None:
        runner.touch()


def _facts(network: Any) -> Any:
    """What diffusers switches on by setting attributes: training, FreeU."""
    levels = getattr(network, "up_blocks", ())
    return network.training, tuple(getattr(block, "s1", None) for block in levels)


def _residuals(down: Any, middle: Any) -> tuple[Tensor, ...] | None:
    """A ControlNet's residuals in the order of `UNetProgram`; None if they are something else."""
    if down is None and middle is None:
        return ()
    if down is None or middle is None or not tensors((*down, middle)):
        return None
    return (*down, middle)


def _run_unet(
    unet: Any,
    sample: Tensor,
    timestep: Tensor | float | int,
    text: Tensor,
    added: dict[str, Tensor],
    control: tuple[Tensor, ...] | None,
    others: dict[str, Any],
) -> Tensor | None:
    """The packed UNet's output; None if the modules have to run."""
    runner = runner_of(unet)
    if runner is None:
        return None
    program: UNetProgram | None = runner.ready()
    reason: str | None = runner.reason
    if program is not None:
        reason = refusal(unet, program, sample, others)
        wrong = sample.dtype != program.dtype or not isinstance(text, Tensor) or text.dtype != program.dtype
        if reason is None and (wrong or control is None or set(added) != {"text_embeds", "time_ids"}):
            reason = "its inputs are not those of SDXL, or of another dtype than the weights"
        if reason is None and not program.fits(sample):
            reason = "the latents cannot be halved as often as the UNet does"
    if program is None or reason is not None:
        runner.by_modules(reason or "")
        return None
    shifts = program.shifts(timestep, len(sample), added)
    if len(shifts) != len(sample):
        shifts = shifts.expand(len(sample), -1)
    runner.use.packed += 1
    inputs = (sample, shifts, program.keys_and_values(text), *(control or ()))
    return runner.run("unet", program, inputs)


def _run_decoder(vae: Any, latents: Tensor) -> Tensor | None:
    """The packed decoder's output; None if the modules have to run."""
    runner = runner_of(vae)
    if runner is None:
        return None
    program: DecoderProgram | None = runner.ready()
    reason: str | None = runner.reason
    if program is not None:
        reason = refusal(vae, program, latents, {})
    if program is None or reason is not None:
        runner.by_modules(reason or "")
        return None
    runner.use.packed += 1
    pixels = runner.run("vae", program, (latents,))
    return pixels.float() if program.copied else pixels  # diffusers, too, returns float32 for such a VAE
