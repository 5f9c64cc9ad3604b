from lightning_modules.backbones.files import load_teacher
from lightning_modules.backbones.image_files import load_classifier
from lightning_modules.backbones.language_files import load_language_model

__all__ = ["load_classifier", "load_language_model", "load_teacher"]
