"""Commands that measure: each prints what it found, and docs/benchmarks.md says where it was run."""
