"""`minigpt serve`: an OpenAI-compatible server, whose clients share one engine's batch, and a chat page."""
