"""Images: data sets, and how they are made from folders and shards."""

from datamodules.images.images import Images, ImageSet, LatentSet, hold_out, image_folder, image_shards

__all__ = ["ImageSet", "Images", "LatentSet", "hold_out", "image_folder", "image_shards"]
