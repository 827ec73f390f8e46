"""From drives to an answer in Python, cell by cell: draw, check, train, predict, label, ask.

    pip install duckdb
    python jobs/tutorial.py

Editors take each `# %%` for a cell; `jupytext --to ipynb jobs/tutorial.py` makes a notebook of them. All that is made
lies in `unet-ray-tutorial/`. Run again, it goes on where it stopped.
"""

# %% Twelve drives, drawn by program: ten to learn from, two that training never sees. Yours are folders like these.
from pathlib import Path

import duckdb

import unet_ray
from unet_ray.demo.synthetic import write_frame

OUT = Path("unet-ray-tutorial")
LEARN, NEW = OUT / "learn", OUT / "new"

for drive in range(12):
    for index in range(12):
        folder = LEARN if drive < 10 else NEW
        if not (folder / "CameraMask" / f"drive{drive:02d}" / f"{index:06d}.png").exists():
            write_frame(str(folder), seed=0, drive=drive, index=index, height_px=120, width_px=160)

# %% What is wrong with the data? Better to know before a night of training.
report = unet_ray.check(images=LEARN / "CameraRGB", masks=LEARN / "CameraMask", classes="carla23")
print(report.as_text())

# %% Train. The recipe is the command line's; what is given beside it makes this run small.
config = unet_ray.TrainConfig.from_recipe(
    "default",
    images=LEARN / "CameraRGB",
    masks=LEARN / "CameraMask",
    classes="carla23",
    out=OUT / "run",
    epochs=24,
    batch_size=4,
    learning_rate=2e-3,
    n_filters=16,
    depth=4,
)
result = unet_ray.train(config)
print(f"mean IoU {result.metrics['val/mean_iou']:.2f} on drives that were set aside")

# %% One frame, in this process. A notebook shows the picture.
model = unet_ray.load(OUT / "run")
prediction = model.predict(NEW / "CameraRGB" / "drive10" / "000006.png")
prediction.overlay().save(OUT / "prediction.png")
prediction

# %% All frames of the new drives: the same masks, by as many processes as there are cores or nodes.
unet_ray.segment(model=OUT / "run", frames=NEW / "CameraRGB", out=OUT / "labels")

# %% Where is traffic close? A condition makes a view, of which a notebook shows a few frames.
labels = unet_ray.open_labels(OUT / "labels")
close = labels.where("pixels_vehicle > 0.15 * mask_height_px * mask_width_px")
print(f"{len(close)} of {len(labels)} frames: vehicles fill more than 15% of the picture")
close

# %% And the question: what does the camera see on each drive?
frames = labels.frames  # an Arrow table without masks, which DuckDB reads where it is
answer = duckdb.connect().sql("""
    SELECT sequence AS drive, count(*) AS frames,
           round(100 * avg(pixels_vehicle / (mask_height_px * mask_width_px)), 1) AS vehicle_percent,
           round(100 * avg(pixels_road / (mask_height_px * mask_width_px)), 1) AS road_percent
    FROM frames WHERE status = 'ok' GROUP BY sequence ORDER BY vehicle_percent DESC
""")
print(answer)

# %% The frame to look at: from the archive, with its mask.
closest = max(labels.where("status == 'ok'"), key=lambda frame: frame["pixels_vehicle"])
closest.overlay().save(OUT / "closest.png")
closest
