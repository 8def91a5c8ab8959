"""A number that changes with any bit of some tensors, computed where they lie.

It is a sum of their 32-bit words, each times an odd number of 64 bits that belongs to its place, modulo 2^64. An odd
factor has an inverse there, so a single word that changes always changes the sum; several hide each other by chance
alone, whichever of their bits change: words as wide as the factors would not do, as of two words that change in their
highest bit alone, the sign of a number, neither would be seen. zlib's
CRC would want the bytes on the host, at a tenth of the speed of a device's memory. Small tensors are copied side by
side first: a layer has dozens of them, and each sum by itself costs more than its bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache

import torch
from torch import Tensor

_WORD = 4  # bytes
_COLUMNS = 1 << 12
_ROWS = 1 << 6  # at once: 1 MiB on a CPU, which with its products stays in the cache
_SMALL = 1 << 19  # bytes
_SPREAD = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio, as in SplitMix64: odd
_LAST = (1 << 64) - 1


@cache
def _odd(count: int, salt: int, device: torch.device) -> Tensor:
    """[count] int64, all odd."""
    return torch.tensor([_odd_of(salt + i) for i in range(count)], device=device)


def _mixed(word: int) -> int:
    """SplitMix64's finalizer (Steele, Lea and Flood, OOPSLA 2014)."""
    word = (word * _SPREAD) & _LAST
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _LAST
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _LAST
    return word ^ (word >> 31)


def _odd_of(place: int) -> int:
    """An odd number of a place, as an int64."""
    word = _mixed(place & _LAST) | 1
    return word - (1 << 64) if word >> 63 else word


@torch.no_grad()
def checksum(tensors: Iterable[Tensor], begins: str = "") -> int:
    """Of the bytes of tensors on one device, in their order, and of what it `begins` with: 0 to 2^64 - 1."""
    total, parts = _mixed(int.from_bytes(begins.encode(), "little") & _LAST), list[Tensor]()
    every = [tensor.detach().contiguous().view(-1).view(torch.uint8) for tensor in tensors]
    for place, flat in enumerate(every, 1):
        total = _mixed(total + flat.numel() + place)
    for place, flat in enumerate(_side_by_side(every), 1):
        flat = flat.clone() if flat.data_ptr() % _WORD else flat
        whole = flat.numel() // _WORD * _WORD
        if whole:
            parts.append(_sum(flat[:whole].view(torch.int32)) * _odd_of(place))
        if whole < flat.numel():
            rest = torch.nn.functional.pad(flat[whole:], (0, _WORD - flat.numel() + whole))
            parts.append(_sum(rest.view(torch.int32)) * _odd_of(-place))
    found = int(torch.stack(parts).sum()) if parts else 0
    return _mixed(total ^ (found & _LAST))


def _side_by_side(every: Iterable[Tensor]) -> Iterator[Tensor]:
    """Bytes of tensors in their order, those of small neighbours together."""
    together: list[Tensor] = []
    for flat in every:
        large = flat.numel() > _SMALL
        if together and (large or sum(each.numel() for each in together) > _SMALL):
            yield torch.cat(together)
            together.clear()
        if large:
            yield flat
        else:
            together.append(flat)
    if together:
        yield torch.cat(together)


def _sum(words: Tensor) -> Tensor:
    """[] int64: each of the words [n], int32, times the odd numbers of its row and column, modulo 2^64."""
    found = torch.zeros((), dtype=torch.int64, device=words.device)
    columns, rows = _odd(_COLUMNS, 0, words.device), _odd(_ROWS + 1, 1 << 32, words.device)
    products = torch.empty((min(_ROWS, words.numel() // _COLUMNS), _COLUMNS), dtype=torch.int64, device=words.device)
    for number, part in enumerate(words.split(_ROWS * _COLUMNS)):
        whole = part.numel() // _COLUMNS
        rectangle, rest = part[: whole * _COLUMNS].view(-1, _COLUMNS), part[whole * _COLUMNS :]
        sums = torch.mul(rectangle, columns, out=products[:whole]).sum(1)
        sums = torch.cat([sums, (rest * columns[: rest.numel()]).sum()[None]])
        found = found + (sums * rows[: len(sums)]).sum() * _odd_of(number + (1 << 40))
    return found
