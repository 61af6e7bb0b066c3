"""The flags of es_lora_llm.py, what they must be, and how they are read."""
