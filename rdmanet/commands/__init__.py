"""Commands that are more than a question to the agent, by what they are about."""
