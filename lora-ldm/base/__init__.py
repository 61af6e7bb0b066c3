"""The frozen diffusion model: SD and SDXL, their files, text encoding, attention."""
