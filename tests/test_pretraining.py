"""Training from nothing, of each kind: what is saved is a stock pipeline that a job takes as its teacher."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, LDMPipeline, StableDiffusionPipeline
from helpers_networks import CLASSES as NETWORKS
from helpers_pipelines import FACTOR, LATENT, tiny_pipeline
from helpers_results import differences, trained_state
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

from datamodules.sources import MissingData
from experiments.pretrain import pretrain
from experiments.scoring_stage import data_of
from lightning_modules.backbones import load_teacher
from lightning_modules.backbones.assembly import new_backbone
from lightning_modules.denoiser import Denoiser, from_config

pytest_plugins = ["helpers_jobs"]
