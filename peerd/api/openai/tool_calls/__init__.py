"""Tool calls in a model's text: the forms in which models write them, and readers that find them. Pure."""
