"""Tool calls and thoughts in a model's text: the forms in which models write them, and readers that find them. Pure."""
