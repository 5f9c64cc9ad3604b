"""Complete diffusers pipelines of random weights, small enough for a test: one of each kind of teacher; and the real
denoisers without weights.

Every folder is written as `save_pretrained` writes it, in safetensors, and `DiffusionPipeline.from_pretrained` loads it
without a network. The weights are the same in every call; PyTorch's global generator is left as it was.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    LDMPipeline,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    PNDMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
    VQModel,
)
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from conf.schema import ROOT

LATENT, FACTOR = 8, 2
"""Height and width of the latents (the 4 stages of a U-Net need 8), and pixels per latent along one edge"""
TOKENS = 16
"""Length of a prompt in tokens"""
TEXT = 8
"""Width of each text encoder"""
BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
START, END = "<|startoftext|>", "<|endoftext|>"
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,-'"


def tiny_pipeline(kind: str, folder: Path) -> Path:
    """Write the pipeline of one of KINDS into a folder and return the folder. Raises ValueError for another kind."""
    if kind not in _MAKE:
        raise ValueError(f"kind={kind!r} is unknown; choose one of: {', '.join(KINDS)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipeline = _MAKE[kind]()
    if kind == "ddpm":  # as google/ddpm-*: everything side by side in the root
        pipeline.unet.save_pretrained(folder)
        pipeline.scheduler.save_pretrained(folder)
        pipeline.save_config(folder)
    else:
        pipeline.save_pretrained(folder)
    return folder


def _clip_tokenizer() -> CLIPTokenizer:
    """Return a tokenizer of characters with three merges, which make "the" and a final "at" whole tokens."""
    merges = [("t", "h"), ("th", "e</w>"), ("a", "t</w>")]
    tokens = [START, END, *LETTERS, *(f"{c}</w>" for c in LETTERS), *("".join(pair) for pair in merges)]
    vocab = {token: i for i, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=TOKENS)


def _t5_tokenizer() -> T5Tokenizer:
    """Return a unigram tokenizer of single characters; "▁" starts a word."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    return T5Tokenizer(
        vocab=[*special, ("▁", -2.0), *((c, -3.0) for c in LETTERS)], extra_ids=0, model_max_length=TOKENS
    )


def _clip_text(cls: type = CLIPTextModel) -> CLIPTextModel | CLIPTextModelWithProjection:
    tokenizer = _clip_tokenizer()
    return cls(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT,
            intermediate_size=2 * TEXT,
            projection_dim=TEXT,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    ).eval()


def _t5_text(width: int) -> T5EncoderModel:
    config = T5Config(vocab_size=len(_t5_tokenizer()), d_model=width, d_kv=4, d_ff=2 * width, num_layers=2, num_heads=2)
    return T5EncoderModel(config).eval()


def _vae(**changed: Any) -> AutoencoderKL:
    return AutoencoderKL(
        **{
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
            "block_out_channels": (4, 8),
            "norm_num_groups": 4,
            "latent_channels": 4,
            "sample_size": LATENT * FACTOR,
            **changed,
        }
    )


def _unet(**changed: Any) -> UNet2DConditionModel:
    """Return a U-Net like Stable Diffusion 1.x: four stages, two layers per block, projections as convolutions."""
    return UNet2DConditionModel(
        **{
            "sample_size": LATENT,
            "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
            "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
            "block_out_channels": (8, 8, 16, 16),
            "layers_per_block": 2,
            "norm_num_groups": 4,
            "attention_head_dim": 2,
            "cross_attention_dim": TEXT,
            **changed,
        }
    )


def _stable_diffusion(unet: UNet2DConditionModel, scheduler: Any) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        vae=_vae(),
        text_encoder=_clip_text(),
        tokenizer=_clip_tokenizer(),
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _pndm() -> PNDMScheduler:
    return PNDMScheduler(**BETAS, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1)


def _sd() -> StableDiffusionPipeline:
    return _stable_diffusion(_unet(), _pndm())


def _sd_v() -> StableDiffusionPipeline:
    """Return a pipeline like Stable Diffusion 2.1: linear projections, predicts v."""
    scheduler = DDIMScheduler(
        **BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1, prediction_type="v_prediction"
    )
    return _stable_diffusion(_unet(use_linear_projection=True, attention_head_dim=(2, 2, 4, 4)), scheduler)


def _bk() -> StableDiffusionPipeline:
    """Return a pipeline like BK-SDM-Small: one layer per block, no middle block."""
    return _stable_diffusion(_unet(layers_per_block=1, mid_block_type=None), _pndm())


def _sdxl() -> StableDiffusionXLPipeline:
    """Two text encoders side by side; the last stage and the middle have two basic blocks in each Transformer2D."""
    unet = _unet(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(8, 8, 16),
        transformer_layers_per_block=(1, 1, 2),
        attention_head_dim=(2, 2, 4),
        use_linear_projection=True,
        cross_attention_dim=2 * TEXT,
        addition_embed_type="text_time",
        addition_time_embed_dim=TEXT,
        projection_class_embeddings_input_dim=7 * TEXT,  # six numbers of a picture's size and crop, the pooled text
    )
    return StableDiffusionXLPipeline(
        vae=_vae(scaling_factor=0.13025),
        text_encoder=_clip_text(),
        text_encoder_2=_clip_text(CLIPTextModelWithProjection),
        tokenizer=_clip_tokenizer(),
        tokenizer_2=_clip_tokenizer(),
        unet=unet,
        scheduler=EulerDiscreteScheduler(**BETAS, steps_offset=1, timestep_spacing="leading"),
    )


def _dit() -> DiTPipeline:
    """1000 classes, because the pipeline takes 1000 for "no class"; predicts noise and variance."""
    transformer = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=4, sample_size=LATENT
    )
    return DiTPipeline(transformer, _vae(), DDIMScheduler(clip_sample=False), id2label={"0": "tench", "1": "goldfish"})


def _pixart() -> PixArtAlphaPipeline:
    """Pictures of its tiny size have no aspect ratio to round to: call it with use_resolution_binning=False."""
    transformer = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=4,
        cross_attention_dim=16,
        caption_channels=TEXT,
        sample_size=LATENT,
    )
    return PixArtAlphaPipeline(
        tokenizer=_t5_tokenizer(),
        text_encoder=_t5_text(TEXT),
        vae=_vae(),
        transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(),
    )


def _sd3() -> StableDiffusion3Pipeline:
    """Two CLIP encoders side by side are as wide as T5 here; the last joint block gives no text states."""
    transformer = SD3Transformer2DModel(
        sample_size=LATENT,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=2 * TEXT,
        caption_projection_dim=16,
        pooled_projection_dim=2 * TEXT,
        pos_embed_max_size=LATENT,
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_vae(scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=_clip_text(CLIPTextModelWithProjection),
        tokenizer=_clip_tokenizer(),
        text_encoder_2=_clip_text(CLIPTextModelWithProjection),
        tokenizer_2=_clip_tokenizer(),
        text_encoder_3=_t5_text(2 * TEXT),
        tokenizer_3=_t5_tokenizer(),
    )


def _flux() -> FluxPipeline:
    """Latents are packed 2x2; the pipeline's own default size is large: call it with height and width."""
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=2 * TEXT,
        pooled_projection_dim=TEXT,
        guidance_embeds=True,
        axes_dims_rope=(2, 2, 4),
    )
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=_vae(scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=_clip_text(),
        tokenizer=_clip_tokenizer(),
        text_encoder_2=_t5_text(2 * TEXT),
        tokenizer_2=_t5_tokenizer(),
        transformer=transformer,
    )


def _uncond_unet(**changed: Any) -> UNet2DModel:
    return UNet2DModel(
        **{
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
            "block_out_channels": (8, 8, 16),
            "layers_per_block": 2,
            "norm_num_groups": 4,
            "attention_head_dim": 4,
            "sample_size": LATENT,
            **changed,
        }
    )


def _ldm() -> LDMPipeline:
    vqvae = VQModel(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 8),
        norm_num_groups=4,
        latent_channels=3,
        num_vq_embeddings=32,
        sample_size=LATENT * FACTOR,
    )
    scheduler = DDIMScheduler(
        **(BETAS | {"beta_start": 0.0015, "beta_end": 0.0195}), clip_sample=False, set_alpha_to_one=False
    )
    return LDMPipeline(vqvae=vqvae, unet=_uncond_unet(), scheduler=scheduler)


def _ddpm() -> DDPMPipeline:
    return DDPMPipeline(_uncond_unet(sample_size=LATENT * FACTOR, attention_head_dim=None), DDPMScheduler())


_MAKE: dict[str, Callable[[], DiffusionPipeline]] = {
    "sd": _sd,
    "sd_v": _sd_v,
    "sdxl": _sdxl,
    "dit": _dit,
    "pixart": _pixart,
    "sd3": _sd3,
    "flux": _flux,
    "ldm": _ldm,
    "ddpm": _ddpm,
    "bk": _bk,
}
KINDS = tuple(_MAKE)


SAME_SHAPE = {
    "sd14": "sd15",
    "ldm_bedroom": "ldm_celebahq_256",
    "ddpm_bedroom": "ddpm_church",
    "ddpm_celebahq": "ddpm_church",
}
"""{teacher: another one whose denoiser has the same configuration}"""


def published(teacher: str) -> nn.Module:
    """Return the denoiser of a published teacher at its real size, on the meta device: shapes without weights."""
    file = ROOT / "assets" / "architectures" / f"{SAME_SHAPE.get(teacher, teacher)}.json"
    config = json.loads(file.read_text())
    with torch.device("meta"):
        return getattr(diffusers, config.pop("_class_name"))(**config)
