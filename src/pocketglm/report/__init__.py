"""L4: Proof to HTML, Markdown and model card; pure functions."""
