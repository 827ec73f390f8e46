"""What is to be done for an output: its lineage, its frames in chunks, and the jobs that may work on it.

    OUT/run.json                   the lineage: model, classes and options that every label of this output comes from;
                                   sealed by its own digest (`sealed`), as is every JSON file of an output
    OUT/config.yaml                the resolved configuration of the first run; written anew where it was changed
    OUT/manifest/*.parquet         the plan: a row a frame, with the chunk and the shard that it belongs to
    OUT/manifest/_g000.json        a generation of the plan is whole; frames found later are a new generation

Steps of a plan, after each of which a kill does no harm: (1) run.json, put if absent; (2) config.yaml; (3) the
manifest's files, named by their content; (4) the generation's record, put if absent: without it they are nothing.

`--overwrite` gives an output another lineage while a job that nobody saw may still work on it. So nothing of an output
is believed that does not belong to its lineage and frames (`Plan.shard_key`), and a job looks now and then whether the
output is still its own (`has_grown`).
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import takewhile
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv

from unet_ray import storage
from unet_ray.classes import ClassSet
from unet_ray.errors import JobFailed, TryAgain
from unet_ray.frames import MANIFEST_SCHEMA, Listing, carried_schema
from unet_ray.messages import shown_path
from unet_ray.output import manifest, model_names, origins, run_facts
from unet_ray.output.chunks import CHUNK_SCHEMA, Chunk, Cutting
from unet_ray.output.rows import FORMAT_VERSION, RESULT_VERSION, frames_schema
from unet_ray.storage.sealed import are_counts, is_count, json_bytes, sealed, unsealed

_OURS = re.compile(
    r"frames/part-\d+\.parquet|manifest/(g\d+-.*\.parquet|_g\d+\.json)|_work/.*"
    r"|summary\.json|class_statistics\.parquet|preview\.png|report\.html|rejected\.csv"
)
"""What --overwrite deletes; a user's own file beside it stays."""

_NAMES = (
    *("run.json", "config.yaml", "summary.json", "class_statistics.parquet"),
    *("preview.png", "report.html", "rejected.csv"),
    *("manifest", "frames", "_work"),
)
"""Files and folders of an output; none of them may be a link, nor what lies in them."""


@dataclass(frozen=True, kw_only=True)
class Lineage:
    """All that decides a frame's labels, but for the frame: part of every chunk's key."""

    bundle_digest: str
    class_set: ClassSet
    options: Mapping[str, Any]
    """Every option that changes a result, as plain JSON types."""
    result_version: int = RESULT_VERSION

    def to_dict(self) -> dict[str, Any]:
        """Returns the lineage as plain JSON types, as it is when it was written and read again."""
        lineage = {
            "bundle_digest": self.bundle_digest,
            "class_set": self.class_set.to_dict(),
            "options": dict(self.options),
            "result_version": self.result_version,
        }
        return json.loads(json.dumps(lineage))

    @cached_property
    def digest(self) -> str:
        """What of a lineage goes into every key."""
        return storage.sha256(json_bytes(self.to_dict()))


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that is to be done for one output."""

    out: str
    lineage: Lineage
    chunks: tuple[Chunk, ...]
    """In the manifest's order, generation after generation."""
    carried: pa.Schema
    """The catalogue's own columns."""
    ignored: Mapping[str, int]
    """Files that the newest listing ignored, by extension."""
    recorded: Mapping[str, Any]
    """Package versions and machines of the first run."""
    manifest_files: tuple[dict[str, Any], ...]
    """Path, rows, bytes and sha256 of the manifest's files."""
    frame_pixels: int = 0
    """Pixels of the largest frame that was looked at when chunks were cut; 0 where none said its size."""
    n_new: int = 0
    """Frames that this plan added."""
    origin: origins.Comparison = field(default_factory=origins.Comparison)
    """What became of the frames that were planned before: they stay as they are."""
    mended: tuple[str, ...] = ()
    """Files of the manifest that were damaged or gone, and are written again."""

    @property
    def n_frames(self) -> int:
        """Frames listed, over all generations."""
        return sum(chunk.n_rows for chunk in self.chunks)

    @cached_property
    def of_shard(self) -> dict[int, tuple[Chunk, ...]]:
        """The chunks of each published file, in order."""
        shards: dict[int, list[Chunk]] = {}
        for chunk in self.chunks:
            shards.setdefault(chunk.shard, []).append(chunk)
        return {shard: tuple(chunks) for shard, chunks in shards.items()}

    @cached_property
    def shard_key(self) -> dict[int, str]:
        """A digest of all that decides the rows of each published file: its frames, their versions and the lineage."""
        keys = {shard: "\n".join(chunk.key for chunk in chunks) for shard, chunks in self.of_shard.items()}
        return {shard: storage.sha256(text.encode())[:32] for shard, text in keys.items()}


def plan(
    out: str,
    listing: Listing,
    lineage: Lineage,
    cutting: Cutting,
    *,
    config_yaml: str,
    recorded: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    add_root: bool = False,
    keep_gone: bool = False,
) -> Plan:
    """Makes the plan of an output, or goes on with the one that is there: frames found since are appended.

    Args:
        out: URI of the output's folder.
        listing: what lies in the archives now.
        lineage: what the labels come from.
        cutting: how new frames are cut.
        config_yaml: the resolved configuration.
        recorded: package versions, machines: written to run.json; another run may have others.
        overwrite: delete an output that is there, and start anew.
        add_root: roots that the output does not know are added to it.
        keep_gone: more than half of the frames of the listed roots may have gone.

    Raises:
        ValueError: the folder holds something else, an output of another lineage or of another archive; the message
            shows the difference.
        JobFailed: what is planned is damaged or gone; the message names the file.
        TryAgain: another job has overwritten the output meanwhile.
        StorageError: trying again may help.
    """
    frames_schema(lineage.class_set, carried_schema(listing.table.schema))  # a catalogue's column may have a taken name
    run = _claim(out, lineage, recorded or {}, overwrite)
    if overwrite or not run_facts.config_is_whole(out, read_summary(out)):
        storage.write_whole(storage.join(out, run_facts.CONFIG), config_yaml.encode())
    _refuse_lost_generations(out)
    _delete_strange_generations(out, lineage.digest)
    known, new, mended = _known_and_new(out, listing, lineage, cutting)
    n_new = len(new)
    while True:  # again where another job's generation came first, which may be of another archive
        new = _with_planned_types(new, _read_plan(out, run).carried) if len(known) and len(new) else new
        origin = _compared(out, run, listing, known, new, add_root=add_root, keep_gone=keep_gone)
        if not len(new):
            break
        manifest.append_generation(out, new, lineage.digest, cutting, listing.ignored, listing.roots)
        if read_run(out)["lineage"] != lineage.to_dict():
            raise overwritten(out)
        _delete_strange_generations(out, lineage.digest)
        known, new = manifest.known_and_new(out, listing.table)
    manifest.delete_unmarked(out)
    return dataclasses.replace(
        _read_plan(out, run), ignored=listing.ignored, n_new=n_new, origin=origin, mended=tuple(mended)
    )


def _compared(
    out: str,
    run: Mapping[str, Any],
    listing: Listing,
    known: pa.Table,
    new: pa.Table,
    *,
    add_root: bool,
    keep_gone: bool,
) -> origins.Comparison:
    """What became of the frames that are planned; refuses a listing that does not belong to them."""
    if not len(known):
        return origins.Comparison()
    if len(new):
        manifest.refuse_doubled(out, new)
        _refuse_other_columns(carried_schema(new.schema), _read_plan(out, run).carried)
    generations = manifest.read_generations(out)
    return origins.compare(out, listing, known, generations, add_root=add_root, keep_gone=keep_gone)


def _known_and_new(
    out: str, listing: Listing, lineage: Lineage, cutting: Cutting
) -> tuple[pa.Table, pa.Table, Sequence[str]]:
    """As `manifest.known_and_new`, with the files of the manifest that had to be mended for that."""
    try:
        return *manifest.known_and_new(out, listing.table), ()
    except JobFailed:
        mended = manifest.mend(out, listing.table, cutting, lineage.digest)
        if not mended:
            raise
        return *manifest.known_and_new(out, listing.table), mended


def _refuse_lost_generations(out: str) -> None:
    """Raises JobFailed where a published generation has no record any more: its frames would be planned anew."""
    there = {f"manifest/{file.path}" for file in storage.list_folder(storage.join(out, "manifest"))}
    for file in (read_summary(out) or {"files": ()})["files"]:
        if file["path"].startswith("manifest/_g") and file["path"] not in there:
            raise manifest.lost(storage.join(out, file["path"]), FileNotFoundError())


_ONCE_NULL = tuple(csv.ConvertOptions().null_values)
"""What was null in a CSV file for earlier versions, which found out types from the first values."""


def _with_planned_types(rows: pa.Table, planned: pa.Schema) -> pa.Table:
    """Texts of a catalogue as the types that the output was begun with. Raises ValueError where a text is none."""
    for column in planned:
        if column.name not in rows.column_names or not pa.types.is_string(rows.schema.field(column.name).type):
            continue
        texts = rows[column.name]
        if column.type == texts.type:
            continue
        known = pc.is_in(texts, value_set=pa.array(_ONCE_NULL, pa.string()))
        try:
            values = pc.if_else(known, pa.scalar(None, pa.string()), texts).cast(column.type)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise ValueError(
                f"the catalogues' column {column.name!r} is {column.type} in the output, and a value here is none: "
                f"{' '.join(str(error).split())}; mend it, or give another --out"
            ) from error
        rows = rows.set_column(rows.column_names.index(column.name), column, values)
    return rows


def _refuse_other_columns(current: pa.Schema, planned: pa.Schema) -> None:
    if current != planned:
        columns = [
            ", ".join(f"{field.name} {field.type}" for field in schema) or "none" for schema in (planned, current)
        ]
        raise ValueError(
            f"the catalogues' own columns are {columns[0]} in the output and {columns[1]} here; "
            "give catalogues with the same columns, or another --out"
        )


def read_plan(out: str) -> Plan:
    """Returns the plan of an output as it stands. Raises ValueError where there is none, JobFailed for damage."""
    _refuse_links(out)
    return _read_plan(out, read_run(out))


def options_of(out: str) -> dict[str, Any] | None:
    """Returns the options with which an output was begun; None where there is none yet."""
    if not storage.exists(storage.join(out, "run.json")):
        return None
    return read_run(out)["lineage"]["options"]


def read_run(out: str) -> dict[str, Any]:
    """Returns run.json. Raises ValueError where the folder is no output, JobFailed where it is one and damaged."""
    uri = storage.join(out, "run.json")
    try:
        run = unsealed(storage.read_bytes(uri))
        _lineage_of(run)
        if not is_count(run.get("format_version")) or not isinstance(run.get("recorded"), dict):
            raise ValueError("it does not say what wrote it")
        return run
    except (FileNotFoundError, ValueError) as error:
        if manifest.read_generations(out):
            raise manifest.lost(uri, error, "restore it, or give another --out") from error
        whose = "run.json is missing"
        if not isinstance(error, FileNotFoundError):
            whose = "its run.json is another job's, or damaged; give another --out"
        raise ValueError(f"{out} is not an output of segment: {whose}") from error


def _lineage_of(run: Mapping[str, Any]) -> Lineage:
    try:
        stored = dict(run["lineage"])
        lineage = Lineage(**{**stored, "class_set": ClassSet.from_dict(stored["class_set"])})
        # Bytes, since 4.0 and true equal whole numbers and give another digest.
        is_ours = isinstance(lineage.bundle_digest, str) and is_count(lineage.result_version)
        if not is_ours or json_bytes(lineage.to_dict()) != json_bytes(stored):
            raise ValueError("its lineage is none that segment writes")
        return lineage
    except (KeyError, TypeError, RecursionError) as error:
        raise ValueError("it says nothing of a lineage") from error


def read_summary(out: str) -> dict[str, Any] | None:
    """Returns summary.json, None where there is none or it is damaged."""
    try:
        summary = unsealed(storage.read_bytes(storage.join(out, "summary.json")))
        if not isinstance(summary["files"], list) or not are_counts(summary["rejected"]):
            return None
        for file in summary["files"]:
            if not _PUBLISHED.fullmatch(manifest.require_entry(file)["path"]):
                return None
        return summary if is_count(summary["listed"]) and is_count(summary["ok"]) else None
    except (FileNotFoundError, ValueError, KeyError):
        return None


_PUBLISHED = re.compile(
    r"run\.json|class_statistics\.parquet|frames/part-\d{5,}\.parquet"
    r"|manifest/(_g\d{3,}\.json|g\d{3,}-\d{5,}-[0-9a-f]{16}\.parquet)"
)
"""Files that summary.json may name; no other is opened, marked or written because of it."""


# --- whose the folder is ---


def require_folders(out: str, names: Sequence[str] = ("manifest", "frames")) -> None:
    """Raises ValueError where a local output, or one of these folders in it, is a file; a store has files alone."""
    for uri in (out, *(storage.join(out, name) for name in names)):
        if storage.is_local(uri) and storage.exists(uri) and not storage.is_folder(uri):
            raise ValueError(f"{uri} is a file; an output of segment has a folder there, so give another --out")


def _refuse_links(out: str) -> None:
    require_folders(out)
    link = storage.first_link(out, _NAMES)
    if link is not None:
        raise ValueError(f"{link} is a link; an output of segment has none, so give another --out")


def _strangers(out: str) -> Iterator[str]:
    """Yields files that neither a job that was killed early nor one that starts beside this one leaves."""
    for file in storage.list_folder(out):
        if not file.path.startswith("_work/"):
            yield file.path


def require_free(out: str) -> None:
    """Raises ValueError where a folder holds files that are no output of `segment`, or a link."""
    _refuse_links(out)
    if storage.exists(storage.join(out, "run.json")):
        return
    stranger = next(_strangers(out), None)
    if stranger is not None and not manifest.read_generations(out):
        raise ValueError(f"{out} holds files that are no output of segment ({stranger}); give another --out")


def require_same_kind(out: str, lineage: Lineage, model: str | None = None) -> dict[str, Any]:
    """Returns run.json of an output. Raises ValueError where its labels are of another kind than this lineage's.

    `model` is the URI of the lineage's model folder, for the message.
    """
    run = read_run(out)
    if run["format_version"] != FORMAT_VERSION:
        raise ValueError(
            f"{out} has format version {run['format_version']}, here it is {FORMAT_VERSION}; give another --out"
        )
    version = run["lineage"]["result_version"]
    if version != lineage.result_version:
        release = run["recorded"].get("unet-ray")
        raise ValueError(
            f"{out} holds labels of result version {version}, and this release makes version {lineage.result_version}: "
            "it can be read, verified and exported, but neither grown nor finished; give another --out, or "
            f"--overwrite, or go on with the release that began it{f' (unet-ray {release})' if release else ''}"
        )
    before, now = run["lineage"]["bundle_digest"], lineage.bundle_digest
    models = model_names.differences(out, before, model, now) if before != now else []
    differences = [*models, *_differences(run["lineage"], lineage.to_dict())]
    if differences:
        raise ValueError(
            f"{out} holds labels of another kind: {'; '.join(differences)}; give another --out, or --overwrite"
        )
    return run


def _claim(out: str, lineage: Lineage, recorded: Mapping[str, Any], overwrite: bool) -> dict[str, Any]:
    """Returns run.json, written now where the folder is empty; refuses what is not ours or of another lineage."""
    require_free(out)
    uri = storage.join(out, "run.json")
    ours: dict[str, Any] = {"format_version": FORMAT_VERSION, "lineage": lineage.to_dict(), "recorded": dict(recorded)}
    if not storage.exists(uri) and not manifest.read_generations(out):
        storage.put_if_absent(uri, sealed(ours))
    if not overwrite:
        return require_same_kind(out, lineage)
    read_run(out)
    # What proves the output goes before what it proves.
    for file in sorted(storage.list_folder(out), key=lambda file: "/" in file.path):
        if _OURS.fullmatch(file.path):
            storage.delete(file.uri)
    storage.write_whole(uri, sealed(ours))  # last: until then the folder is an output of ours
    return ours


def _differences(planned: Mapping[str, Any], current: Mapping[str, Any]) -> Iterator[str]:
    """Yields what differs between two lineages, but for their models."""
    if json_bytes(planned["class_set"]) != json_bytes(current["class_set"]):
        names = [str(lineage["class_set"]["name"])[:12] for lineage in (planned, current)]
        yield f"class set is {names[0]} there and {names[1]} here"
    for option in sorted({*planned["options"], *current["options"]}):
        before, now = planned["options"].get(option), current["options"].get(option)
        if json_bytes(before) != json_bytes(now):
            yield f"--{option.replace('_', '-')} is {before} there and {now} here"
    if list(planned["options"]) != list(current["options"]) and planned["options"] == current["options"]:
        yield "its options stand in another order"  # which gives another digest


def _strange_generations(out: str, lineage_digest: str) -> list[int]:
    """Returns the numbers of generations that a job planned whose output was overwritten, and of all behind them."""
    generations = manifest.read_generations(out)
    first = next(
        (n for n, generation in enumerate(generations) if generation.get("lineage", lineage_digest) != lineage_digest),
        None,
    )
    return [] if first is None else list(range(first, len(generations)))


def _delete_strange_generations(out: str, lineage_digest: str) -> None:
    # Our own behind them are planned anew with the same keys: what is done of them counts.
    for number in reversed(_strange_generations(out, lineage_digest)):
        storage.delete(storage.join(out, manifest.generation_path(number)))


def strange_marks(out: str, lineage: Lineage) -> list[str]:
    """Returns the paths of generations' records that a job wrote after its output had been overwritten."""
    return [manifest.generation_path(number) for number in _strange_generations(out, lineage.digest)]


class Grown(Exception):
    """Another job has planned more frames for the output that is about to be published."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(f"{plan.out} has grown to {plan.n_frames:,} frames")
        self.plan = plan
        """The plan as it is now."""


def has_grown(plan: Plan) -> bool:
    """Whether other jobs have planned more frames since the plan was read.

    Raises:
        TryAgain: the output is another one now: a job was told to overwrite it.
    """
    digest = plan.lineage.digest
    if _lineage_of(read_run(plan.out)).digest != digest:
        raise overwritten(plan.out)
    # What a job planned whose output was overwritten is none of it, nor what lies behind.
    generations = takewhile(
        lambda generation: generation.get("lineage", digest) == digest, manifest.read_generations(plan.out)
    )
    files = tuple(file for generation in generations for file in generation["files"])
    if files[: len(plan.manifest_files)] != plan.manifest_files:
        raise overwritten(plan.out)
    return files != plan.manifest_files


def require_whole(plan: Plan) -> None:
    """Raises Grown where `has_grown`, JobFailed where nothing is to be done for that: it would be so for ever."""
    if has_grown(plan):
        newer = _read_plan(plan.out, read_run(plan.out))
        if len(newer.chunks) <= len(plan.chunks):
            raise JobFailed(f"{plan.out}/manifest: it has grown by files without frames; start anew with --overwrite")
        raise Grown(dataclasses.replace(newer, n_new=plan.n_new, origin=plan.origin))


def overwritten(out: str) -> TryAgain:
    """Returns the error of a job whose output is no longer its own."""
    return TryAgain(
        f"{shown_path(out)} was overwritten by another job while this one worked on it, and is that job's now; "
        "to have these labels too, run the same command with another --out"
    )


def _read_plan(out: str, run: Mapping[str, Any]) -> Plan:
    lineage = _lineage_of(run)
    generations = manifest.read_generations(out)
    strange = _strange_generations(out, lineage.digest)
    generations = generations[: strange[0]] if strange else generations
    files = tuple(file for generation in generations for file in generation["files"])
    carried = pa.schema([])
    if files:
        schema = manifest.open_manifest(storage.join(out, files[0]["path"])).schema_arrow
        carried = pa.schema(
            [field for field in schema if field.name not in (*MANIFEST_SCHEMA.names, *CHUNK_SCHEMA.names)]
        )
    return Plan(
        out=out,
        lineage=lineage,
        chunks=tuple(chunk for file in files for chunk in manifest.read_chunks(storage.join(out, file["path"]))),
        carried=carried,
        ignored=generations[-1].get("ignored", {}) if generations else {},
        recorded=run["recorded"],
        manifest_files=files,
        frame_pixels=max((generation.get("frame_pixels", 0) for generation in generations), default=0),
    )
