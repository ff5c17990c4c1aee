"""One file a question; its first line says it. Each has a ``QUESTION`` (benchmarks.question.Question)."""
