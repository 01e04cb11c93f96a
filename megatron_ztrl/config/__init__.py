"""What a run is made of: the schema, YAML with overrides, and the check of native pass-through options."""
