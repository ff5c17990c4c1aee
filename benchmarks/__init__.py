"""Every path against what people would use instead; docs/design/benchmarks.md is the design, RESULTS.md the answers."""
