"""Official metrics of generated texts, from texts alone: no model, no task."""
