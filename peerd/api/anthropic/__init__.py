"""Anthropic's API, /v1/messages: its requests in the words of chats, and chats' answers in its form."""
