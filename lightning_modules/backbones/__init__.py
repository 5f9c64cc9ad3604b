from lightning_modules.backbones.files import load_teacher

__all__ = ["load_teacher"]
