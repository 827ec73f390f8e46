"""The Ray that a job runs on.

What is owed to the ways of Ray 2.60, to be looked at again with each new Ray:

- `connection`: variables of `connect`; its notice of `RAY_BACKEND_LOG_LEVEL`; what of its processes Ray leaves behind
  (`end_ray`); the death of a part goes unnoticed (`lifeline`); joining has no time limit (`limited`, `_knock`).
- `resources`: the autoscaler keeps one request of all (`ASK_EVERY_S`); Ray Train waits without end (`Room`).
- `tasks`: warnings that nobody can help; stack traces instead of errors (`outcome`); options of Ray Data's context.
- `gauges`: a gauge is forgotten after 20 s. `shared_paths`: where a submitted job is unpacked.
- `training.launcher`: Ray Train loads TensorFlow to name its types (`Launcher`), retries every error (`FinalFailures`),
  waits for workers without end, and leaves its reservation behind (`run_workers`).
- `training.checkpoints`: why Ray Train's own are not used. `training.blocks`, `labelling.waves`: how Ray Data hands out
  tasks, merges blocks (`map_batches_internal`) and tries again without end.
"""
