"""An HTTP server that speaks OpenAI's chat completions, with poses in its answers."""
