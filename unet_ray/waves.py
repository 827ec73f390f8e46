"""Waves of chunks through Ray Data: decode tasks -> model actors -> writing tasks -> one receipt a chunk."""

from __future__ import annotations

import contextlib
import copy
import errno
import functools
import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import pyarrow as pa
import ray
import ray.data
from ray.data import ActorPoolStrategy, DataContext, Datasource, ReadTask
from ray.data.block import BlockMetadata
from ray.data.exceptions import SystemException

from unet_ray import stages
from unet_ray.bundle import read_bundle
from unet_ray.classes import ClassSet
from unet_ray.cluster import without_ray_warnings
from unet_ray.config import SegmentConfig
from unet_ray.decoding import DecodeOptions
from unet_ray.endings import NotNow
from unet_ray.ledger import Chunk
from unet_ray.storage import StorageError

if TYPE_CHECKING:
    from unet_ray.inference import Labeler

CPU_SHARE_OF_ACTORS = 0.75
"""Share of a node's CPUs that model actors on CPUs reserve. Network and decoding may both use every core: they take
turns, and the queue between them slows down the faster one. Reserved apart, one of the two would leave cores idle."""

DECODE_CPUS_BESIDE_ACTORS = 0.1
"""CPUs that a decode task reserves where the network runs on CPUs too: three tasks on 2 cores. With 0.2 Ray Data (2.60)
let one run at most times, and a core waited: 14% of both were idle, with 0.1 1%, and 12,000 PNG frames took 104 s, not
119 (2 cores with AMX, 2026-11-28)."""

WRITE_CPUS = 0.05
"""CPUs that a writing task reserves; without a share left for them no chunk would ever be finished."""

TASK_RETRIES = 2
"""Of a task whose process ended; Ray's default for actors is to try for ever."""


WAVE_TASKS = 2000
"""Tasks that Ray Data gets at once. 16,000 read tasks delay the first block by 18 s, 500 by 4 s (Ray 2.60)."""

TASK_FRAMES = 96
"""Frames up to which small chunks share their tasks. The three tasks of a block cost 0.07 s of a core whatever is in it
(`jobs/benchmark.py --only chunks`, Ray 2.60), and the network's batches are full only within a block."""

BLOCKS_AT_ONCE = 2
"""Blocks in an actor at once. They share the network's threads: one keeps these busy while another is unpacked or put
together."""

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


@dataclass(frozen=True, kw_only=True)
class WaveJob:
    """What all waves of a run share."""

    out: str
    """URI of the output."""
    class_set: ClassSet
    model: str
    """URI of the bundle; every actor reads it, so that none depends on a node that may go."""
    model_digest: str
    """Of the bundle that the plan was made with."""
    labeler: Mapping[str, Any]
    """Arguments of `inference.Labeler`."""
    decode: DecodeOptions
    mask_encoding: str
    writer: str
    """Name of this run in its commit records."""
    allocation: Allocation


def allocate(config: SegmentConfig, device: str) -> Allocation:
    """Shares out the cluster: on GPUs an actor a GPU and decoding on every CPU left, on CPUs an actor a node."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
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
        most_frames: what may go through Ray together; a chunk that has more goes alone.
        n_actors: the most model actors.
    """
    n_frames = sum(chunk.n_rows for chunk in chunks)
    most_frames = min(most_frames, TASK_FRAMES, n_frames // (n_actors * BLOCKS_PER_ACTOR))
    shared: list[list[Chunk]] = []
    filled = 0
    for chunk in chunks:
        if not shared or filled + chunk.n_rows > most_frames:
            shared.append([])
            filled = 0
        shared[-1].append(chunk)
        filled += chunk.n_rows
    return shared


def run_wave(
    job: WaveJob, blocks: Sequence[Sequence[Chunk]], *, carefully: bool = False
) -> Iterator[list[dict[str, Any]]]:
    """Labels chunks and yields, in any order, the receipts of each block that came through, as `stages.write_chunks`
    writes them.

    A block that ends a process at every try leaves no receipt and no record, and the others go on.

    Args:
        job: what all waves share.
        blocks: chunks that go through Ray together.
        carefully: each frame is decoded in a process of its own.
    """
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # what is left without a record is said by the ledger
    with without_ray_warnings():
        context = copy.deepcopy(DataContext.get_current())
        context.target_max_block_size = None  # one block is one task, whatever its size
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        context.max_errored_blocks = -1
        with DataContext.current(context):
            receipts = _pipeline(job, blocks, carefully)
        try:
            for batch in receipts.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
                yield cast(pa.Table, batch).to_pylist()
        except ray.exceptions.RayTaskError:
            raise  # an error of this program's own
        except (ray.exceptions.RayError, SystemException) as error:
            raise _given_up(error) from error


def _pipeline(job: WaveJob, blocks: Sequence[Sequence[Chunk]], carefully: bool) -> ray.data.Dataset:
    """Ray fuses stages of like resources, and decoding in the actor would wait for the network; these are unlike."""
    allocation = job.allocation
    low, high = (min(number, len(blocks)) for number in allocation.actors)
    decode = functools.partial(stages.decode_chunks, options=job.decode, carefully=carefully)
    return (
        ray.data.read_datasource(
            _Frames(blocks, decode),
            override_num_blocks=len(blocks),
            num_cpus=allocation.decode_cpus,
            ray_remote_args={"max_retries": TASK_RETRIES},
        )
        .map_batches(
            _ModelActor,
            fn_constructor_args=(job.model, job.model_digest, job.labeler, job.decode.network_size),
            batch_size=None,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(
                min_size=low,
                max_size=high,
                # A block that ends its actor ends those that are there with it, too.
                max_tasks_in_flight_per_actor=1 if carefully else None,
                max_concurrent_calls_per_actor=1 if carefully else BLOCKS_AT_ONCE,
                enable_true_multi_threading=True,
            ),
            num_cpus=allocation.actor_cpus,
            num_gpus=allocation.actor_gpus or None,
            max_restarts=-1,
            max_task_retries=TASK_RETRIES,
        )
        .map_batches(
            stages.write_chunks,
            fn_args=(job.out, job.class_set, job.mask_encoding, job.writer),
            batch_size=None,
            batch_format="pyarrow",
            num_cpus=WRITE_CPUS,
            max_retries=TASK_RETRIES,
        )
    )


class _Frames(Datasource):
    """One read task a block, which carries places in the manifest and no frame."""

    def __init__(self, blocks: Sequence[Sequence[Chunk]], decode: Callable[[Sequence[Chunk]], pa.Table]) -> None:
        super().__init__()
        self._blocks, self._decode = blocks, decode

    def get_name(self) -> str:
        return "Frames"

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: DataContext | None = None
    ) -> list[ReadTask]:
        return [
            ReadTask(
                functools.partial(_as_blocks, self._decode, chunks),
                BlockMetadata(
                    num_rows=sum(chunk.n_rows for chunk in chunks), size_bytes=None, input_files=None, exec_stats=None
                ),
            )
            for chunks in self._blocks
        ]


def _as_blocks(decode: Callable[[Sequence[Chunk]], pa.Table], chunks: Sequence[Chunk]) -> Iterable[pa.Table]:
    return [decode(chunks)]


class _ModelActor:
    """A network on a device, and chunk after chunk through it."""

    def __init__(
        self, model: str, model_digest: str, labeler: Mapping[str, Any], network_size: tuple[int, int] | None
    ) -> None:
        self._network_size = network_size
        self._load = functools.partial(_load_labeler, model, model_digest, labeler)
        self._loading = threading.Lock()
        self._loaded: Labeler | None = None
        # An actor that fails to start ends the whole of Ray Data's work; one asked later may answer, or say why.
        with contextlib.suppress(Exception):
            self._labeler()

    def _labeler(self) -> Labeler:
        with self._loading:
            self._loaded = self._loaded or self._load()
            return self._loaded

    def __call__(self, table: pa.Table) -> pa.Table:
        """Several at once."""
        try:
            return stages.label_chunks(table, self._labeler(), self._network_size)
        except Exception as error:  # noqa: BLE001
            return stages.with_trouble(table, error)


def _load_labeler(model: str, model_digest: str, labeler: Mapping[str, Any]) -> Labeler:
    from unet_ray.inference import Labeler, configure_tensorflow  # loads TensorFlow: in actors and nowhere else

    bundle = read_bundle(model)
    if bundle.digest != model_digest:
        raise StorageError(errno.ESTALE, "the model has changed since this job began; trying again may help", model)
    configure_tensorflow(labeler["device"], labeler["n_threads"])
    loaded = Labeler(bundle, **labeler)
    loaded.warm_up()
    return loaded


def map_on_cluster(act: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
    """As `map`, on the cluster: in order, as many at once as it has CPUs, an error as it was raised."""
    remote = ray.remote(max_retries=TASK_RETRIES)(act)
    at_once = max(1, int(ray.cluster_resources().get("CPU", 1)))
    running: list[Any] = []
    for item in items:
        if len(running) == at_once:
            yield _outcome(running.pop(0), running)
        running.append(remote.remote(item))
    while running:
        yield _outcome(running.pop(0), running)


def _outcome(reference: Any, others: Sequence[Any]) -> Any:
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        for other in others:  # Ray prints the stack trace of a failure that nobody looked at (Ray 2.60)
            with contextlib.suppress(ray.exceptions.RayError):
                ray.get(other)
        raise error.cause from error
    except ray.exceptions.RayError as error:
        raise _given_up(error) from error


def _given_up(error: BaseException) -> NotNow:
    """What Ray says of work that it does not try any more: the death of a process or of a node, above all."""
    said = [line.strip() for line in str(error.__cause__ or error).splitlines() if line.strip()]
    what = f"{type(error).__name__}: {said[0]}" if said else type(error).__name__
    return NotNow(f"Ray gave up work that it had begun ({what}); the same command goes on where this one stopped")
