"""The decode cache: each image is decoded and resized once."""
