"""Logged values as tables."""

from pathlib import Path

import pandas as pd
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def read_history(path: Path) -> pd.DataFrame:
    """The logged values, a row per step and a column per name."""
    return pd.read_csv(path).pivot(index="step", columns="name", values="value")


def read_events(folder: Path) -> dict[str, dict[int, float]]:
    """{name: {step: value}} of TensorBoard's files."""
    events = EventAccumulator(str(folder)).Reload()
    return {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in events.Tags()["scalars"]}
