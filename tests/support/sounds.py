"""Sounds that tests make."""

import numpy as np

from datamodules.audio import Mel

MEL = Mel()


def tone(frequency: float, seconds: float = 0.768, rate: int = 8000) -> np.ndarray:
    """A sine at full scale."""
    return np.sin(2 * np.pi * frequency * np.arange(round(seconds * rate)) / rate).astype(np.float32)


def noise(seed: int = 0, seconds: float = 0.768) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.2, round(seconds * 8000)).astype(np.float32)


def peak(wave: np.ndarray, rate: int = 8000) -> float:
    return float(np.fft.rfftfreq(len(wave), 1 / rate)[np.abs(np.fft.rfft(wave * np.hanning(len(wave)))).argmax()])
