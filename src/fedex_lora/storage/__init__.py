"""Files: result folders, adapter folders, safetensors, events. No training library."""
