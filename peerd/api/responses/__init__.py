"""OpenAI's newer API, /v1/responses: its items in the words of chats, and chats' answers as items."""
