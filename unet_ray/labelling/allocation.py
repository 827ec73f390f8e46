"""Shares the cluster among a labelling's actors and tasks, and packs small chunks into one task."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from unet_ray.cluster.autoscaler import adds_nodes
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

GPU_DECODE_CPUS = 1.0
"""CPUs that a decode task reserves where the network runs on GPUs."""

LEAST_ACTOR_CPUS = 0.1
"""CPUs that an actor on a GPU reserves at least, by default; at most 1, where its node has more than tasks need."""

WRITE_CPUS = 0.05
"""CPUs that a writing task reserves; without a share left for them no chunk would ever be finished."""

TASK_FRAMES = 192
"""Frames up to which small chunks share their tasks. The three tasks of a block cost 0.07 s of a core whatever is in
it, and one driver sends 90 blocks a second at most (`jobs/benchmark.py --only chunks`, Ray 2.60), for which many GPUs
would wait; the network's batches are full only within a block."""

BLOCKS_PER_ACTOR = 16
"""Blocks that each actor gets at least, where there are so many chunks: so that all end at about the same time."""

MOST_ACTORS_TO_COME = 16
"""Model actors of `auto` on a cluster that scales itself, beyond those that there is room for now. Nobody says how many
nodes can come (ray#63012); the cluster's own limit holds, and Ray Data asks for one more only while work waits."""


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """Who gets which share of the cluster."""

    actors: tuple[int, int]
    """Fewest and most model actors."""
    actor_cpus: float
    """CPUs that each reserves."""
    actor_gpus: float
    """GPUs that each reserves: a share of one where several share it."""
    threads: int
    """Threads that each uses."""
    decode_cpus: float
    """CPUs that a decode task reserves."""

    def bundles(self) -> list[dict[str, float]]:
        """Returns what must be there before the work begins: the actors, and room for one task each that feeds them
        and that writes; without it they would wait for ever."""
        kinds = ("CPU", "GPU") if self.actor_gpus else ("CPU",)
        actors = [(self.actor_cpus, self.actor_gpus)] * self.actors[0]
        return [dict(zip(kinds, amounts, strict=False)) for amounts in (*actors, (self.decode_cpus + WRITE_CPUS, 0.0))]


def allocate(config: SegmentConfig, device: str) -> Allocation:
    """Shares out the cluster as it is, see `share_out`; where it scales itself, `--actors auto` is a range."""
    shares = share_out(alive_nodes(), config, device)
    if config.actor_range() is None and adds_nodes():
        fewest, most = shares.actors
        return dataclasses.replace(shares, actors=(fewest, max(most, MOST_ACTORS_TO_COME)))
    return shares


def share_out(nodes: Sequence[Mapping[str, float]], config: SegmentConfig, device: str) -> Allocation:
    """Shares out nodes: on GPUs `--actors-per-gpu` and decoding on every CPU left, on CPUs an actor a node."""
    if device == "gpu":
        return _share_out_gpus(nodes, config)
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


def _share_out_gpus(nodes: Sequence[Mapping[str, float]], config: SegmentConfig) -> Allocation:
    """An actor for each share of a GPU.

    Ray puts an actor on a GPU that has one already, and leaves others idle (2.60), so that with several on one the
    fewest are as many as there is room for. Without a number of CPUs Ray Data takes one for each, and where these are
    all that a node has, nothing decodes.
    """
    per_gpu = config.actors_per_gpu
    n_shares = per_gpu * sum(int(node.get("GPU", 0)) for node in nodes)
    low, high = config.actor_range() or (max(per_gpu, n_shares),) * 2
    cpus_left = [
        (node.get("CPU", 0) - GPU_DECODE_CPUS - WRITE_CPUS) / (node["GPU"] * per_gpu)
        for node in nodes
        if node.get("GPU", 0) >= 1
    ]
    cpus = max(LEAST_ACTOR_CPUS, math.floor(100 * min([1.0, *cpus_left])) / 100)
    return Allocation(
        actors=(low if per_gpu == 1 else min(high, max(low, n_shares)), high),
        actor_cpus=config.cpus_per_actor or cpus,
        actor_gpus=math.floor(10_000 / per_gpu) / 10_000,  # Ray counts ten-thousandths
        threads=config.cpus_per_actor or 1,
        decode_cpus=GPU_DECODE_CPUS,
    )


def share_tasks(
    chunks: Sequence[Chunk], most_frames: int, n_actors: int, *, batch_frames: int = 1
) -> list[list[Chunk]]:
    """Puts chunks that follow each other together, as long as they have few frames and all actors enough to do.

    Args:
        chunks: in order.
        most_frames: what may go through Ray together, `TASK_FRAMES` or less; a chunk that has more goes alone.
        n_actors: the most model actors.
        batch_frames: what goes together in any case, as the network would compute as long for fewer.
    """
    n_frames = sum(chunk.n_rows for chunk in chunks)
    most_frames = min(most_frames, n_frames // (n_actors * BLOCKS_PER_ACTOR))
    shared: list[list[Chunk]] = []
    filled = 0
    for chunk in chunks:
        if not shared or (filled >= batch_frames and filled + chunk.n_rows > most_frames):
            shared.append([])
            filled = 0
        shared[-1].append(chunk)
        filled += chunk.n_rows
    return shared
