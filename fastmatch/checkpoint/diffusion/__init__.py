"""Checkpoints of diffusion models as their users have them: single files, pipelines, LoRAs."""
