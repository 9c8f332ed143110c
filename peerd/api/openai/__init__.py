"""OpenAI's completions and chat completions: requests, bodies, answers, templates."""
