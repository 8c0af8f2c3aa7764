"""LoRA that starts on directions of the base weight weighed by its inputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from adapterlab.core.carrier import Carrier
from adapterlab.methods.low_rank._shown_data import inputs, samples, shown
from adapterlab.methods.low_rank._starts import Init, Initialiser, Place, Start, Starts, balanced, full_weight, part_of
from adapterlab.methods.low_rank.lora import LoRA
from adapterlab.registry import register


@register
class CorDA(LoRA):
    """Decompose W in the basis that orders its outputs on given data, and train the strongest or weakest components.

    W C = U S Vᵀ with C the covariance of the inputs; B = U_r √(S_r/s), A = √(S_r/s) V_rᵀ C⁻¹;
    y = (W − s · B0 A0) x + b + s · B A x, where A0 and B0 are the start.

    Where it attaches: linear layers, neither packed nor tied. `prepare` runs the model on batches; the training loop
    calls it with those of the task, which suits mode ipm. For mode kpm call it first, with data of what should be kept.
    Until then the start is LoRA's.

    Start: the first output equals the base's up to rounding; the base weight is replaced while the adapter is live.

    Trainable parameters: r (in + out) for each module.

    Inference: merges as LoRA does. Saving converts to an ordinary LoRA of rank 2r on the original base.

    Rate: 2e-5, as in the authors' runs: the strongest directions of W move the output far.

    Reference: "CorDA: Context-Oriented Decomposition Adaptation of Large Language Models for Task-Aware
    Parameter-Efficient Fine-tuning", arXiv 2406.05223.

    Example:
        >>> from adapterlab.methods.low_rank.corda import CorDA
        >>> CorDA(init={"name": "corda", "mode": "kpm"}).init.mode
        'kpm'
    """

    alpha: float = Field(8.0, gt=0, description="scale numerator; the same as the rank is usual here")
    init: Init = Field("corda", validate_default=True, description="corda, or with options {name: corda, mode: kpm}")


class CorDAStart(Initialiser):
    """A and B hold r of the components of W in the basis in which its outputs on the data are ordered by size.

    With C = mean of XᵀX over the rows of data, X = all tokens of a row `[tokens, in]`, labelled or not, divided by
    their largest entry: W C = U S Vᵀ, so W = U S (Vᵀ C⁻¹). B = U √(S/s), A = √(S/s) Vᵀ C⁻¹ of the chosen components,
    and the base gives up s · B A. The size of C is that of A and B, and with them of their rates: it is not normalised
    otherwise. Needs a matrix `[in, in]` for each module while it looks at data.
    """

    moves_base: ClassVar[bool] = True
    needs_data: ClassVar[bool] = True
    kinds: ClassVar[tuple[str, ...]] = ("linear",)

    mode: Literal["ipm", "kpm"] = Field(
        "ipm", description="ipm: the strongest components, data of the task; kpm: the weakest, data of what to keep"
    )
    batches: int = Field(256, ge=1, description="number of batches at most")

    def check(self, place: Place) -> None:
        """Refuse modules without so many components too."""
        super().check(place)
        part_of(place, place.r, f"init={self.name!r}")

    @torch.no_grad()
    def learn(self, host: Carrier, places: Mapping[str, Place], batches: Iterable[Mapping[str, Tensor]]) -> Starts:
        """Add the covariances up, then decompose one module after the other."""
        sums: dict[str, Tensor] = {}
        counts: dict[str, int] = dict.fromkeys(places, 0)
        for batch in shown(batches, self.batches, "input covariances"):

            def see(path: str, x: Tensor, batch: Mapping[str, Tensor] = batch) -> None:
                for tokens in samples(x, batch):
                    sums[path] = sums.get(path, 0) + covariance(tokens)
                    counts[path] += 1

            inputs(host, places, batch, see)
        return {p: self.oriented(place, sums[p] / counts[p]) for p, place in places.items() if p in sums}

    def oriented(self, place: Place, covariance: Tensor) -> Start:
        """Decompose a weight in the basis that a covariance `[in, in]` gives."""
        weight, c = full_weight(place.site).double(), covariance.double()
        ridge = max(0.01 * float(c.diagonal().mean()), 1e-12)
        eye = torch.eye(len(c), dtype=c.dtype, device=c.device)
        while True:
            raised = c + ridge * eye
            inverse, fault = torch.linalg.inv_ex(raised)
            if not int(fault) and float((raised @ inverse - eye).norm()) < 0.05:
                break
            ridge *= 2
        u, s, vh = torch.linalg.svd(weight @ raised, full_matrices=False)
        chosen = slice(place.r) if self.mode == "ipm" else slice(-place.r, None)
        a, b = (t.float() for t in balanced(u[:, chosen], s[chosen], vh[chosen] @ inverse, place.scale))
        return Start(a, b, (a, b))


def covariance(tokens: Tensor) -> Tensor:
    """XᵀX of the tokens of one row `[tokens, in]`, divided by the absolute value of their largest entry.

    The largest, not the one of the largest absolute value: so it is in the authors' code. Where it is zero the latter
    is taken, and tokens that are all zero add nothing.
    """
    if not len(tokens):
        return tokens.new_zeros(tokens.shape[1], tokens.shape[1])
    size = tokens.max().abs()
    x = tokens / torch.where(size > 0, size, tokens.abs().max().clamp(min=torch.finfo(tokens.dtype).tiny))
    return x.T @ x
