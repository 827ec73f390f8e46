"""What a labelling reads and where it writes, looked at before Ray starts: most mistakes are said in a second."""

from __future__ import annotations

from typing import NamedTuple

from unet_ray import storage
from unet_ray.archives.mistakes import require_usable_roots
from unet_ray.archives.roots import FoundRoots, find_roots
from unet_ray.config import SegmentConfig
from unet_ray.labelling.planning import require_usable_output
from unet_ray.model.bundle import Bundle, read_bundle
from unet_ray.model.onnx_labels import require_labelling_options
from unet_ray.model.tiling import Tiling, choose_tiling
from unet_ray.output import heartbeats, origins, plans
from unet_ray.storage import overlaps


class Inputs(NamedTuple):
    """The archives and the network of a labelling."""

    roots: FoundRoots
    bundle: Bundle
    tiling: Tiling | None


def read_inputs(config: SegmentConfig, *, is_published: bool) -> Inputs:
    """Returns the inputs of a labelling.

    Args:
        config: of the labelling.
        is_published: whether its output is finished; that may lie where nobody can write.

    Raises:
        ValueError: archives, model, options or output are not usable.
        TryAgain: `--overwrite` on an output at which another job works.
        StorageError: storage did not answer.
    """
    out = storage.resolve(config.out)
    if not is_published:
        storage.require_writable(out, "--out")
    plans.require_folders(out, ("manifest", "frames", "_work"))
    # Frames that the output holds already keep their ids.
    labels = origins.labels_for(out, config.frames, add_root=config.add_root, is_new=config.overwrite)
    roots = find_roots(config.frames, labels, include_hidden=config.include_hidden)
    # What a glob matches may be a link to where the output is, which its pattern alone does not show.
    overlaps.require_apart(config.out, [("--frames", uri) for _, uri in roots.places], both_ways=True)
    bundle = read_bundle(config.model, allow_network=config.allow_network)
    bundle.require_buildable()
    tiling = choose_tiling(config.inference, config.window, config.stride, bundle.model_config)
    require_labelling_options(bundle, slides=tiling is not None, tta=config.tta, precision=config.precision)
    require_usable_roots(
        config.frames, roots, config.image_column, include_hidden=config.include_hidden, allow_uris=config.allow_uri
    )
    require_usable_output(config, bundle, tiling)
    if config.overwrite:
        heartbeats.refuse_living(out)
    return Inputs(roots, bundle, tiling)
