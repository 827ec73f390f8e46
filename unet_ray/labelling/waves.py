"""Waves of chunks through Ray Data: decode tasks -> model actors -> writing tasks -> an outcome a chunk."""

from __future__ import annotations

import contextlib
import errno
import functools
import socket
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

import pyarrow as pa
import ray
import ray.data
from ray.data import ActorPoolStrategy, DataContext, Datasource, ReadTask
from ray.data.block import BlockMetadata
from ray.data.exceptions import SystemException

from unet_ray.classes import ClassSet
from unet_ray.cluster.tasks import TASK_RETRIES, data_context, given_up, without_ray_warnings
from unet_ray.labelling import stages
from unet_ray.labelling.allocation import WRITE_CPUS, Allocation
from unet_ray.labelling.decoding import DecodeOptions
from unet_ray.labelling.stages import ChunkOutcome
from unet_ray.model.bundle import read_bundle
from unet_ray.model.label_options import LabelOptions
from unet_ray.output.chunks import Chunk
from unet_ray.storage import StorageError

if TYPE_CHECKING:
    from unet_ray.model.labeler import Labeler

WAVE_TASKS = 2000
"""Tasks that Ray Data gets at once. 16,000 read tasks delay the first block by 18 s, 500 by 4 s (Ray 2.60)."""

BLOCKS_AT_ONCE = 2
"""Blocks in an actor at once. They share the network's threads: one keeps these busy while another is unpacked or put
together."""


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
    label: LabelOptions
    decode: DecodeOptions
    mask_encoding: str
    writer: str
    """Name of this run in its commit records."""
    allocation: Allocation
    tried_nodes: tuple[str, ...] = ()
    """Nodes on whose GPUs XLA works, by Ray's ids; on any other an actor tries it first."""
    moved: Mapping[str, str] = field(default_factory=dict)
    """Where an archive lies now, by where it lay when it was listed."""


def run_wave(
    job: WaveJob, blocks: Sequence[Sequence[Chunk]], *, carefully: bool = False
) -> Iterator[list[ChunkOutcome]]:
    """Labels chunks and yields, in any order, what became of those of each block that came through.

    A block that ends a process at every try leaves no outcome and no record, and the others go on.

    Args:
        job: what all waves share.
        blocks: chunks that go through Ray together.
        carefully: each frame is decoded in a process of its own.
    """
    # One block is one task, whatever its size. What is left without a record is said by the ledger.
    with data_context(target_max_block_size=None, max_errored_blocks=-1):
        outcomes = _pipeline(job, blocks, carefully)
    with without_ray_warnings():
        try:
            for batch in outcomes.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
                yield stages.outcomes_of(cast(pa.Table, batch))
        except ray.exceptions.RayTaskError:
            raise  # an error of this program's own
        except (ray.exceptions.RayError, SystemException) as error:
            raise given_up(error) from error


def _pipeline(job: WaveJob, blocks: Sequence[Sequence[Chunk]], carefully: bool) -> ray.data.Dataset:
    """Ray fuses stages of like resources, and decoding in the actor would wait for the network; these are unlike."""
    allocation = job.allocation
    low, high = (min(number, len(blocks)) for number in allocation.actors)
    decode = functools.partial(stages.decode_chunks, options=job.decode, moved=job.moved, carefully=carefully)
    load = functools.partial(_load_labeler, job.model, job.model_digest, job.label, job.tried_nodes)
    return (
        ray.data.read_datasource(
            _Frames(blocks, decode),
            override_num_blocks=len(blocks),
            num_cpus=allocation.decode_cpus,
            ray_remote_args={"max_retries": TASK_RETRIES},
        )
        # `map_batches` itself refuses GPUs without a number for `batch_size`, with which Ray Data would merge blocks
        # that have fewer rows (Ray 2.60); a block is to stay whole and alone.
        .map_batches_internal(
            _ModelActor,
            fn_constructor_args=(load, job.decode.network_size),
            batch_size=None,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(
                min_size=low,
                max_size=high,
                # A block that ends its actor ends those that are there with it, too.
                max_tasks_in_flight_per_actor=1 if carefully else None,
                enable_true_multi_threading=True,
            ),
            # What `max_concurrent_calls_per_actor` of Ray 2.59 sets, and 2.58 has no other name for.
            max_concurrency=1 if carefully else BLOCKS_AT_ONCE,
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

    def __init__(self, load: Callable[[], Labeler], network_size: tuple[int, int] | None) -> None:
        self._load, self._network_size = load, network_size
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


def _load_labeler(model: str, model_digest: str, options: LabelOptions, tried_nodes: Sequence[str] = ()) -> Labeler:
    from unet_ray.model.devices import UnusableGpu, configure_tensorflow
    from unet_ray.model.labeler import Labeler  # loads TensorFlow: in actors and nowhere else
    from unet_ray.model.xla_check import xla_problem

    bundle = read_bundle(model, allow_network=options.allow_network)
    if bundle.digest != model_digest:
        raise StorageError(errno.ESTALE, "the model has changed since this job began; trying again may help", model)
    if bundle.onnx:  # TensorFlow makes labels on the CPU of what ONNX Runtime gives
        configure_tensorflow("cpu", options.n_threads, op_threads=1)
        return _warm(Labeler(bundle, options))
    is_tried = options.device == "cpu" or not options.xla or ray.get_runtime_context().get_node_id() in tried_nodes
    if not is_tried and (problem := xla_problem()):
        raise UnusableGpu(
            f"{problem} on a GPU of node {socket.gethostname()}, which came after this job began; take that node out, "
            "or keep it, to go on without XLA"
        )
    configure_tensorflow(
        options.device,
        options.n_threads,
        op_threads=1,
        reproducible=True,
        processes_per_gpu=options.processes_per_gpu,
    )
    return _warm(Labeler(bundle, options))


def _warm(labeler: Labeler) -> Labeler:
    labeler.warm_up()
    return labeler
