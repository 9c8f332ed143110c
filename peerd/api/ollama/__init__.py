"""Ollama's API, /api: its requests in the words of chats, and chats' answers as its lines of JSON."""
