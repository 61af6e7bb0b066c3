"""The flags of es_lora_ldm.py and es_lora_sdxl.py, what they must be, and how they are read."""
