"""Trains a U-Net on a Ray cluster; takes the options of `unet-ray train`.

On the cluster that RAY_ADDRESS names, or with `ray job submit`:

    ray job submit --working-dir . -- python jobs/train.py \
        --images s3://bucket/log/CameraRGB --masks s3://bucket/log/CameraMask --classes carla23 \
        --out s3://bucket/runs/carla --workers 4

Expect a line as each phase begins and one an epoch, then the validation's mean IoU, and the trained model in
OUT/model/. Submitted again after a kill, it resumes from the newest checkpoint that is whole.
"""

import sys

from unet_ray.cli import end_process, run_command

if __name__ == "__main__":
    end_process(lambda: run_command("train", sys.argv[1:]))
