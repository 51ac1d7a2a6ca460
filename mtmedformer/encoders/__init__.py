"""Encoders: any timm model as a feature pyramid."""
