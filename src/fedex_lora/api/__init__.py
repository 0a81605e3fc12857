"""The package as Python uses it: `fedex_lora.aggregate` and `fedex_lora.run`."""
