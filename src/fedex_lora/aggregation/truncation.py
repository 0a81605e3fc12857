"""Truncation of residuals (FedEx-LoRA, eq. 15-16): best approximations by rank, by energy, or within a number of bytes a round."""

from collections.abc import Mapping

import torch
from torch import Tensor

from fedex_lora.aggregation.factors import Factors, components, recompressed, svd
from fedex_lora.config import Truncation
from fedex_lora.types import LowRank


def truncate(residual: Mapping[str, LowRank], truncation: Truncation, default_rank: int) -> tuple[dict[str, LowRank], dict[str, float]]:
    """The best approximation of every residual, and the Frobenius norm of what was dropped.

    From the factors alone: QR of both, the SVD of the small core, in fp64 (Eckart-Young: nothing of that rank is nearer).

    Args:
        residual: module path -> `U V`.
        truncation: by rank (the same for all modules), by energy (the smallest rank that keeps that share of `|R|_F^2`, for each
            module), or by bytes of the download of one client (the components with the most energy a byte, over all modules).
        default_rank: when the truncation says nothing.

    Returns:
        (module path -> truncated residual, module path -> norm of its tail).
    """
    parts = {module: svd(Factors(A=gain.V[None], B=gain.U.mT[None])) for module, gain in residual.items()}
    energies = {module: part.S[0] ** 2 for module, part in parts.items()}
    if truncation.energy is not None:
        ranks = {module: _rank_of_share(energy, truncation.energy) for module, energy in energies.items()}
    elif truncation.bytes is not None:
        sizes = {module: gain.U.element_size() * sum(gain.shape) for module, gain in residual.items()}
        ranks = _ranks_within(energies, sizes, truncation.bytes)
    else:
        ranks = dict.fromkeys(residual, truncation.rank or default_rank)
    kept: dict[str, LowRank] = {}
    for module, rank in ranks.items():
        if rank:
            factors = components(parts[module], 0, min(rank, int((energies[module] > 0).sum())))
            kept[module] = LowRank(U=factors.B[0].mT, V=factors.A[0])
    return kept, {module: float(energies[module][rank:].sum().sqrt()) for module, rank in ranks.items()}


def without_blocks(gain: LowRank) -> LowRank:
    """The same product in factors that are a function of the product alone: its balanced SVD, to fp32 rounding of what is small, too.

    The closed form's factors are `[p_i (B_i - Bbar)]` and `[A_i - A_k]`, a block a client: with `Abar`, `Bbar` and the weights anybody who
    has them works out every client's own factors. From the product nobody can (SECURITY.md says what it does tell).
    """
    return recompressed(gain, gain.rank)


def _rank_of_share(energy: Tensor, share: float) -> int:
    """The smallest rank whose tail is at most `1 - share` of the energy."""
    tails = torch.cat([energy.flip(0).cumsum(0).flip(0), energy.new_zeros(1)])  # tails[q]: what rank q leaves
    return int((tails > (1 - share) * tails[0]).sum())


def _ranks_within(energies: Mapping[str, Tensor], sizes: Mapping[str, int], budget: int) -> dict[str, int]:
    """Components in the order of energy a byte, as long as they fit."""
    offers = sorted(((-float(e) / sizes[module], module, index) for module, energy in energies.items() for index, e in enumerate(energy)))
    ranks = dict.fromkeys(energies, 0)
    for worth, module, index in offers:
        if worth < 0 and ranks[module] == index and sizes[module] <= budget:
            ranks[module], budget = index + 1, budget - sizes[module]
    return ranks
