"""Sounds as pictures of their mel spectrograms."""

from datamodules.audio.sounds import HuggingFaceSounds, Mel, Sounds, sound_folder

__all__ = ["HuggingFaceSounds", "Mel", "Sounds", "sound_folder"]
