"""Images: data sets, and how they are made from folders and shards."""

from datamodules.images.batches import DrawSet, ImageSet, LatentSet
from datamodules.images.images import Images, hold_out, image_folder, image_shards

__all__ = ["DrawSet", "ImageSet", "Images", "LatentSet", "hold_out", "image_folder", "image_shards"]
