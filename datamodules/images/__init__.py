"""Pictures: data modules and how they are made from folders and shards."""

from datamodules.images.images import Images, ImageSet, LatentSet, image_folder, image_shards

__all__ = ["ImageSet", "Images", "LatentSet", "image_folder", "image_shards"]
