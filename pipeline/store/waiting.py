"""Waits for keys of a store in slices, between which who waits can ask whether there is still something to wait for."""

from __future__ import annotations

from datetime import timedelta

import torch.distributed as dist


def came(store: dist.Store, keys: list[str], seconds: float) -> bool:
    """Whether all of these keys are there within so long. Raises DistNetworkError where the store is gone."""
    try:
        store.wait(keys, timedelta(seconds=seconds))
    except dist.DistNetworkError:
        raise
    except RuntimeError:
        return False
    return True
