"""The one order of logits: descending, ties by ascending token id.

BiLD depends on how ties are broken, and half-precision logits tie at most positions.

Shape suffixes: N = positions, V = vocabulary, K = chosen ids per position, M = ids looked for.
"""

import torch
from torch import Tensor

_BLOCK = 64


def exact_top_k(logits_NV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest values and their ids in the order (-logit, id), ties included. [N, k] each

    ``torch.topk`` promises no order among ties, nor which of the ids tied at the cut it takes. One value more shows
    where the cut runs through a tie; only those rows are sorted whole.
    """
    vocab_size = logits_NV.shape[1]
    values, ids = _top_k(logits_NV, min(k + 1, vocab_size))
    if k < vocab_size:
        cut_in_tie = values[:, k - 1] == values[:, k]
        ids = ids[:, :k]
        if bool(cut_in_tie.any()):
            tied = cut_in_tie.nonzero().squeeze(1)
            ids[tied] = torch.sort(logits_NV[tied], dim=1, descending=True, stable=True).indices[:, :k]
    ids = ids.sort(dim=1).values
    return sort_by_logit(logits_NV.gather(1, ids), ids)


def _top_k(logits_NV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest values, descending, with an id of each: any of those that tie. [N, k] each

    The k largest stand in the k blocks of ids with the largest maxima. On a CPU maxima are cheap and the selection
    among all ids is not: two selections among few take two thirds of the time, where the blocks are many.
    """
    num_rows, vocab_size = logits_NV.shape
    num_blocks = vocab_size // _BLOCK
    if logits_NV.is_cuda or 4 * k > num_blocks:
        return torch.topk(logits_NV, k, dim=1)
    end_of_blocks = num_blocks * _BLOCK
    blocks_NBS = logits_NV[:, :end_of_blocks].view(num_rows, num_blocks, _BLOCK)
    chosen_Nk = blocks_NBS.amax(2).topk(k, dim=1, sorted=False).indices
    rows_N1 = torch.arange(num_rows, device=logits_NV.device).unsqueeze(1)
    candidates = torch.cat([blocks_NBS[rows_N1, chosen_Nk].flatten(1), logits_NV[:, end_of_blocks:]], dim=1)
    values, places = candidates.topk(k, dim=1)
    in_blocks = chosen_Nk.gather(1, (places // _BLOCK).clamp(max=k - 1)) * _BLOCK + places % _BLOCK
    return values, torch.where(places < k * _BLOCK, in_blocks, places - k * _BLOCK + end_of_blocks)


def sort_by_logit(values_NK: Tensor, ids_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Order ids that stand in ascending order by (-logit, id). Values and ids, [N, K] each"""
    values_NK, order_NK = values_NK.sort(dim=1, descending=True, stable=True)
    return values_NK, ids_NK.gather(1, order_NK)


def find_ids(ids_NK: Tensor, values_NK: Tensor, wanted_NM: Tensor) -> tuple[Tensor, Tensor]:
    """Look ids up among those of their row: whether each is there, and its value (any, where it is not). [N, M] each"""
    if ids_NK.shape[1] == 0:
        return torch.zeros_like(wanted_NM, dtype=torch.bool), values_NK.new_zeros(wanted_NM.shape)
    sorted_NK, order_NK = ids_NK.sort(dim=1)
    place_NM = torch.searchsorted(sorted_NK, wanted_NM.contiguous()).clamp_(max=ids_NK.shape[1] - 1)
    found_NM = sorted_NK.gather(1, place_NM) == wanted_NM
    return found_NM, values_NK.gather(1, order_NK.gather(1, place_NM))
