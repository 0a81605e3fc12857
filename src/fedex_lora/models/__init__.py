"""PEFT and Transformers models to our types and back: the only home of scale, orientation (`fan_in_fan_out`) and dtype."""
