"""Folders of finished runs, as reports read them, written without running anything."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from experiments.engine.artefacts import digest

MEASURES = {
    "clip_score": {"better": "higher", "features": "f" * 64, "transform": "none"},
    "kid": {"better": "lower", "features": "e" * 64, "transform": "clean"},
}
NETWORKS = ("teacher", "pruned", "distilled")


def write_run(
    folder: Path, name: str, ratio: float, values: dict[str, float], command: str = "train.py", **fields: Any
) -> Path:
    """A run of two measures, four units (the second is removed) and eight samples of 4x4 pixels.

    `fields` are added to its configuration, with "__" for the dots of their names.
    """
    run = folder / name
    run.mkdir(parents=True)
    protocol = {"samples": 8, "size": [3, 4, 4], "sampler": "ddim", "steps": 2, "guidance": 1.0, "measures": MEASURES}
    metrics: dict[str, Any] = {
        "networks": list(NETWORKS),
        "plan/budget": "params",
        "plan/requested_ratio": ratio,
        "plan/achieved_ratio": ratio,
        "plan/removed_units": 1,
        "run_id": digest([str(run)])[:16],
        "protocol": protocol,
        "eval/weights": "ema",
    }
    for network in ("teacher", "student"):
        metrics |= {f"{network}/{key}": 10 for key in ("params", "macs", "macs_attention")}
    for network in ("pruned", "eval", "distilled", "teacher"):
        metrics |= {f"{network}/output_loss": 0.5, **{f"{network}/{key}": value for key, value in values.items()}}
    measured = {"latency_ratio": 0.9, "student/latency_ms": 1.0, "teacher/latency_ms": 1.0, "peak_memory_bytes": 1}
    measured |= {"latency_batch": 1, "device": "cpu", "seconds": {}, "provenance": {"job_command": command}}
    config = {"selection": {"name": "knapsack", "ratio": ratio}, "criterion": {"name": "magnitude"}, "seed": 0}
    config |= {"teacher": {"name": "t"}, "distillation": {"name": "none"}, "trainer": {"steps": 1}, "latents": None}
    config |= {"evaluation": {}, "data": {"name": "d"}, "calibration": {}, "export": {}, "task": {"name": "uig"}}
    scores = {f"down.{i}": {"score": 10.0**-i} for i in range(4)}
    changes = [{"kind": "bypass", "unit": "down.1"}]
    contents = {
        "metrics.json": metrics,
        "measured.json": measured,
        "scores.json": {"criterion": "magnitude", "level": "depth", "scores": scores},
        "plan.json": {"changes": changes, "teacher": "aaaa", "scores": digest(scores)},
        "finished.json": {},
    }
    for file, content in contents.items():
        (run / file).write_text(json.dumps(content))
    for number, network in enumerate(NETWORKS):
        (run / "samples" / network).mkdir(parents=True)
        np.save(run / "samples" / network / "images.npy", np.full((8, 4, 4, 3), 60 * number, np.uint8))
    cfg = OmegaConf.create(config)
    for key, value in fields.items():
        OmegaConf.update(cfg, key.replace("__", "."), value, force_add=True)
    OmegaConf.save(cfg, run / "config.yaml")
    return run
