"""All that knows Torch-Pruning's dependency graph: tracing, groups, heads, consumers, and editing a model."""
