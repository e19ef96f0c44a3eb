"""The peers. A new one is an adapter in one of these files and a line in the list below."""

from . import ceilings, libraries, optax_peer, torch_sgd
from .base import CannotRun, Contender, Peer

PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        torch_sgd.OURS,
        torch_sgd.FUSED,
        torch_sgd.FOREACH,
        torch_sgd.LOOP,
        torch_sgd.COMPILED,
        libraries.OPTIMI,
        libraries.PYTORCH_OPTIMIZER,
        libraries.TIMM_SGDW,
        libraries.FLASHOPTIM,
        libraries.BITSANDBYTES,
        libraries.APEX,
        optax_peer.OPTAX,
        torch_sgd.NOTHING,
        ceilings.FLAT,
        ceilings.COPY,
    )
}
"""By name, in the order of the tables."""

OURS, CEILING, COPY, FLOOR = torch_sgd.OURS.name, ceilings.FLAT.name, ceilings.COPY.name, torch_sgd.NOTHING.name

__all__ = ["CEILING", "COPY", "FLOOR", "OURS", "PEERS", "CannotRun", "Contender", "Peer"]
