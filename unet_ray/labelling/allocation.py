"""How a labelling is shared out: what of the cluster its actors and tasks reserve, and which chunks share a task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from unet_ray.cluster.resources import alive_nodes
from unet_ray.config import SegmentConfig
from unet_ray.output.ledger import Chunk

CPU_SHARE_OF_ACTORS = 0.75
"""Share of a node's CPUs that model actors on CPUs reserve. Network and decoding may both use every core: they take
turns, and the queue between them slows down the faster one. Reserved apart, one of the two would leave cores idle."""

DECODE_CPUS_BESIDE_ACTORS = 0.1
"""CPUs that a decode task reserves where the network runs on CPUs too: three tasks on 2 cores. With 0.2 Ray Data (2.60)
let one run at most times, and a core waited: 14% of both were idle, with 0.1 1%, and 12,000 PNG frames took 104 s, not
119 (2 cores with AMX, 2026-11-28)."""

WRITE_CPUS = 0.05
"""CPUs that a writing task reserves; without a share left for them no chunk would ever be finished."""

TASK_FRAMES = 192
"""Frames up to which small chunks share their tasks. The three tasks of a block cost 0.07 s of a core whatever is in
it, and one driver sends 90 blocks a second at most (`jobs/benchmark.py --only chunks`, Ray 2.60), for which many GPUs
would wait; the network's batches are full only within a block."""

BLOCKS_PER_ACTOR = 16
"""Blocks that each actor gets at least, where there are so many chunks: so that all end at about the same time."""


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """Who gets which share of the cluster."""

    actors: tuple[int, int]
    """Fewest and most model actors."""
    actor_cpus: float
    """CPUs that each reserves."""
    actor_gpus: int
    """GPUs that each reserves."""
    threads: int
    """Threads that each uses."""
    decode_cpus: float
    """CPUs that a decode task reserves."""

    def bundles(self) -> list[dict[str, float]]:
        """Returns what must be there before the work begins: the actors, and room for one task each that feeds them
        and that writes; without it they would wait for ever."""
        kinds = ("CPU", "GPU") if self.actor_gpus else ("CPU",)
        actors = [(self.actor_cpus, float(self.actor_gpus))] * self.actors[0]
        return [dict(zip(kinds, amounts, strict=False)) for amounts in (*actors, (self.decode_cpus + WRITE_CPUS, 0.0))]


def allocate(config: SegmentConfig, device: str) -> Allocation:
    """Shares out the cluster as it is; see `share_out`."""
    return share_out(alive_nodes(), config, device)


def share_out(nodes: Sequence[Mapping[str, float]], config: SegmentConfig, device: str) -> Allocation:
    """Shares out nodes: on GPUs an actor a GPU and decoding on every CPU left, on CPUs an actor a node."""
    if device == "gpu":
        n_gpus = sum(int(node.get("GPU", 0)) for node in nodes)
        cpus = config.cpus_per_actor or 1
        actors = config.actor_range() or (max(1, n_gpus),) * 2
        return Allocation(actors=actors, actor_cpus=cpus, actor_gpus=1, threads=cpus, decode_cpus=1)
    node_cpus = [node["CPU"] for node in nodes if node.get("CPU", 0) >= 1] or [1.0]
    low, high = config.actor_range() or (len(node_cpus),) * 2
    share = min(node_cpus) / -(-low // len(node_cpus))
    return Allocation(
        actors=(low, high),
        actor_cpus=CPU_SHARE_OF_ACTORS * (config.cpus_per_actor or share),
        actor_gpus=0,
        threads=config.cpus_per_actor or max(1, int(share)),
        decode_cpus=DECODE_CPUS_BESIDE_ACTORS,
    )


def share_tasks(chunks: Sequence[Chunk], most_frames: int, n_actors: int) -> list[list[Chunk]]:
    """Puts chunks that follow each other together, as long as they have few frames and all actors enough to do.

    Args:
        chunks: in order.
        most_frames: what may go through Ray together, `TASK_FRAMES` or less; a chunk that has more goes alone.
        n_actors: the most model actors.
    """
    n_frames = sum(chunk.n_rows for chunk in chunks)
    most_frames = min(most_frames, n_frames // (n_actors * BLOCKS_PER_ACTOR))
    shared: list[list[Chunk]] = []
    filled = 0
    for chunk in chunks:
        if not shared or filled + chunk.n_rows > most_frames:
            shared.append([])
            filled = 0
        shared[-1].append(chunk)
        filled += chunk.n_rows
    return shared
