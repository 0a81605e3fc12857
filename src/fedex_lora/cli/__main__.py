"""`python -m fedex_lora.cli`."""

from fedex_lora.cli import main

main()
