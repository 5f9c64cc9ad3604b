from lightning_modules.backbones.files import load_teacher
from lightning_modules.backbones.language_files import load_language_model

__all__ = ["load_language_model", "load_teacher"]
