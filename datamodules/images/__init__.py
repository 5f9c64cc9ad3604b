"""Images: data sets, and how they are made from folders and shards."""

from datamodules.images.images import DrawSet, Images, ImageSet, LatentSet, hold_out, image_folder, image_shards

__all__ = ["DrawSet", "ImageSet", "Images", "LatentSet", "hold_out", "image_folder", "image_shards"]
